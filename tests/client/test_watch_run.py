"""A watch of a run returns each event once, however its streams end."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import grpc
import pytest
import runrecovery as rr
from google.protobuf import duration_pb2
from google.rpc import error_details_pb2
from runrecovery import _streams
from support.scripted_server import Fail, ScriptedServer, Stream
from support.scripted_watches import (
    BEFORE,
    EVENTS,
    FAULT_LISTS,
    FAULTS,
    GONE,
    RecordedEvents,
    Update,
    bookmark,
    event,
    kinds_and_sequences,
    snapshot,
)

if TYPE_CHECKING:
    from client.conftest import Caller

pytestmark = pytest.mark.usefixtures("pauses")

FROM_A_SNAPSHOT = [("snapshot", BEFORE), *(("event", n) for n in range(BEFORE + 1, EVENTS + 1))]


@pytest.mark.parametrize("names", FAULT_LISTS, ids="-".join)
async def test_watch_returns_the_snapshot_and_each_event_once_through_every_break(
    names: list[str],
    caller: Caller,
    server: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_streams, "SILENCE_S", 0.3)
    server.on("WatchRun", RecordedEvents(*(FAULTS[name] for name in names)).watch_run)

    updates = await caller.collect("runs.watch", "r")

    assert kinds_and_sequences(updates) == FROM_A_SNAPSHOT
    assert len(server.asked("WatchRun")) > len(names)


@pytest.mark.parametrize("after", [0, BEFORE, EVENTS])
async def test_watch_begins_after_the_sequence_that_the_caller_gives(
    after: int,
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", RecordedEvents(FAULTS["nothing"]).watch_run)

    updates = await caller.collect("runs.watch", "r", after_sequence=after)

    asked = server.asked("WatchRun")
    assert kinds_and_sequences(updates) == [("event", n) for n in range(after + 1, EVENTS + 1)]
    assert [(a.HasField("after_sequence"), a.after_sequence) for a in asked] == [(True, after)] * 2


async def test_watch_reconnects_after_the_sequence_of_the_snapshot_once_it_has_one(
    caller: Caller, server: ScriptedServer
) -> None:
    server.on(
        "WatchRun",
        Stream([bookmark(9)], then=GONE),  # no snapshot yet
        Stream([snapshot(9)], then=GONE),
        Stream([bookmark(9)]),
    )

    await caller.collect("runs.watch", "r")

    asked = server.asked("WatchRun")
    assert [a.HasField("after_sequence") for a in asked] == [False, False, True]
    assert (asked[2].run_id, asked[2].after_sequence) == ("r", 9)


async def test_watch_continues_after_a_restart_of_the_server(
    caller: Caller, server: ScriptedServer
) -> None:
    recorded = RecordedEvents(lambda sent: Stream(sent[:2], hold=True, then=GONE))
    server.on("WatchRun", recorded.watch_run)
    target = caller.target
    watching = asyncio.create_task(caller.collect("runs.watch", "r"))
    assert await asyncio.to_thread(recorded.opened.wait, 10)

    server.stop()
    server.start(target)

    assert kinds_and_sequences(await watching) == FROM_A_SNAPSHOT


async def test_an_event_that_one_stream_omits_comes_from_the_next(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    recorded = RecordedEvents(lambda sent: Stream([*sent[:2], *sent[3:]]))
    server.on("WatchRun", recorded.watch_run)

    updates = await caller.collect("runs.watch", "r")

    assert kinds_and_sequences(updates) == FROM_A_SNAPSHOT
    assert server.asked("WatchRun")[1].after_sequence == BEFORE + 1


@pytest.mark.parametrize("later", [event(6), bookmark(5), snapshot(5)], ids=["e", "b", "s"])
async def test_a_gap_that_the_next_stream_repeats_is_an_error(
    later: Update,
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", Stream([snapshot(3), event(4), later]), Stream([later]))

    with pytest.raises(rr.WatchGap, match="after 4"):
        await caller.collect("runs.watch", "r")

    assert len(server.asked("WatchRun")) == 2


async def test_a_watch_that_does_not_begin_with_a_snapshot_is_an_error(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", Stream([event(4)]))

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
async def test_a_sequence_that_the_service_does_not_have_is_an_error_with_the_one_that_it_has(
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
async def test_any_other_error_ends_the_watch(
    code: grpc.StatusCode,
    reason: str,
    kind: type[rr.RunRecoveryClientError],
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", Stream([snapshot(1)], then=Fail(code=code, reason=reason)))

    with pytest.raises(kind):
        await caller.collect("runs.watch", "r")

    assert len(server.asked("WatchRun")) == 1


async def test_watch_pauses_at_least_as_long_as_the_service_asks_for(
    caller: Caller,
    server: ScriptedServer,
    pauses: list[float],
) -> None:
    retry = error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=7))
    recovering = Fail(
        code=grpc.StatusCode.UNAVAILABLE, reason="RECONCILIATION_IN_PROGRESS", more=[retry]
    )
    server.on("WatchRun", recovering, recovering, Stream([snapshot(1)]))

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
async def test_grpc_itself_does_not_retry_a_stream(
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


async def test_watch_raises_the_last_failure_of_an_outage_longer_than_reconnect_s(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    storage = Fail(code=grpc.StatusCode.UNAVAILABLE, reason="STORAGE_UNAVAILABLE")
    server.on("WatchRun", Stream([snapshot(1)], then=GONE), GONE, storage)

    with pytest.raises(rr.Unavailable) as raised:
        await caller.collect("runs.watch", "r", reconnect_s=0.3)

    assert raised.value.reason == "STORAGE_UNAVAILABLE"


async def test_watch_ends_at_the_callers_deadline(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", Stream([snapshot(1)], hold=True))

    with pytest.raises(rr.DeadlineExceeded):
        await caller.collect("runs.watch", "r", timeout_s=0.3)


async def test_watch_returns_bookmarks_only_to_callers_who_ask_for_them(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", Stream([snapshot(3), bookmark(3), event(4)]))

    quietly = await caller.collect("runs.watch", "r")
    fully = await caller.collect("runs.watch", "r", include_bookmarks=True)

    assert kinds_and_sequences(quietly) == [("snapshot", 3), ("event", 4)]
    assert kinds_and_sequences(fully) == [("snapshot", 3), ("bookmark", 3), ("event", 4)]


def _guards() -> Iterator[threading.Thread]:
    return (thread for thread in threading.enumerate() if thread.name == "runrecovery-silence")


def test_a_watch_is_not_resumed_after_its_caller_closed_the_client(
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", Stream([snapshot(3), event(4)], hold=True))
    client = rr.RunRecoveryClient(server.start())
    watch = client.runs.watch("r")
    next(watch)
    threading.Thread(target=client.close).start()

    with pytest.raises(rr.UnrecognizedError):
        list(watch)

    assert len(server.asked("WatchRun")) == 1


@pytest.mark.parametrize("explicitly", [True, False])
async def test_leaving_a_watch_early_ends_its_call_its_tasks_and_its_thread(
    explicitly: bool,  # noqa: FBT001 - a parameter of the test
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.on("WatchRun", Stream([snapshot(3), event(4)], hold=True))
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
