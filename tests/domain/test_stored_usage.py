"""What a turn has used, by its agent's report or by its session file."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from runrecovery_service.domain.usage import (
    SessionUsage,
    StoredUsage,
    TurnUsage,
    Usage,
    at_end_of_turn,
)


def tokens(count: int) -> Usage:
    return Usage(input_tokens=10 * count, output_tokens=count)


FILE: Final = StoredUsage(calls=tokens(5))


def test_a_killed_first_turn_has_every_call_of_its_session() -> None:
    assert at_end_of_turn(None, FILE, before=None, is_first=True) == TurnUsage(
        turn=tokens(5), session=SessionUsage(stored=tokens(5))
    )


def test_a_later_killed_turn_has_the_calls_that_the_session_has_gained() -> None:
    before = SessionUsage(stored=tokens(3))

    assert at_end_of_turn(None, FILE, before=before, is_first=False) == TurnUsage(
        turn=tokens(2), session=SessionUsage(stored=tokens(5))
    )


def test_a_turn_that_is_counted_again_has_no_further_call() -> None:
    before = SessionUsage(stored=tokens(5))

    used = at_end_of_turn(None, FILE, before=before, is_first=False)

    assert used == TurnUsage(turn=Usage(), session=SessionUsage(stored=tokens(5)))
    assert used.is_of_session


def test_a_report_counts_as_it_is_and_the_next_turn_begins_after_it() -> None:
    reported = TurnUsage(turn=tokens(4), session=SessionUsage(total=tokens(9), stored=tokens(1)))

    assert at_end_of_turn(reported, FILE, before=None, is_first=True) == TurnUsage(
        turn=tokens(4), session=SessionUsage(total=tokens(9), stored=tokens(5))
    )


def test_a_later_turn_of_a_session_that_was_not_known_has_no_call() -> None:
    for before in (None, SessionUsage(total=tokens(2))):
        used = at_end_of_turn(None, FILE, before=before, is_first=False)

        assert used is not None
        assert used.turn == Usage()
        assert used.session is not None
        assert used.session.stored == tokens(5)


def test_a_session_that_has_lost_calls_counts_nothing() -> None:
    before = SessionUsage(stored=tokens(6))

    used = at_end_of_turn(None, FILE, before=before, is_first=False)

    assert used == TurnUsage(turn=Usage(), session=SessionUsage(stored=tokens(5)))


def test_after_a_session_that_cannot_be_read_the_next_killed_turn_counts_nothing() -> None:
    assert at_end_of_turn(None, None, before=None, is_first=True) is None
    before = SessionUsage(total=tokens(2), stored=tokens(3))
    forgotten = SessionUsage(total=tokens(2))

    assert at_end_of_turn(None, None, before=before, is_first=False) == TurnUsage(
        turn=Usage(), session=forgotten
    )
    assert at_end_of_turn(TurnUsage(turn=tokens(1)), None, before=before, is_first=False) == (
        TurnUsage(turn=tokens(1), session=forgotten)
    )
    used = at_end_of_turn(None, FILE, before=forgotten, is_first=False)
    assert used is not None
    assert used.turn == Usage()


def test_the_next_process_adds_to_the_total_in_the_file_not_to_all_calls() -> None:
    stored = StoredUsage(calls=tokens(5), total=tokens(4))
    before = SessionUsage(total=tokens(3), stored=tokens(3))

    used = at_end_of_turn(None, stored, before=before, is_first=False)

    assert used is not None
    assert used.turn == tokens(2)
    assert used.session == SessionUsage(total=tokens(4), stored=tokens(5))
    assert used.session.since(tokens(6)) == tokens(2)


def test_a_total_that_was_reported_stays_if_the_file_has_none() -> None:
    before = SessionUsage(total=tokens(3), stored=tokens(3))

    used = at_end_of_turn(None, FILE, before=before, is_first=False)

    assert used is not None
    assert used.session == SessionUsage(total=tokens(3), stored=tokens(5))


class TestOfReportedCalls:
    """A CLI that has reported calls of a killed turn, and no total."""

    REPORTED: Final = TurnUsage(turn=tokens(2), session=SessionUsage(calls=tokens(2)))
    OPEN: Final = StoredUsage(calls=tokens(5), is_open=True)

    def test_the_calls_that_the_session_has_gained_replace_those_that_were_reported(self) -> None:
        used = at_end_of_turn(self.REPORTED, self.OPEN, before=None, is_first=True)

        calls = SessionUsage(calls=tokens(5), stored=tokens(5))
        assert used == TurnUsage(turn=tokens(5), session=calls)

    def test_the_calls_that_were_reported_count_if_the_session_has_fewer(self) -> None:
        before = SessionUsage(calls=tokens(3), stored=tokens(4))
        reported = TurnUsage(turn=tokens(2), session=before.plus_calls(tokens(2)))

        used = at_end_of_turn(reported, self.OPEN, before=before, is_first=False)

        calls = SessionUsage(calls=tokens(5), stored=tokens(5))
        assert used == TurnUsage(turn=tokens(2), session=calls)

    def test_a_total_counts_as_it_is_whatever_the_session_has_gained(self) -> None:
        reported = TurnUsage(turn=tokens(2), session=SessionUsage(total=tokens(2)))

        used = at_end_of_turn(reported, self.OPEN, before=None, is_first=True)

        total = SessionUsage(total=tokens(2), stored=tokens(5))
        assert used == TurnUsage(turn=tokens(2), session=total)

    def test_the_next_total_may_have_the_calls_of_a_killed_turn_or_not(self) -> None:
        before = SessionUsage(total=tokens(1), stored=tokens(1))
        killed = at_end_of_turn(None, self.OPEN, before=before, is_first=False)
        assert killed is not None
        assert killed.session is not None
        assert (killed.turn, killed.session.calls) == (tokens(4), tokens(4))

        for total in (tokens(1 + 4 + 3), tokens(1 + 3)):
            assert killed.session.since(total, at_least=tokens(3)) == tokens(3)

    def test_a_killed_turn_without_a_call_has_no_usage_whatever_model_the_session_names(
        self,
    ) -> None:
        named = replace(tokens(5), model="m")
        stored = StoredUsage(calls=named, is_open=True)
        before = SessionUsage(stored=named)

        used = at_end_of_turn(None, stored, before=before, is_first=False)

        assert used is not None
        assert used.is_of_session
        assert used.session == before
