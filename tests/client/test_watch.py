"""Watching runs and decisions, through whatever happens to the streams."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import runrecovery as rr
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st
from runrecovery import _streams
from runrecovery._silence import SilenceTimeout
from runrecovery._streams import Reconnection, RecoveredWatch, RunWatch
from runrecovery.v1 import recovery_service_pb2, run_pb2, run_service_pb2
from support.scripted_server import Fail, ScriptedServer, Stream

if TYPE_CHECKING:
    from client.conftest import Caller

Update = run_service_pb2.WatchRunResponse
Decision = recovery_service_pb2.WatchRecoveredResponse
Fault = Callable[[Sequence[Any]], "Stream"]

BOOKMARK = run_pb2.WatchBookmark()
BEFORE = 3  # events that had happened when the watch began
EVENTS = 8


def _event(sequence: int) -> Update:
    return Update(sequence=sequence, event=run_pb2.RunEvent(kind=run_pb2.RUN_EVENT_KIND_ASKED))


def _snapshot(sequence: int) -> Update:
    return Update(sequence=sequence, snapshot=run_pb2.Run(run_id="r"))


def _bookmark(sequence: int) -> Update:
    return Update(sequence=sequence, bookmark=BOOKMARK)


def _decision(place: int) -> Decision:
    return Decision(
        cursor=f"c{place}", decision=recovery_service_pb2.RecoveredRun(run_id=f"r{place}")
    )


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Recorded:
    """The service's record of events: answers every watch from it, and breaks streams as told.

    Once it has no fault left, a stream tells all that there is and ends well.
    """

    def __init__(self, *faults: Fault) -> None:
        self.opened = threading.Event()
        self._faults = list(faults)

    def run(self, request: run_service_pb2.WatchRunRequest, _context: object) -> Stream:
        known = request.after_sequence if request.HasField("after_sequence") else None
        begin = [_snapshot(BEFORE)] if known is None else []
        after = BEFORE if known is None else known
        return self._answer([*begin, *map(_event, range(after + 1, EVENTS + 1))])

    def decisions(
        self, request: recovery_service_pb2.WatchRecoveredRequest, _context: object
    ) -> Stream:
        place = int(request.after_cursor[1:] or BEFORE)
        begin = Decision(cursor=f"c{place}", bookmark=BOOKMARK)
        return self._answer([begin, *map(_decision, range(place + 1, EVENTS + 1))])

    def _answer(self, messages: Sequence[Any]) -> Stream:
        self.opened.set()
        return self._faults.pop(0)(messages) if self._faults else Stream(messages)


@pytest.fixture
def gone() -> Fail:
    return Fail(code=grpc.StatusCode.UNAVAILABLE, reason="SHUTTING_DOWN")


@pytest.fixture
def faults(gone: Fail) -> dict[str, Fault]:
    """Ways to break a stream, by name."""
    slow = Fail(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="SLOW_READER")
    full = Fail(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="OVERLOADED")
    recovering = Fail(code=grpc.StatusCode.UNAVAILABLE, reason="RECONCILIATION_IN_PROGRESS")
    cancelled = Fail(code=grpc.StatusCode.CANCELLED)
    return {
        "nothing": lambda _: Stream([], then=gone),
        "recovering": lambda _: Stream([], then=recovering),
        "full": lambda _: Stream([], then=full),
        "broken": lambda told: Stream(told[:2], then=gone),
        "cancelled": lambda told: Stream(told[:2], then=cancelled),
        "slow": lambda told: Stream(told[:2], then=slow),
        "doubled": lambda told: Stream([m for m in told[:3] for _ in "ab"], then=gone),
        "repeated": lambda told: Stream([*told[:3], *told[:3]], then=gone),
        "silent": lambda told: Stream(told[:2], hold=True),
    }


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses before each reopening, which no test sits out."""
    asked: list[float] = []
    really = Reconnection.pause_s

    def at_once(self: Reconnection, failure: _streams.Broken) -> float:
        asked.append(really(self, failure))
        return 0.0

    monkeypatch.setattr(Reconnection, "pause_s", at_once)
    return asked


def _sequences(updates: Sequence[Update]) -> list[tuple[str | None, int]]:
    return [(update.WhichOneof("update"), update.sequence) for update in updates]


FROM_A_SNAPSHOT = [("snapshot", BEFORE), *(("event", n) for n in range(BEFORE + 1, EVENTS + 1))]
FAULTS = [
    "nothing",
    "recovering",
    "full",
    "broken",
    "cancelled",
    "slow",
    "doubled",
    "repeated",
    "silent",
]
FEWER = ["broken", "cancelled", "doubled", "recovering", "slow"]


@pytest.mark.parametrize("names", [[], *([name] for name in FAULTS), FAULTS], ids="-".join)
async def test_tells_a_snapshot_and_every_event_once_through_every_break(
    names: list[str],
    caller: Caller,
    server: ScriptedServer,
    faults: dict[str, Fault],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_streams, "SILENCE_S", 0.3)
    server.on("WatchRun", Recorded(*(faults[name] for name in names)).run)

    updates = await caller.collect("runs.watch", "r")

    assert _sequences(updates) == FROM_A_SNAPSHOT
    assert len(server.asked("WatchRun")) > len(names)


@pytest.mark.parametrize("after", [0, BEFORE, EVENTS])
async def test_begins_after_the_sequence_that_the_caller_knows(
    after: int,
    caller: Caller,
    server: ScriptedServer,
    faults: dict[str, Fault],
) -> None:
    server.on("WatchRun", Recorded(faults["nothing"]).run)

    updates = await caller.collect("runs.watch", "r", after_sequence=after)

    asked = server.asked("WatchRun")
    assert _sequences(updates) == [("event", n) for n in range(after + 1, EVENTS + 1)]
    assert [(a.HasField("after_sequence"), a.after_sequence) for a in asked] == [(True, after)] * 2


async def test_asks_without_a_sequence_until_there_is_a_snapshot_and_then_for_what_follows_it(
    caller: Caller, server: ScriptedServer, gone: Fail
) -> None:
    server.on(
        "WatchRun",
        Stream([_bookmark(9)], then=gone),  # it has not told where the run stands
        Stream([_snapshot(9)], then=gone),
        Stream([_bookmark(9)]),
    )

    await caller.collect("runs.watch", "r")

    asked = server.asked("WatchRun")
    assert [a.HasField("after_sequence") for a in asked] == [False, False, True]
    assert (asked[2].run_id, asked[2].after_sequence) == ("r", 9)


async def test_goes_on_after_the_server_has_been_restarted(
    caller: Caller, server: ScriptedServer, gone: Fail
) -> None:
    recorded = Recorded(lambda told: Stream(told[:2], hold=True, then=gone))
    server.on("WatchRun", recorded.run)
    target = caller.target
    watching = asyncio.create_task(caller.collect("runs.watch", "r"))
    assert await asyncio.to_thread(recorded.opened.wait, 10)

    server.stop()
    server.start(target)

    assert _sequences(await watching) == FROM_A_SNAPSHOT


async def test_an_event_that_one_stream_left_out_is_told_by_the_next(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    recorded = Recorded(lambda told: Stream([*told[:2], *told[3:]]))
    server.on("WatchRun", recorded.run)

    updates = await caller.collect("runs.watch", "r")

    assert _sequences(updates) == FROM_A_SNAPSHOT
    assert server.asked("WatchRun")[1].after_sequence == BEFORE + 1


@pytest.mark.parametrize("later", [_event(6), _bookmark(5), _snapshot(5)], ids=["e", "b", "s"])
async def test_a_gap_that_stays_is_an_error(
    later: Update,
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", Stream([_snapshot(3), _event(4), later]), Stream([later]))

    with pytest.raises(rr.WatchGap, match="after 4"):
        await caller.collect("runs.watch", "r")

    assert len(server.asked("WatchRun")) == 2


async def test_a_watch_that_does_not_begin_with_a_snapshot_is_an_error(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", Stream([_event(4)]))

    with pytest.raises(rr.WatchGap, match="snapshot"):
        await caller.collect("runs.watch", "r")


@pytest.mark.parametrize(
    ("reason", "kind", "metadata", "told"),
    [
        ("WATCH_HISTORY_PRUNED", rr.WatchHistoryPruned, {"oldest_sequence": "7"}, 7),
        ("WATCH_SEQUENCE_UNKNOWN", rr.WatchSequenceUnknown, {"latest_sequence": "2"}, 2),
        ("WATCH_SEQUENCE_UNKNOWN", rr.WatchSequenceUnknown, {}, None),
    ],
)
async def test_a_place_that_the_service_does_not_have_is_an_error_that_tells_what_it_has(
    reason: str,
    kind: type[rr.RunRecoveryClientError],
    metadata: dict[str, str],
    told: int | None,
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", Fail(code=grpc.StatusCode.OUT_OF_RANGE, reason=reason, metadata=metadata))

    with pytest.raises(kind) as raised:
        await caller.collect("runs.watch", "r", after_sequence=4)

    error = raised.value
    assert isinstance(error, rr.WatchHistoryPruned | rr.WatchSequenceUnknown)
    found = (
        error.oldest_sequence if isinstance(error, rr.WatchHistoryPruned) else error.latest_sequence
    )
    assert found == told
    assert len(server.asked("WatchRun")) == 1


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND", rr.RunNotFound),
        (grpc.StatusCode.INTERNAL, "INTERNAL", rr.InternalError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "", rr.ResourceExhausted),
    ],
)
async def test_another_error_ends_the_watch(
    code: grpc.StatusCode,
    reason: str,
    kind: type[rr.RunRecoveryClientError],
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", Stream([_snapshot(1)], then=Fail(code=code, reason=reason)))

    with pytest.raises(kind):
        await caller.collect("runs.watch", "r")

    assert len(server.asked("WatchRun")) == 1


async def test_pauses_at_least_as_long_as_the_service_asks_for(
    caller: Caller,
    server: ScriptedServer,
    pauses: list[float],
) -> None:
    retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=7))
    recovering = Fail(
        code=grpc.StatusCode.UNAVAILABLE, reason="RECONCILIATION_IN_PROGRESS", more=[retry]
    )
    server.on("WatchRun", recovering, recovering, Stream([_snapshot(1)]))

    await caller.collect("runs.watch", "r")

    assert [7 <= pause <= 7.4 for pause in pauses] == [True, True]


@pytest.mark.parametrize(
    ("method", "name", "args"),
    [
        ("WatchRun", "runs.watch", ("r",)),
        ("WatchRecovered", "recovery.watch_recovered", ()),
        ("StreamOutput", "runs.output", ("r",)),
    ],
)
async def test_grpc_itself_does_not_repeat_a_stream(
    method: str,
    name: str,
    args: tuple[str, ...],
    caller: Caller,
    server: ScriptedServer,
) -> None:
    # gRPC's own retry would obey this pushback.
    server.on(method, Fail(code=grpc.StatusCode.UNAVAILABLE, reason="X", pushback_ms="1"))

    with pytest.raises(rr.Unavailable):
        await caller.collect(name, *args, reconnect_s=0)

    assert len(server.asked(method)) == 1


async def test_raises_the_last_failure_when_an_outage_has_lasted_too_long(
    caller: Caller,
    server: ScriptedServer,
    gone: Fail,
) -> None:
    storage = Fail(code=grpc.StatusCode.UNAVAILABLE, reason="STORAGE_UNAVAILABLE")
    server.on("WatchRun", Stream([_snapshot(1)], then=gone), gone, storage)

    with pytest.raises(rr.Unavailable) as raised:
        await caller.collect("runs.watch", "r", reconnect_s=0.3)

    assert raised.value.reason == "STORAGE_UNAVAILABLE"


async def test_ends_at_the_callers_deadline(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", Stream([_snapshot(1)], hold=True))

    with pytest.raises(rr.DeadlineExceeded):
        await caller.collect("runs.watch", "r", timeout_s=0.3)


async def test_gives_bookmarks_to_those_who_want_them(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", Stream([_snapshot(3), _bookmark(3), _event(4)]))

    quietly = await caller.collect("runs.watch", "r")
    fully = await caller.collect("runs.watch", "r", include_bookmarks=True)

    assert _sequences(quietly) == [("snapshot", 3), ("event", 4)]
    assert _sequences(fully) == [("snapshot", 3), ("bookmark", 3), ("event", 4)]


def _guards() -> Iterator[threading.Thread]:
    return (thread for thread in threading.enumerate() if thread.name == "runrecovery-silence")


def test_a_watch_whose_channel_the_caller_closes_is_not_resumed(
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", Stream([_snapshot(3), _event(4)], hold=True))
    client = rr.RunRecoveryClient(server.start())
    watch = client.runs.watch("r")
    next(watch)
    threading.Thread(target=client.close).start()

    with pytest.raises(rr.UnrecognizedError):
        list(watch)

    assert len(server.asked("WatchRun")) == 1


@pytest.mark.parametrize("explicitly", [True, False])
async def test_leaving_early_ends_the_call_and_leaves_nothing_behind(
    explicitly: bool,  # noqa: FBT001 - a parameter of the test
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", Stream([_snapshot(3), _event(4)], hold=True))
    tasks = asyncio.all_tasks()

    if not explicitly:
        await caller.collect("runs.watch", "r", limit=1)
    elif isinstance(caller.client, rr.RunRecoveryClient):
        watch = caller.client.runs.watch("r")
        await asyncio.to_thread(next, watch)
        assert len(list(_guards())) == 1
        watch.close()
    else:
        updates = caller.client.runs.watch("r")
        await anext(updates)
        await updates.aclose()
        await asyncio.wait_for(asyncio.gather(*(asyncio.all_tasks() - tasks)), 10)

    assert await asyncio.to_thread(server.left.wait, 10)
    for thread in _guards():
        await asyncio.to_thread(thread.join, 10)
    assert list(_guards()) == []


def test_only_the_time_that_a_reader_waits_counts_as_silence(clock: Clock) -> None:
    left: list[float] = []

    def slowly() -> Iterator[Update]:
        for sequence in (1, 2):
            clock.now += 44  # the reader waits
            left.append(silence._left_s())
            yield _event(sequence)

    silence = SilenceTimeout(45, lambda: None, clock=clock)
    for _ in silence.watch(slowly()):
        clock.now += 3600  # the caller takes its time
        left.append(silence._left_s())
    silence.stop()

    assert left == [1, 45, 1, 45]


# -- decisions ---------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [[], *([name] for name in FAULTS), FAULTS], ids="-".join)
async def test_tells_every_decision_once_through_every_break(
    names: list[str],
    caller: Caller,
    server: ScriptedServer,
    faults: dict[str, Fault],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_streams, "SILENCE_S", 0.3)
    # An opaque cursor has no order: only an immediate repetition can be told from news.
    chosen = [faults["doubled" if name == "repeated" else name] for name in names]
    server.on("WatchRecovered", Recorded(*chosen).decisions)

    told = await caller.collect("recovery.watch_recovered", after_cursor="c3")

    assert [response.decision.run_id for response in told] == ["r4", "r5", "r6", "r7", "r8"]


async def test_goes_on_from_the_cursor_of_a_bookmark(
    caller: Caller, server: ScriptedServer, gone: Fail
) -> None:
    passed = Decision(cursor="c9", bookmark=BOOKMARK)  # by decisions that do not match
    server.on("WatchRecovered", gone, Stream([passed], then=gone), Stream([_decision(10)]))

    told = await caller.collect("recovery.watch_recovered")
    with_bookmarks = await caller.collect("recovery.watch_recovered", include_bookmarks=True)

    asked = [request.after_cursor for request in server.asked("WatchRecovered")]
    assert asked == ["", "", "c9", ""]
    assert told == with_bookmarks == [_decision(10)]


async def test_gives_the_first_cursor_to_those_who_want_bookmarks(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    first = Decision(cursor="c0", bookmark=BOOKMARK)
    server.on("WatchRecovered", Stream([first, _decision(1)]))

    told = await caller.collect("recovery.watch_recovered", include_bookmarks=True)

    assert told == [first, _decision(1)]


async def test_watches_decisions_by_every_filter(
    caller: Caller, server: ScriptedServer, gone: Fail
) -> None:
    server.on("WatchRecovered", gone, Stream([]))

    await caller.collect(
        "recovery.watch_recovered",
        recovery_states=iter([rr.RecoveryState.RECOVERY_STATE_FAILED_RECONCILED]),
        recovery_reason="rule",
        engine="demo",
        labels={"team": "x"},
        reconciliation_id="id",
        after_cursor="c",
    )

    first, second = server.asked("WatchRecovered")
    assert first == second
    assert first == recovery_service_pb2.WatchRecoveredRequest(
        filter=recovery_service_pb2.RecoveredFilter(
            recovery_states=[run_pb2.RECOVERY_STATE_FAILED_RECONCILED],
            recovery_reason="rule",
            engine="demo",
            labels={"team": "x"},
            reconciliation_id="id",
        ),
        after_cursor="c",
    )


async def test_a_cursor_of_elsewhere_is_an_error(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    foreign = Fail(code=grpc.StatusCode.INVALID_ARGUMENT, reason="WATCH_CURSOR_INVALID")
    server.on("WatchRecovered", foreign)

    with pytest.raises(rr.WatchCursorInvalid):
        await caller.collect("recovery.watch_recovered", after_cursor="x")

    assert len(server.asked("WatchRecovered")) == 1


# -- without I/O -------------------------------------------------------------------------------

messages = st.builds(
    lambda make, sequence: make(sequence),
    st.sampled_from([_event, _event, _event, _bookmark, _snapshot]),
    st.integers(0, 6),
)


@given(told=st.lists(messages, max_size=60), after=st.none() | st.integers(0, 3))
def test_whatever_a_service_tells_the_caller_gets_each_event_once_and_none_is_missing(
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
    assert _sequences(given_out[start:]) == [
        ("event", first + number + 1) for number in range(len(given_out) - start)
    ]


def test_an_update_of_a_newer_service_has_its_place_in_the_sequence() -> None:
    watch = RunWatch(
        "r",
        Reconnection(reconnect_s=None, timeout_s=None),
        after_sequence=1,
        include_bookmarks=False,
    )

    assert [watch.accept(Update(sequence=2)), watch.accept(_event(3))] == [True, True]


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
def test_a_stream_that_has_proved_itself_begins_the_pauses_anew(
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


def test_an_outage_is_measured_from_its_first_failure_and_ends_with_a_sign_of_life(
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


def test_an_outage_lasts_for_ever_unless_it_is_limited(clock: Clock) -> None:
    reconnection = Reconnection(reconnect_s=None, timeout_s=None, clock=clock)
    for _ in range(1000):
        reconnection.pause_s(GONE)
        clock.now += 86_400


def test_decisions_without_a_cursor_are_not_lost(pauses: list[float]) -> None:
    watch = RecoveredWatch(
        recovery_service_pb2.RecoveredFilter(),
        Reconnection(reconnect_s=None, timeout_s=None),
        after_cursor="",
        include_bookmarks=False,
    )
    bare = Decision(decision=recovery_service_pb2.RecoveredRun(run_id="r"))

    assert watch.accept(bare)
