"""A watch of decisions returns each decision once, however its streams end."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
import runrecovery as rr
from runrecovery import _streams
from runrecovery.v1 import recovery_service_pb2, run_pb2
from support.scripted_server import Fail, ScriptedServer, Stream
from support.scripted_watches import (
    BOOKMARK,
    FAULT_LISTS,
    FAULTS,
    GONE,
    Decision,
    RecordedEvents,
    decision,
)

if TYPE_CHECKING:
    from client.conftest import Caller

pytestmark = pytest.mark.usefixtures("pauses")


@pytest.mark.parametrize("names", FAULT_LISTS, ids="-".join)
async def test_watch_returns_each_decision_once_through_every_break(
    names: list[str],
    caller: Caller,
    server: ScriptedServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_streams, "SILENCE_S", 0.3)
    # An opaque cursor has no order: only an immediate repetition can be told from news.
    chosen = [FAULTS["doubled" if name == "repeated" else name] for name in names]
    server.on("WatchRecovered", RecordedEvents(*chosen).watch_recovered)

    told = await caller.collect("recovery.watch_recovered", after_cursor="c3")

    assert [response.decision.run_id for response in told] == ["r4", "r5", "r6", "r7", "r8"]


async def test_watch_reconnects_after_the_cursor_of_a_bookmark(
    caller: Caller, server: ScriptedServer
) -> None:
    passed = Decision(cursor="c9", bookmark=BOOKMARK)  # by decisions that do not match
    server.on("WatchRecovered", GONE, Stream([passed], then=GONE), Stream([decision(10)]))

    told = await caller.collect("recovery.watch_recovered")
    with_bookmarks = await caller.collect("recovery.watch_recovered", include_bookmarks=True)

    asked = [request.after_cursor for request in server.asked("WatchRecovered")]
    assert asked == ["", "", "c9", ""]
    assert told == with_bookmarks == [decision(10)]


async def test_watch_returns_the_first_cursor_to_callers_who_ask_for_bookmarks(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    first = Decision(cursor="c0", bookmark=BOOKMARK)
    server.on("WatchRecovered", Stream([first, decision(1)]))

    told = await caller.collect("recovery.watch_recovered", include_bookmarks=True)

    assert told == [first, decision(1)]


async def test_watch_sends_every_filter_on_each_connection(
    caller: Caller, server: ScriptedServer
) -> None:
    server.on("WatchRecovered", GONE, Stream([]))

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


async def test_a_cursor_of_another_service_is_an_error(
    caller: Caller,
    server: ScriptedServer,
) -> None:
    foreign = Fail(code=grpc.StatusCode.INVALID_ARGUMENT, reason="WATCH_CURSOR_INVALID")
    server.on("WatchRecovered", foreign)

    with pytest.raises(rr.WatchCursorInvalid):
        await caller.collect("recovery.watch_recovered", after_cursor="x")

    assert len(server.asked("WatchRecovered")) == 1
