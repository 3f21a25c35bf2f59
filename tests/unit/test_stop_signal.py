"""The signal that stops the service."""

from __future__ import annotations

import asyncio

from runrecovery_service.domain.errors import Fenced, StorageUnavailable
from runrecovery_service.stop_signal import StopSignal
from structlog.testing import capture_logs


async def test_the_first_error_is_kept() -> None:
    stop = StopSignal()
    first = Fenced("instance 'a'")

    stop.fail(first)
    stop.fail(StorageUnavailable())

    assert (stop.is_set(), stop.failure) == (True, first)


async def test_a_request_stops_without_an_error() -> None:
    stop = StopSignal()

    stop.request()
    await stop.wait()

    assert (stop.is_set(), stop.failure) == (True, None)


async def test_a_task_that_fails_stops_the_service_and_a_cancelled_one_does_not() -> None:
    stop, error = StopSignal(), ValueError("defect")

    async def fail() -> None:
        raise error

    cancelled = asyncio.create_task(asyncio.sleep(3600))
    cancelled.add_done_callback(stop.task_ended)
    cancelled.cancel()
    await asyncio.gather(cancelled, return_exceptions=True)
    assert not stop.is_set()
    with capture_logs() as logs:
        task = asyncio.create_task(fail())
        task.add_done_callback(stop.task_ended)
        await stop.wait()

    assert stop.failure is error
    assert [line["event"] for line in logs] == ["service.defect"]
