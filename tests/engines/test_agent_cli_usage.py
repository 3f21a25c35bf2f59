"""The usage that agent CLIs report, in the service's units, also of a resumed process."""

from __future__ import annotations

from typing import Any, cast

import pytest
from engines.agent_cli_turns import ID, messages_of
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.domain.run import JsonObject
from runrecovery_service.domain.usage import SessionUsage, TurnUsage, Usage
from runrecovery_service.engines.claude import CLAUDE
from runrecovery_service.engines.cli_dialect import CliDialect, CliListener
from runrecovery_service.engines.codex import CODEX
from runrecovery_service.engines.dialect import UsageMessage
from runrecovery_service.engines.gemini import GEMINI

RESULT: JsonObject = {"type": "result", "subtype": "success", "is_error": False, "result": "Done."}
CODEX_TOTAL: JsonObject = {
    "type": "turn.completed",
    "usage": {
        "input_tokens": 300,
        "cached_input_tokens": 120,
        "cache_write_input_tokens": 30,
        "output_tokens": 40,
        "reasoning_output_tokens": 15,
    },
}


def reported(
    dialect: CliDialect, *events: JsonObject, before: Usage | None = None
) -> list[TurnUsage]:
    """Return the usage that a turn reports. It resumes a session that had used `before`."""
    session = None if before is None else SessionUsage(total=before)
    listener = CliListener(dialect, ID, resumed=before is not None, used_before=session)
    return [m.used for m in messages_of(listener, events) if isinstance(m, UsageMessage)]


def claude_result(calls: int, *, of_process: int, cost: float) -> JsonObject:
    """Return a result whose modelUsage has `calls` calls, `of_process` of them of this process."""
    return RESULT | {
        "total_cost_usd": cost,
        "usage": {
            "input_tokens": 10 * of_process,
            "cache_creation_input_tokens": 20 * of_process,
            "cache_read_input_tokens": 70 * of_process,
            "output_tokens": 5 * of_process,
        },
        "modelUsage": {
            "big": {
                "inputTokens": 10 * calls,
                "outputTokens": 5 * calls,
                "cacheReadInputTokens": 70 * calls,
                "cacheCreationInputTokens": 20 * calls,
                "costUSD": cost,
                "thinkingTokens": 2 * calls,
            },
            "small": {"inputTokens": calls, "outputTokens": calls},
        },
    }


def claude_usage(calls: int, cost_nanos: int) -> Usage:
    return Usage(
        input_tokens=101 * calls,
        cached_input_tokens=70 * calls,
        cache_write_input_tokens=20 * calls,
        output_tokens=6 * calls,
        reasoning_output_tokens=2 * calls,
        cost_nanos=cost_nanos,
        model="big",
    )


def test_codex_reports_the_total_of_its_thread() -> None:
    total = Usage(
        input_tokens=300,
        cached_input_tokens=120,
        cache_write_input_tokens=30,
        output_tokens=40,
        reasoning_output_tokens=15,
    )
    before = Usage(input_tokens=200, cached_input_tokens=100, output_tokens=10)
    part = Usage(
        input_tokens=100,
        cached_input_tokens=20,
        cache_write_input_tokens=30,
        output_tokens=30,
        reasoning_output_tokens=15,
    )

    session = SessionUsage(total=total)
    assert reported(CODEX, CODEX_TOTAL) == [TurnUsage(turn=total, session=session)]
    assert reported(CODEX, CODEX_TOTAL, before=before) == [TurnUsage(turn=part, session=session)]


def test_gemini_reports_its_process_and_its_thoughts_only_in_the_total() -> None:
    models: JsonObject = {"flash": {"total_tokens": 20}, "pro": {"total_tokens": 110}}
    stats: JsonObject = {
        "total_tokens": 130, "input_tokens": 100, "output_tokens": 12, "cached": 60, "input": 40,
        "models": models,
    }  # fmt: skip
    used = Usage(
        input_tokens=100,
        cached_input_tokens=60,
        output_tokens=30,
        reasoning_output_tokens=18,
        model="pro",
    )

    for before in (None, Usage(input_tokens=50)):
        event: JsonObject = {"type": "result", "status": "success", "stats": stats}
        assert reported(GEMINI, event, before=before) == [TurnUsage(turn=used)]


def test_claude_counts_every_model_and_its_cache_as_input() -> None:
    used = claude_usage(2, 500_000_000)

    assert reported(CLAUDE, claude_result(2, of_process=2, cost=0.5)) == [
        TurnUsage(turn=used, session=SessionUsage(total=used))
    ]


def test_usage_of_claude_over_the_session_and_over_the_process_are_distinguished() -> None:
    before = claude_usage(2, 500_000_000)

    (over_session,) = reported(CLAUDE, claude_result(5, of_process=3, cost=1.25), before=before)
    (over_process,) = reported(CLAUDE, claude_result(3, of_process=3, cost=0.75), before=before)
    (after_a_kill,) = reported(CLAUDE, claude_result(5, of_process=1, cost=1.25), before=before)

    assert over_session.turn == claude_usage(3, 750_000_000)
    assert over_process.turn == claude_usage(3, 750_000_000)
    assert after_a_kill.turn == claude_usage(3, 750_000_000)


def test_a_claude_that_counts_its_subagents_over_the_process_counts_them_all() -> None:
    models: JsonObject = {
        "opus": {"inputTokens": 6000, "outputTokens": 0, "thinkingTokens": 0},
        "haiku": {"inputTokens": 60_000, "outputTokens": 0},
    }
    result = RESULT | {
        "total_cost_usd": 0.2,
        "usage": {"input_tokens": 6000, "output_tokens": 0},
        "modelUsage": models,
    }
    total = Usage(input_tokens=66_000, cost_nanos=200_000_000, model="haiku")

    before = Usage(input_tokens=5000, cost_nanos=50_000_000)
    assert reported(CLAUDE, result, before=before) == [
        TurnUsage(turn=total, session=SessionUsage(total=total))
    ]


def test_a_claude_that_fails_before_its_first_call_has_used_nothing() -> None:
    result = claude_result(2, of_process=0, cost=0.5)
    result["modelUsage"] = {
        **cast("JsonObject", result["modelUsage"]), "new": {"inputTokens": 0, "outputTokens": 0}
    }  # fmt: skip

    (used,) = reported(CLAUDE, result, before=claude_usage(2, 500_000_000))

    assert used.turn == Usage(cost_nanos=0, model="big")


def test_claude_without_models_reports_its_process() -> None:
    result = claude_result(1, of_process=1, cost=0.25)
    del result["modelUsage"]

    assert reported(CLAUDE, result, before=Usage(input_tokens=7)) == [
        TurnUsage(
            turn=Usage(
                input_tokens=100,
                cached_input_tokens=70,
                cache_write_input_tokens=20,
                output_tokens=5,
                cost_nanos=250_000_000,
            )
        )
    ]


def test_the_usage_of_a_turn_that_failed_is_reported_too() -> None:
    failed = claude_result(1, of_process=1, cost=0.25) | {"is_error": True}

    assert reported(CLAUDE, failed)[0].turn == claude_usage(1, 250_000_000)


def claude_call(name: str, read: int, *, cached: int = 0) -> JsonObject:
    """Return an event of one call of a model; a call has an event for each part of its answer."""
    used: JsonObject = {"input_tokens": read, "cache_read_input_tokens": cached, "output_tokens": 1}
    message: JsonObject = {"id": name, "model": "big", "content": [], "usage": used}
    return {"type": "assistant", "message": message}


def test_claude_reports_each_call_until_its_result_replaces_them() -> None:
    before = claude_usage(2, 500_000_000)
    calls = [claude_call("a", 7), claude_call("a", 7, cached=3), claude_call("b", 20)]
    result = claude_result(5, of_process=3, cost=1.25)

    *early, last = reported(CLAUDE, *calls, result, claude_call("c", 4), before=before)
    middle = early.pop()

    def under_way(read: int, cached: int, written: int) -> TurnUsage:
        used = Usage(
            input_tokens=read, cached_input_tokens=cached, output_tokens=written, model="big"
        )
        return TurnUsage(turn=used, session=SessionUsage(total=before, calls=used))

    assert early == [under_way(7, 0, 1), under_way(10, 3, 1), under_way(30, 3, 2)]
    assert middle.turn == claude_usage(3, 750_000_000)
    assert middle.session == SessionUsage(total=claude_usage(5, 1_250_000_000))
    assert last.turn == middle.turn.plus(Usage(input_tokens=4, output_tokens=1))


@pytest.mark.parametrize(
    ("content", "is_answering"),
    [
        ([{"type": "text", "text": "Done."}], True),
        ([{"type": "text"}, {"type": "tool_use", "id": "toolu_1"}], False),
        ("text", True),
        ([None], True),
    ],
)
def test_a_call_of_claude_without_a_tool_call_may_be_the_answer(
    content: Any, *, is_answering: bool
) -> None:
    call = claude_call("a", 7)
    call["message"] = {**cast("JsonObject", call["message"]), "content": content}
    listener = CliListener(CLAUDE, ID, resumed=False)

    (call_used,) = messages_of(listener, [call])
    *_, used = messages_of(listener, [claude_result(1, of_process=1, cost=1.0)])

    assert isinstance(call_used, UsageMessage)
    assert call_used.is_answering is is_answering
    assert isinstance(used, UsageMessage)
    assert not used.is_answering


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@pytest.mark.parametrize(
    ("dialect", "event", "part"),
    [(CODEX, CODEX_TOTAL, "usage"), (GEMINI, {"type": "result"}, "stats")]
    + [
        (CLAUDE, claude_result(1, of_process=1, cost=1.0), part) for part in ("usage", "modelUsage")
    ],
)
@given(data=st.data())
def test_impossible_numbers_are_ignored_and_do_not_fail_the_turn(
    dialect: CliDialect, event: JsonObject, part: str, data: st.DataObject
) -> None:
    names = [
        "input_tokens", "output_tokens", "cached", "total_tokens", "models", "cached_input_tokens",
        "cache_read_input_tokens", "m",
    ]  # fmt: skip
    said = data.draw(JSON | st.dictionaries(st.sampled_from(names), JSON))

    for used in reported(dialect, event | {part: said}, before=Usage(input_tokens=5)):
        assert min(used.turn.input_tokens, used.turn.output_tokens) >= 0
