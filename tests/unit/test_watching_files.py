"""The service watches its files without waiting for a file system that hangs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
from runrecovery_service import daemon_threads, storage_health
from runrecovery_service.domain.start_errors import DataDirRefused
from runrecovery_service.stop_signal import StopSignal
from structlog.testing import capture_logs
from support.waiting import until_async

LOST = DataDirRefused("data directory /d", "/d/lock was removed or replaced")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check without pauses, and with a very short timeout."""
    monkeypatch.setattr(storage_health, "FILE_CHECK_S", 0.0)
    monkeypatch.setattr(storage_health, "FILE_CHECK_TIMEOUT_S", 0.01)


async def until(holds: Callable[[], bool]) -> None:
    async def now() -> bool:
        return holds()

    await until_async(now, "it holds")


async def test_a_file_system_that_hangs_stops_neither_the_loop_nor_the_service() -> None:
    checks: list[None] = []
    answers = threading.Event()
    stop = StopSignal()

    def demand() -> None:
        checks.append(None)
        answers.wait()
        raise LOST

    with capture_logs() as events:
        watching = storage_health.file_watch(demand, stop).start()
        await until(lambda: len(events) > 0)
        for _ in range(20):  # no other check begins, and no file counts as lost
            await asyncio.sleep(0)
        hanging: tuple[int, bool, list[Any]] = (len(checks), stop.is_set(), list(events))
        answers.set()
        await watching

    logged = {"event": "service.files_not_seen", "error": "no answer", "log_level": "warning"}
    assert hanging == (1, False, [logged])
    assert stop.failure is LOST


async def test_a_check_that_fails_does_not_count_as_a_lost_file() -> None:
    answers: list[Exception] = [LOST, OSError(13, "Permission denied")]
    stop = StopSignal()

    def demand() -> None:
        raise answers.pop()

    with capture_logs() as events:
        await storage_health.file_watch(demand, stop).run()

    assert [event["error"] for event in events] == ["Permission denied"]
    assert stop.failure is LOST


async def test_a_check_that_gets_no_thread_is_made_later() -> None:
    begin, refusals = daemon_threads.start, [RuntimeError("can't start new thread")]
    stop = StopSignal()

    def begin_later(do: Callable[[], None]) -> Future[None]:
        if refusals:
            raise refusals.pop()
        return begin(do)

    def demand() -> None:
        raise LOST

    with capture_logs() as events:
        await storage_health.file_watch(demand, stop, start=begin_later).run()

    assert [event["error"] for event in events] == ["can't start new thread"]
    assert stop.failure is LOST
