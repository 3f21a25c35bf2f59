"""The loop of every periodic task: what it repeats, what it reports, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from runrecovery_service import periodic
from runrecovery_service.domain.errors import Fenced, StorageUnavailable
from runrecovery_service.periodic import Backoff, PeriodicTask
from runrecovery_service.stop_signal import StopSignal
from structlog.testing import capture_logs

FAILED = "test.step_failed"


class Steps:
    """Steps with these results, in order; the last result is repeated."""

    def __init__(self, *results: Exception | None) -> None:
        self.results = list(results)
        self.count = 0
        self._changed = asyncio.Condition()

    async def __call__(self) -> None:
        result = self.results[min(self.count, len(self.results) - 1)]
        async with self._changed:
            self.count += 1
            self._changed.notify_all()
        if result is not None:
            raise result

    async def until(self, count: int) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.count >= count)


Make = Callable[[Steps], PeriodicTask]


@pytest.fixture
async def stop_signal() -> StopSignal:
    return StopSignal()


@pytest.fixture
def make(stop_signal: StopSignal) -> Make:
    def task(steps: Steps) -> PeriodicTask:
        return PeriodicTask(
            name="test", step=steps, interval_s=0.0, failure_event=FAILED, stop_signal=stop_signal
        )

    return task


async def test_a_step_that_fails_is_repeated_and_its_error_logged_once(make: Make) -> None:
    steps = Steps(StorageUnavailable(), StorageUnavailable(), StorageUnavailable(), None)
    task = make(steps)

    with capture_logs() as logs:
        task.start()
        await steps.until(5)
        await task.cancel()

    assert [(line["event"], line["error"], line["exc_info"]) for line in logs] == [
        (FAILED, "StorageUnavailable", False)
    ]


async def test_an_error_is_logged_again_after_a_success_or_another_error(make: Make) -> None:
    steps = Steps(OSError(), None, OSError(), ValueError(), OSError(), None)
    task = make(steps)

    with capture_logs() as logs:
        task.start()
        await steps.until(7)
        await task.cancel()

    assert [line["error"] for line in logs] == ["OSError", "OSError", "ValueError", "OSError"]


async def test_a_fenced_step_ends_the_loop_and_stops_the_service(
    make: Make, stop_signal: StopSignal
) -> None:
    error = Fenced("instance 'a'")
    steps = Steps(None, error)

    await make(steps).run()

    assert (steps.count, stop_signal.is_set(), stop_signal.failure) == (2, True, error)


async def test_a_step_may_name_the_pause_until_the_next_one(stop_signal: StopSignal) -> None:
    pauses = [0.0, 0.0, 3600.0]
    waits = asyncio.Event()

    async def step() -> float:
        pause_s = pauses.pop(0)
        if not pauses:
            waits.set()
        return pause_s

    task = PeriodicTask(
        name="test", step=step, interval_s=3600.0, failure_event=FAILED, stop_signal=stop_signal,
        first_wait_s=0.0,
    )  # fmt: skip
    task.start()
    await waits.wait()
    await task.finish()

    assert pauses == []


async def test_a_failed_step_is_repeated_after_the_interval_whatever_an_earlier_step_named(
    stop_signal: StopSignal, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []

    async def pause(_: asyncio.Event, seconds: float) -> bool:
        pauses.append(seconds)
        return len(pauses) == 2

    async def step() -> float:
        if pauses:
            raise StorageUnavailable
        return 0.5

    monkeypatch.setattr(periodic, "wait_within", pause)
    task = PeriodicTask(
        name="test", step=step, interval_s=3600.0, failure_event=FAILED, stop_signal=stop_signal,
        first_wait_s=0.0,
    )  # fmt: skip
    await task.run()

    assert pauses == [0.5, 3600.0]


async def test_an_error_that_is_not_retried_ends_the_task(
    make: Make, stop_signal: StopSignal
) -> None:
    error = ZeroDivisionError()
    task = make(Steps(OSError(), error))
    task.retried = (OSError,)

    with capture_logs() as logs, pytest.raises(ZeroDivisionError):
        await task.run()

    assert [line["event"] for line in logs] == [FAILED]
    assert not stop_signal.is_set()


async def test_finish_lets_the_step_that_is_under_way_end(stop_signal: StopSignal) -> None:
    begun, go_on, ended = asyncio.Event(), asyncio.Event(), list[str]()

    async def step() -> None:
        begun.set()
        await go_on.wait()
        ended.append("step")

    task = PeriodicTask(
        name="test", step=step, interval_s=0.0, failure_event=FAILED, stop_signal=stop_signal
    )
    task.start()
    await begun.wait()
    finishing = asyncio.create_task(task.finish())
    await asyncio.sleep(0)  # it begins to wait
    go_on.set()
    await finishing

    assert (ended, task.is_stopping) == (["step"], True)


async def test_no_step_is_taken_after_finish_during_the_first_pause(make: Make) -> None:
    steps = Steps(None)
    task = make(steps)
    task.interval_s = 3600.0

    task.start()
    await task.finish()

    assert steps.count == 0


def test_a_backoff_doubles_up_to_its_limit() -> None:
    backoff = Backoff(first_s=0.5, most_s=3.0)

    pauses = [backoff.next_s() for _ in range(5)]

    assert pauses == [0.5, 1.0, 2.0, 3.0, 3.0]
