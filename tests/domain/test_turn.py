"""How `judge` decides the outcome of a turn from what was observed of its process."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.domain.interruption import InterruptionCause
from runrecovery_service.domain.run import ErrorCode, InteractionKind, Question, RunError
from runrecovery_service.domain.steady_time import DueKind
from runrecovery_service.domain.turn import (
    Asked,
    Failed,
    Interrupted,
    ProcessEnd,
    Succeeded,
    TurnEnd,
    TurnFacts,
    judge,
)

ASKED = Asked(Question(kind=InteractionKind.CONFIRM, prompt="?"))
SUCCEEDED = Succeeded({"x": 1})
TURNS = st.builds(
    TurnFacts,
    last_word=st.sampled_from([ASKED, SUCCEEDED, None]),
    protocol_error=st.none() | st.text(min_size=1),
    is_waiting=st.booleans(),
    interrupted=st.none() | st.just("stood still"),
    is_unsupervised=st.booleans(),
    is_reply_lost=st.booleans(),
    is_at_work=st.booleans(),
    deadline_passed=st.sampled_from([None, DueKind.WAIT, DueKind.RUN]),
)
ENDS = st.builds(
    ProcessEnd,
    exit_code=st.none() | st.integers(-64, 255),
    stderr_tail=st.text(),
    failure=st.none() | st.just(RunError(code=ErrorCode.ENGINE_FAILED, message="!")),
)


def outcome(
    *,
    exit_code: int | None = 0,
    failure: RunError | None = None,
    stderr_tail: str = "",
    resumes: bool = False,
    **facts: Any,
) -> TurnEnd:
    """Return how a turn ends that went well but for what is given."""
    turn = TurnFacts(**{"last_word": SUCCEEDED} | facts)
    process = ProcessEnd(exit_code=exit_code, failure=failure, stderr_tail=stderr_tail)
    return judge(turn, process, resumes=resumes)


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
    assert said == outcome(last_word=said, exit_code=exit_code)


@pytest.mark.parametrize("exit_code", [1, 255, -9])
def test_a_bad_exit_code_fails_the_turn_whatever_its_final_message(exit_code: int) -> None:
    assert code_of(outcome(exit_code=exit_code)) == ErrorCode.ENGINE_FAILED


def test_an_exit_without_a_final_message_fails_the_turn() -> None:
    assert code_of(outcome(last_word=None)) == ErrorCode.ENGINE_FAILED


def test_closing_the_output_without_a_final_message_and_living_on_is_a_protocol_error() -> None:
    end = outcome(last_word=None, exit_code=None)

    assert code_of(end) == ErrorCode.ENGINE_PROTOCOL_ERROR


def test_an_exit_while_the_user_is_awaited_loses_the_process() -> None:
    end = outcome(last_word=ASKED, is_waiting=True)

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
    end = outcome(last_word=said, exit_code=exit_code, is_reply_lost=True)

    assert kind_of(end) == kind


def test_closing_the_output_while_the_user_is_awaited_is_a_protocol_error() -> None:
    end = outcome(last_word=None, exit_code=None, is_waiting=True)

    assert isinstance(end, Failed)
    assert end.error.code == "ENGINE_PROTOCOL_ERROR"
    assert end.error.message.endswith(
        "closed its output while it waited for the reply, but did not exit."
    )


def test_a_protocol_error_precedes_every_other_failure() -> None:
    end = outcome(protocol_error="line 3 is no JSON", is_waiting=True, exit_code=-9)

    assert isinstance(end, Failed)
    assert (end.error.code, end.error.message) == ("ENGINE_PROTOCOL_ERROR", "line 3 is no JSON")


def test_the_signal_and_the_last_lines_are_in_the_message() -> None:
    end = outcome(exit_code=-11, stderr_tail="boom")

    assert isinstance(end, Failed)
    assert "signal 11" in end.error.message
    assert end.error.message.endswith(": boom")


def test_a_wait_over_its_deadline_is_interaction_wait_timeout() -> None:
    end = outcome(last_word=None, exit_code=None, is_waiting=True, deadline_passed=DueKind.WAIT)

    assert code_of(end) == ErrorCode.INTERACTION_WAIT_TIMEOUT


@pytest.mark.parametrize(("said", "kind"), [(SUCCEEDED, "Succeeded"), (None, "RUN_TIMEOUT")])
def test_a_result_that_arrived_before_the_run_deadline_is_kept(
    said: Succeeded | None, kind: str
) -> None:
    end = outcome(last_word=said, exit_code=None, deadline_passed=DueKind.RUN)

    assert kind_of(end) == kind


def test_a_run_timeout_names_what_the_agent_was_retrying() -> None:
    turn = TurnFacts(deadline_passed=DueKind.RUN)

    end = judge(turn, ProcessEnd(exit_code=None, retry="attempt 8 failed with status 401"))

    assert end == Failed(
        RunError(
            code="RUN_TIMEOUT",
            message="The run took longer than its engine allows."
            " Its agent was retrying: attempt 8 failed with status 401.",
        )
    )


BROKE = RunError(code=ErrorCode.SESSION_RESUME_FAILED, message="The agent failed: gone.")


@pytest.mark.parametrize("exit_code", [0, 1, None])
@pytest.mark.parametrize("said", [ASKED, SUCCEEDED, None])
def test_a_failure_that_the_engine_reports_precedes_its_final_message(
    said: Asked | Succeeded | None, exit_code: int | None
) -> None:
    assert outcome(last_word=said, exit_code=exit_code, failure=BROKE) == Failed(BROKE)


def test_a_failure_that_the_engine_reports_does_not_hide_a_run_timeout() -> None:
    end = outcome(failure=BROKE, deadline_passed=DueKind.RUN)

    assert code_of(end) == ErrorCode.RUN_TIMEOUT


@pytest.mark.parametrize("in_wait", [False, True])
def test_a_turn_that_its_shim_killed_was_interrupted_whatever_its_exit_code(
    *, in_wait: bool
) -> None:
    end = outcome(exit_code=-9, is_waiting=in_wait, interrupted="stood still")

    assert end == Interrupted("stood still")


@pytest.mark.parametrize(
    ("in_wait", "code"),
    [(False, ErrorCode.SUPERVISION_LOST), (True, ErrorCode.INTERACTION_PROCESS_LOST)],
)
def test_a_process_without_its_shim_fails_the_turn(*, in_wait: bool, code: ErrorCode) -> None:
    end = outcome(exit_code=None, is_waiting=in_wait, is_unsupervised=True)

    assert code_of(end) == code


def test_a_process_without_its_shim_interrupts_a_run_that_is_resumed() -> None:
    end = outcome(exit_code=None, is_unsupervised=True, resumes=True)

    assert end == Interrupted(
        "The shim that guarded the process was killed or stopped, so the process was ended.",
        InterruptionCause.SHIM_LOST,
    )
    assert kind_of(
        outcome(exit_code=None, is_unsupervised=True, is_waiting=True, resumes=True)
    ) == ("INTERACTION_PROCESS_LOST")


def test_failures_have_this_order_of_precedence() -> None:
    everything: dict[str, Any] = {
        "protocol_error": "no JSON", "deadline_passed": DueKind.WAIT, "interrupted": "stood still",
        "is_waiting": True, "is_unsupervised": True, "exit_code": 3, "stderr_tail": "boom",
    }  # fmt: skip
    nothing: dict[str, Any] = {
        "protocol_error": None, "deadline_passed": None, "interrupted": None, "is_waiting": False,
        "is_unsupervised": False, "exit_code": 0,
    }  # fmt: skip

    order = [kind_of(outcome(**everything))]
    for name, value in nothing.items():
        everything[name] = value
        order.append(kind_of(outcome(**everything)))

    assert order == [
        "ENGINE_PROTOCOL_ERROR", "INTERACTION_WAIT_TIMEOUT", "Interrupted",
        "INTERACTION_PROCESS_LOST", "SUPERVISION_LOST", "ENGINE_FAILED", "Succeeded",
    ]  # fmt: skip


@given(TURNS, ENDS)
def test_every_observation_has_one_outcome_and_success_needs_a_clean_end(
    turn: TurnFacts, process: ProcessEnd
) -> None:
    end = judge(turn, process)

    if isinstance(end, Failed):
        assert end.error.code in set(ErrorCode)
        assert end.error.message
    elif isinstance(end, Interrupted):
        assert end.because == turn.interrupted
        assert (turn.protocol_error, turn.deadline_passed) == (None, None)
    else:
        assert end is turn.last_word
        assert turn.protocol_error is None
        assert process.exit_code in {None, 0}
        in_time = turn.deadline_passed is None
        assert in_time or (turn.deadline_passed is DueKind.RUN and isinstance(end, Succeeded))
        assert not in_time or not any((turn.is_waiting, turn.is_unsupervised, turn.interrupted))
