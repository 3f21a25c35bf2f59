"""How a turn ended is judged from what was seen of its process."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.domain.run import ErrorCode, InteractionKind, Question
from runrecovery_service.domain.turn import Asked, Failed, Observed, Succeeded, TurnEnd, judge

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
)


def code_of(end: TurnEnd) -> str:
    assert isinstance(end, Failed)
    return end.error.code


@pytest.mark.parametrize("said", [ASKED, SUCCEEDED])
@pytest.mark.parametrize("exit_code", [0, None], ids=["ended", "lingered"])
def test_a_process_is_taken_at_its_last_word(said: Asked | Succeeded, exit_code: int) -> None:
    assert said == judge(replace(WELL, said=said, exit_code=exit_code))


@pytest.mark.parametrize("exit_code", [1, 255, -9])
def test_a_bad_exit_fails_whatever_was_said(exit_code: int) -> None:
    assert code_of(judge(replace(WELL, exit_code=exit_code))) == ErrorCode.ENGINE_FAILED


def test_saying_nothing_fails() -> None:
    assert code_of(judge(replace(WELL, said=None))) == ErrorCode.ENGINE_FAILED


def test_closing_the_output_without_a_word_and_living_on_breaks_the_protocol() -> None:
    end = judge(replace(WELL, said=None, exit_code=None))

    assert code_of(end) == ErrorCode.ENGINE_PROTOCOL_ERROR


def test_ending_while_the_user_is_waited_for_loses_the_process() -> None:
    end = judge(replace(WELL, said=ASKED, in_wait=True))

    assert code_of(end) == ErrorCode.INTERACTION_PROCESS_LOST


def test_a_broken_protocol_is_told_before_all_else() -> None:
    end = judge(replace(WELL, broken="line 3 is no JSON", in_wait=True, exit_code=-9))

    assert isinstance(end, Failed)
    assert (end.error.code, end.error.message) == ("ENGINE_PROTOCOL_ERROR", "line 3 is no JSON")


def test_the_signal_and_the_last_lines_are_in_the_message() -> None:
    end = judge(replace(WELL, exit_code=-11, stderr_tail="boom"))

    assert isinstance(end, Failed)
    assert "signal 11" in end.error.message
    assert end.error.message.endswith(": boom")


@given(SEEN)
def test_every_end_has_one_judgement_and_success_needs_a_clean_one(seen: Observed) -> None:
    end = judge(seen)

    if isinstance(end, Failed):
        assert end.error.code in set(ErrorCode)
        assert end.error.message
    else:
        assert end is seen.said
        assert seen.broken is None
        assert seen.exit_code in {None, 0}
        assert not seen.in_wait
