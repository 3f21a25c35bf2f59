"""What agents report as used: what is believed, and the part of one process in a total."""

from __future__ import annotations

from typing import Any

import pytest
from runrecovery_service.domain.run import InteractionKind, Question, RunError
from runrecovery_service.domain.turn import (
    Asked,
    Failed,
    Interrupted,
    Succeeded,
    TurnEnd,
    end_of_budget,
)
from runrecovery_service.domain.usage import (
    Budget,
    InvalidUsage,
    SessionUsage,
    Usage,
    cost_to_nanos,
    usage_of,
)

BEFORE = Usage(input_tokens=100, cached_input_tokens=60, output_tokens=10, cost_nanos=5)


def test_a_report_keeps_its_numbers() -> None:
    usage = usage_of(
        input_tokens=100,
        output_tokens=10.0,
        cached=60,
        cache_write=40,
        reasoning=10,
        cost_usd=0.1,
        model="m",
    )

    assert usage == Usage(
        input_tokens=100,
        cached_input_tokens=60,
        cache_write_input_tokens=40,
        output_tokens=10,
        reasoning_output_tokens=10,
        cost_nanos=100_000_000,
        model="m",
    )
    assert (usage.total_tokens, usage.cost_usd) == (110, 0.1)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"input_tokens": None}, "input_tokens is missing"),
        ({"input_tokens": -1}, "input_tokens is not from 0 to 1000000000000"),
        ({"output_tokens": 10**12 + 1}, "output_tokens is not from 0 to 1000000000000"),
        ({"output_tokens": 10**400}, "output_tokens is not from 0 to 1000000000000"),
        ({"output_tokens": 1e300}, "output_tokens is not from 0 to 1000000000000"),
        ({"input_tokens": True}, "input_tokens is not a whole number"),
        ({"input_tokens": "7"}, "input_tokens is not a whole number"),
        ({"input_tokens": float("nan")}, "input_tokens is not a whole number"),
        ({"input_tokens": float("inf")}, "input_tokens is not a whole number"),
        ({"input_tokens": 1.5}, "input_tokens is not a whole number"),
        ({"cached": [1]}, "cached_input_tokens is not a whole number"),
        ({"cost_usd": float("nan")}, "cost_usd is not from 0 to 10000"),
        ({"cost_usd": -0.1}, "cost_usd is not from 0 to 10000"),
        ({"cost_usd": 10_001}, "cost_usd is not from 0 to 10000"),
        ({"cost_usd": True}, "cost_usd is not a number"),
        ({"cost_usd": "1"}, "cost_usd is not a number"),
        ({"model": 4}, "model is not a text of at most 200 characters"),
        ({"model": "m" * 201}, "model is not a text of at most 200 characters"),
        ({"model": "m\0"}, "model is not a text of at most 200 characters"),
        ({"model": "m\ud800"}, "model is not a text of at most 200 characters"),
        (
            {"cached": 60, "cache_write": 41},
            "cached tokens are more than input_tokens, which includes them",
        ),
        ({"reasoning": 11}, "reasoning tokens are more than output_tokens, which includes them"),
    ],
)
def test_a_report_with_an_impossible_number_is_refused(wrong: dict[str, Any], why: str) -> None:
    with pytest.raises(InvalidUsage) as refused:
        usage_of(**{"input_tokens": 100, "output_tokens": 10} | wrong)

    assert str(refused.value) == why


@pytest.mark.parametrize(
    ("total", "at_least", "part"),
    [
        # The total of the session goes on.
        (
            Usage(input_tokens=150, cached_input_tokens=60, output_tokens=12, cost_nanos=6),
            None,
            Usage(input_tokens=50, output_tokens=2, cost_nanos=1),
        ),
        # It began anew.
        (Usage(input_tokens=99, output_tokens=12), None, Usage(input_tokens=99, output_tokens=12)),
        # The process alone has used more than the difference: the total is of the process.
        (
            Usage(input_tokens=150, cached_input_tokens=60, output_tokens=12, cost_nanos=6),
            Usage(input_tokens=150, output_tokens=12),
            Usage(input_tokens=150, cached_input_tokens=60, output_tokens=12, cost_nanos=6),
        ),
        # A killed process is in the difference, too.
        (
            Usage(input_tokens=300, cached_input_tokens=60, output_tokens=30, cost_nanos=9),
            Usage(input_tokens=100, output_tokens=10),
            Usage(input_tokens=200, output_tokens=20, cost_nanos=4),
        ),
    ],
)
def test_the_part_of_a_process_is_what_came_since(
    total: Usage, at_least: Usage | None, part: Usage
) -> None:
    assert SessionUsage(total=BEFORE).since(total, at_least=at_least) == part


def test_the_first_total_is_all_of_the_process() -> None:
    assert SessionUsage().since(BEFORE, at_least=BEFORE) == BEFORE


@pytest.mark.parametrize(("total", "part"), [(170, 50), (150, 50), (50, 50)])
def test_the_calls_of_a_killed_turn_are_counted_once_whether_the_total_has_them_or_not(
    total: int, part: int
) -> None:
    session = SessionUsage(total=BEFORE, calls=Usage(input_tokens=20))
    reported = Usage(input_tokens=total, cached_input_tokens=60, output_tokens=10, cost_nanos=5)
    if total == part:  # of the process alone
        reported = Usage(input_tokens=total)

    found = session.since(reported, at_least=Usage(input_tokens=part))

    assert found.input_tokens == part


def test_a_number_of_which_the_total_lacks_a_part_does_not_make_the_rest_count_twice() -> None:
    session = SessionUsage(total=BEFORE, calls=Usage(input_tokens=20, output_tokens=3))
    total = Usage(input_tokens=170, cached_input_tokens=60, output_tokens=13, cost_nanos=9)

    found = session.since(total, at_least=Usage(input_tokens=45, output_tokens=2))

    assert found == Usage(input_tokens=50, output_tokens=2, cost_nanos=4)


IN_TURN = Usage(input_tokens=7, output_tokens=2)


@pytest.mark.parametrize(
    ("after", "before"),
    [
        (SessionUsage(total=BEFORE.plus(IN_TURN)), SessionUsage(total=BEFORE)),
        (SessionUsage(total=BEFORE, calls=IN_TURN), SessionUsage(total=BEFORE)),
        (
            SessionUsage(total=BEFORE, calls=Usage(input_tokens=9, output_tokens=3)),
            SessionUsage(total=BEFORE, calls=Usage(input_tokens=2, output_tokens=1)),
        ),
        (
            SessionUsage(
                total=BEFORE.plus(Usage(input_tokens=4)),
                calls=Usage(input_tokens=3, output_tokens=2),
            ),
            SessionUsage(total=BEFORE),
        ),
        (SessionUsage(calls=IN_TURN), SessionUsage()),
    ],
)
def test_what_was_known_of_a_session_before_a_turn_is_found_again(
    after: SessionUsage, before: SessionUsage
) -> None:
    assert after.before(IN_TURN) == before


@pytest.mark.parametrize(
    ("budget", "used", "why"),
    [
        (Budget(), Usage(input_tokens=10**12), None),
        (Budget(max_tokens=10), None, None),
        (Budget(max_tokens=10), Usage(input_tokens=5, output_tokens=4), None),
        (
            Budget(max_tokens=10),
            Usage(input_tokens=5, cached_input_tokens=5, output_tokens=5),
            "The run has used 10 of its 10 tokens.",
        ),
        (Budget(max_cost_nanos=10), Usage(input_tokens=99), None),
        (Budget(max_cost_nanos=500_000_000), Usage(cost_nanos=499_999_999), None),
        (
            Budget(max_cost_nanos=500_000_000),
            Usage(cost_nanos=750_000_000),
            "The run has cost 0.750000 of its 0.500000 US dollars.",
        ),
    ],
)
def test_a_budget_is_used_up_once_it_is_reached(
    budget: Budget, used: Usage | None, why: str | None
) -> None:
    assert budget.why_used_up(used) == why


def test_a_caller_changes_the_limits_that_he_names() -> None:
    engine = Budget(max_tokens=10, max_cost_nanos=7)

    assert engine.narrowed(Budget(max_tokens=4)) == Budget(max_tokens=4, max_cost_nanos=7)
    assert cost_to_nanos(1e-12) == 1


QUESTION = Question(kind=InteractionKind.CONFIRM, prompt="Go on?")
DONE, BROKEN = Succeeded({}), Failed(RunError(code="ENGINE_FAILED", message="no"))
USED_UP = Failed(RunError(code="BUDGET_EXCEEDED", message="used up"))


@pytest.mark.parametrize(
    ("end", "becomes"),
    [
        (DONE, DONE),
        (BROKEN, BROKEN),
        (Asked(QUESTION), USED_UP),
        (Interrupted("a standstill"), USED_UP),
    ],
)
def test_after_a_budget_that_is_used_up_no_turn_follows(end: TurnEnd, becomes: TurnEnd) -> None:
    assert end_of_budget(end, "used up") == becomes
    assert end_of_budget(end, None) == end
