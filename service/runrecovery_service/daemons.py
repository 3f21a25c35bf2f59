"""Work that may never end, in threads that nobody waits for when the process ends."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Final, TypeVar

import uvloop

from runrecovery_service.thread_pool import SteadyThreadPool

R = TypeVar("R")

NO_THREAD_S: Final = 0.1
"""Between two tries to start a thread that the system refuses."""
OTHER_THREADS: Final = 16
"""For what blocks and is no step of a turn: reading outputs, ending what a lost turn left."""


class _NeverAwaited(SteadyThreadPool):
    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: FBT001, FBT002 - its signature
        super().shutdown(wait=False, cancel_futures=cancel_futures)


def new_event_loop() -> asyncio.AbstractEventLoop:
    """Return a loop whose close does not wait for `asyncio.to_thread`. Python would wait for 300 s,
    or for ever, when a disk hangs."""
    loop = uvloop.new_event_loop()
    loop.set_default_executor(_NeverAwaited(OTHER_THREADS, "other"))
    return loop


def begin(do: Callable[[], R]) -> Future[R]:
    """Do it in a thread of its own; it cannot be cancelled."""
    future: Future[R] = Future()
    future.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result = do()
        except BaseException as error:  # noqa: BLE001 - it is for whoever waits
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, name="may-hang", daemon=True).start()
    return future


async def done(do: Callable[[], R]) -> R:
    """Return what it returns. Wait for a thread while the system has none to give."""
    while True:
        try:
            future = begin(do)
        except RuntimeError:  # of the start alone: what `do` raises is in the future
            await asyncio.sleep(NO_THREAD_S)
        else:
            return await asyncio.wrap_future(future)


async def within(seconds: float, do: Callable[[], R]) -> R:
    """Return what it returns.

    Raises:
        TimeoutError: it takes longer, and is left to itself.
    """
    async with asyncio.timeout(seconds):
        return await done(do)
