"""The pure parts of a watch: when it reconnects or gives up, and which messages it returns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import runrecovery as rr
from hypothesis import given
from hypothesis import strategies as st
from runrecovery._silence import SilenceTimeout
from runrecovery._streams import Reconnection, RecoveredWatch, RunWatch
from runrecovery.v1 import recovery_service_pb2
from support.scripted_watches import (
    Decision,
    Update,
    bookmark,
    event,
    kinds_and_sequences,
    snapshot,
)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_only_the_time_that_a_reader_waits_counts_as_silence(clock: Clock) -> None:
    left: list[float] = []

    def slowly() -> Iterator[Update]:
        for sequence in (1, 2):
            clock.now += 44  # the reader waits
            left.append(silence._left_s())
            yield event(sequence)

    silence = SilenceTimeout(45, lambda: None, clock=clock)
    for _ in silence.watch(slowly()):
        clock.now += 3600  # the caller takes its time
        left.append(silence._left_s())
    silence.stop()

    assert left == [1, 45, 1, 45]


messages = st.builds(
    lambda make, sequence: make(sequence),
    st.sampled_from([event, event, event, bookmark, snapshot]),
    st.integers(0, 6),
)


@given(told=st.lists(messages, max_size=60), after=st.none() | st.integers(0, 3))
def test_whatever_a_service_sends_the_caller_gets_each_event_once_and_without_a_gap(
    told: list[Update], after: int | None
) -> None:
    reconnection = Reconnection(reconnect_s=None, timeout_s=None)
    watch = RunWatch("r", reconnection, after_sequence=after, include_bookmarks=False)
    given_out: list[Update] = []
    for message in told:
        try:
            if watch.accept(message):
                given_out.append(message)
        except rr.Unavailable:  # reopened: what follows comes in another stream
            continue
        except rr.WatchGap:
            break

    start = 0 if after is not None or not given_out else 1
    if start:
        assert given_out[0].HasField("snapshot")
    first = after if after is not None else (given_out[0].sequence if given_out else 0)
    assert kinds_and_sequences(given_out[start:]) == [
        ("event", first + number + 1) for number in range(len(given_out) - start)
    ]


def test_an_update_of_an_unknown_kind_counts_in_the_sequence() -> None:
    watch = RunWatch(
        "r",
        Reconnection(reconnect_s=None, timeout_s=None),
        after_sequence=1,
        include_bookmarks=False,
    )

    assert [watch.accept(Update(sequence=2)), watch.accept(event(3))] == [True, True]


GONE = rr.Unavailable("gone")


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_pauses_are_drawn_from_zero_to_a_ceiling_that_doubles_up_to_5_s(
    share: float, pauses: list[float]
) -> None:
    reconnection = Reconnection(
        reconnect_s=None, timeout_s=None, uniform=lambda low, high: low + share * (high - low)
    )

    for _ in range(8):
        reconnection.pause_s(GONE)

    ceilings = [0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0, 5.0]
    assert pauses == pytest.approx([share * ceiling for ceiling in ceilings])


@pytest.mark.parametrize(
    ("news", "lived_s", "pause"), [(True, 0, 0.2), (False, 1, 5.0), (False, 5, 0.2)]
)
def test_a_stream_with_news_or_of_5_s_resets_the_pauses(
    news: bool,  # noqa: FBT001 - a parameter of the test
    lived_s: float,
    pause: float,
    clock: Clock,
    pauses: list[float],
) -> None:
    reconnection = Reconnection(reconnect_s=None, timeout_s=None, clock=clock, uniform=max)
    for _ in range(9):
        reconnection.pause_s(GONE)

    reconnection.open()
    clock.now += lived_s
    reconnection.record_message(news=news)
    reconnection.pause_s(GONE)

    assert pauses[-1] == pause


def test_an_outage_lasts_from_its_first_failure_to_the_next_message(
    clock: Clock,
) -> None:
    reconnection = Reconnection(reconnect_s=60, timeout_s=None, clock=clock)
    clock.now = 3600.0  # of quiet
    reconnection.pause_s(GONE)
    clock.now += 59
    reconnection.pause_s(GONE)
    reconnection.record_message(news=False)
    clock.now += 59
    reconnection.pause_s(GONE)

    clock.now += 60
    with pytest.raises(rr.Unavailable) as raised:
        reconnection.pause_s(GONE)

    assert raised.value is GONE


def test_an_outage_may_last_forever_without_a_limit(clock: Clock) -> None:
    reconnection = Reconnection(reconnect_s=None, timeout_s=None, clock=clock)
    for _ in range(1000):
        reconnection.pause_s(GONE)
        clock.now += 86_400


def test_a_decision_without_a_cursor_is_returned(pauses: list[float]) -> None:
    watch = RecoveredWatch(
        recovery_service_pb2.RecoveredFilter(),
        Reconnection(reconnect_s=None, timeout_s=None),
        after_cursor="",
        include_bookmarks=False,
    )
    bare = Decision(decision=recovery_service_pb2.RecoveredRun(run_id="r"))

    assert watch.accept(bare)
