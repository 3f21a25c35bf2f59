"""How `judge` decides the outcome of a turn from what was observed of its process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.domain.deadline import DueKind
from runrecovery_service.domain.run import ErrorCode, InteractionKind, Question, RunError
from runrecovery_service.domain.turn import (
    Asked,
    Failed,
    Interrupted,
    Observed,
    Succeeded,
    TurnEnd,
    judge,
)

ASKED = Asked(Question(kind=InteractionKind.CONFIRM, prompt="?"))
SUCCEEDED = Succeeded({"x": 1})
WELL = Observed(said=SUCCEEDED, broken=None, exit_code=0, in_wait=False, stderr_tail="")
SEEN = st.builds(
    Observed,
    said=st.sampled_from([ASKED, SUCCEEDED, None]),
    broken=st.none() | st.text(min_size=1),
    exit_code=st.none() | st.integers(-64, 255),
    in_wait=st.booleans(),
    stderr_tail=st.text(),
    interrupted=st.none() | st.just("stood still"),
    unsupervised=st.booleans(),
    undelivered=st.booleans(),
    at_work=st.booleans(),
    timed_out=st.sampled_from([None, DueKind.WAIT, DueKind.RUN]),
    failure=st.none() | st.just(RunError(code=ErrorCode.ENGINE_FAILED, message="!")),
)


def code_of(end: TurnEnd) -> str:
    assert isinstance(end, Failed)
    return end.error.code


def kind_of(end: TurnEnd) -> str:
    """Return the error code of a failure, else the name of the outcome."""
    return end.error.code if isinstance(end, Failed) else type(end).__name__


@pytest.mark.parametrize("said", [ASKED, SUCCEEDED])
@pytest.mark.parametrize("exit_code", [0, None], ids=["ended", "lingered"])
def test_a_clean_end_has_the_outcome_of_the_final_message(
    said: Asked | Succeeded, exit_code: int
) -> None:
    assert said == judge(replace(WELL, said=said, exit_code=exit_code))


@pytest.mark.parametrize("exit_code", [1, 255, -9])
def test_a_bad_exit_code_fails_the_turn_whatever_its_final_message(exit_code: int) -> None:
    assert code_of(judge(replace(WELL, exit_code=exit_code))) == ErrorCode.ENGINE_FAILED


def test_an_exit_without_a_final_message_fails_the_turn() -> None:
    assert code_of(judge(replace(WELL, said=None))) == ErrorCode.ENGINE_FAILED


def test_closing_the_output_without_a_final_message_and_living_on_is_a_protocol_error() -> None:
    end = judge(replace(WELL, said=None, exit_code=None))

    assert code_of(end) == ErrorCode.ENGINE_PROTOCOL_ERROR


def test_an_exit_while_the_user_is_awaited_loses_the_process() -> None:
    end = judge(replace(WELL, said=ASKED, in_wait=True))

    assert code_of(end) == ErrorCode.INTERACTION_PROCESS_LOST


@pytest.mark.parametrize(
    ("said", "exit_code", "kind"),
    [
        (None, None, "REPLY_NOT_DELIVERED"),
        (None, 0, "REPLY_NOT_DELIVERED"),
        (None, 3, "ENGINE_FAILED"),
        (SUCCEEDED, 0, "Succeeded"),
        (SUCCEEDED, None, "Succeeded"),
    ],
)
def test_a_turn_without_a_result_whose_reply_was_not_read_is_reply_not_delivered(
    said: Succeeded | None, exit_code: int | None, kind: str
) -> None:
    end = judge(replace(WELL, said=said, exit_code=exit_code, undelivered=True))

    assert kind_of(end) == kind


def test_closing_the_output_while_the_user_is_awaited_is_a_protocol_error() -> None:
    end = judge(replace(WELL, said=None, exit_code=None, in_wait=True))

    assert isinstance(end, Failed)
    assert end.error.code == "ENGINE_PROTOCOL_ERROR"
    assert end.error.message.endswith(
        "closed its output while it waited for the reply, but did not exit."
    )


def test_a_protocol_error_precedes_every_other_failure() -> None:
    end = judge(replace(WELL, broken="line 3 is no JSON", in_wait=True, exit_code=-9))

    assert isinstance(end, Failed)
    assert (end.error.code, end.error.message) == ("ENGINE_PROTOCOL_ERROR", "line 3 is no JSON")


def test_the_signal_and_the_last_lines_are_in_the_message() -> None:
    end = judge(replace(WELL, exit_code=-11, stderr_tail="boom"))

    assert isinstance(end, Failed)
    assert "signal 11" in end.error.message
    assert end.error.message.endswith(": boom")


def test_a_wait_over_its_deadline_is_interaction_wait_timeout() -> None:
    end = judge(replace(WELL, said=None, exit_code=None, in_wait=True, timed_out=DueKind.WAIT))

    assert code_of(end) == ErrorCode.INTERACTION_WAIT_TIMEOUT


@pytest.mark.parametrize(("said", "kind"), [(SUCCEEDED, "Succeeded"), (None, "RUN_TIMEOUT")])
def test_a_result_that_arrived_before_the_run_deadline_is_kept(
    said: Succeeded | None, kind: str
) -> None:
    end = judge(replace(WELL, said=said, exit_code=None, timed_out=DueKind.RUN))

    assert kind_of(end) == kind


BROKE = RunError(code=ErrorCode.SESSION_RESUME_FAILED, message="The agent failed: gone.")


@pytest.mark.parametrize("exit_code", [0, 1, None])
@pytest.mark.parametrize("said", [ASKED, SUCCEEDED, None])
def test_a_failure_that_the_engine_reports_precedes_its_final_message(
    said: Asked | Succeeded | None, exit_code: int | None
) -> None:
    assert judge(replace(WELL, said=said, exit_code=exit_code, failure=BROKE)) == Failed(BROKE)


def test_a_failure_that_the_engine_reports_does_not_hide_a_run_timeout() -> None:
    end = judge(replace(WELL, failure=BROKE, timed_out=DueKind.RUN))

    assert code_of(end) == ErrorCode.RUN_TIMEOUT


@pytest.mark.parametrize("in_wait", [False, True])
def test_a_turn_that_its_shim_killed_was_interrupted_whatever_its_exit_code(
    *, in_wait: bool
) -> None:
    end = judge(replace(WELL, exit_code=-9, in_wait=in_wait, interrupted="stood still"))

    assert end == Interrupted("stood still")


@pytest.mark.parametrize(
    ("in_wait", "code"),
    [(False, ErrorCode.SUPERVISION_LOST), (True, ErrorCode.INTERACTION_PROCESS_LOST)],
)
def test_a_process_without_its_shim_fails_the_turn(*, in_wait: bool, code: ErrorCode) -> None:
    end = judge(replace(WELL, exit_code=None, in_wait=in_wait, unsupervised=True))

    assert code_of(end) == code


def test_failures_have_this_order_of_precedence() -> None:
    everything = Observed(
        said=SUCCEEDED,
        broken="no JSON",
        exit_code=3,
        in_wait=True,
        stderr_tail="boom",
        interrupted="stood still",
        unsupervised=True,
        timed_out=DueKind.WAIT,
    )
    nothing: dict[str, Any] = {
        "broken": None, "timed_out": None, "interrupted": None, "in_wait": False,
        "unsupervised": False, "exit_code": 0,
    }  # fmt: skip

    order = [kind_of(judge(everything))]
    for name, value in nothing.items():
        everything = replace(everything, **{name: value})
        order.append(kind_of(judge(everything)))

    assert order == [
        "ENGINE_PROTOCOL_ERROR", "INTERACTION_WAIT_TIMEOUT", "Interrupted",
        "INTERACTION_PROCESS_LOST", "SUPERVISION_LOST", "ENGINE_FAILED", "Succeeded",
    ]  # fmt: skip


@given(SEEN)
def test_every_observation_has_one_outcome_and_success_needs_a_clean_end(seen: Observed) -> None:
    end = judge(seen)

    if isinstance(end, Failed):
        assert end.error.code in set(ErrorCode)
        assert end.error.message
    elif isinstance(end, Interrupted):
        assert end.because == seen.interrupted
        assert (seen.broken, seen.timed_out) == (None, None)
    else:
        assert end is seen.said
        assert seen.broken is None
        assert seen.exit_code in {None, 0}
        in_time = seen.timed_out is None
        assert in_time or (seen.timed_out is DueKind.RUN and isinstance(end, Succeeded))
        assert not in_time or not any((seen.in_wait, seen.unsupervised, seen.interrupted))
