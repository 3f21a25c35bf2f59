"""Runs work that may hang for ever in threads that the end of the process does not wait for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

import uvloop

from runrecovery_service.steady_thread_pool import SteadyThreadPool

R = TypeVar("R")

NO_THREAD_PAUSE_S: Final = 0.1
"""Pause between two tries to start a thread that the system refuses."""
EXECUTOR_THREADS: Final = 16
"""Threads for blocking work outside of turns, such as reading outputs and removing their files."""


class _NeverAwaited(SteadyThreadPool):
    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - its signature
        super().shutdown(wait=False, cancel_futures=cancel_futures)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop whose close does not wait for calls of `asyncio.to_thread`.

    When a disk hangs, the close of an ordinary loop waits for 300 s or for ever.
    """
    loop = uvloop.new_event_loop()
    loop.set_default_executor(_NeverAwaited(EXECUTOR_THREADS, "other"))
    return loop


def start(work: Callable[[], R]) -> Future[R]:
    """Start the work in a new thread, and return a future of its result that cannot be cancelled.

    Raises:
        RuntimeError: the system refuses a thread.
    """
    future: Future[R] = Future()
    future.set_running_or_notify_cancel()

    def run_work() -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - the future raises it
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run_work, name="may-hang", daemon=True).start()
    return future


async def run(work: Callable[[], R]) -> R:
    """Run the work in a new thread, and return its result.

    While the system refuses a thread, try again.
    """
    while True:
        try:
            future = start(work)
        except RuntimeError:  # The thread was refused; an error of the work would be in the future.
            await asyncio.sleep(NO_THREAD_PAUSE_S)
        else:
            return await asyncio.wrap_future(future)


async def run_within(seconds: float, work: Callable[[], R]) -> R:
    """Run the work in a new thread, and return its result.

    Raises:
        TimeoutError: the work takes longer than `seconds`; its thread continues.
    """
    async with asyncio.timeout(seconds):
        return await run(work)
