"""Threads that nobody waits for."""

from __future__ import annotations

import asyncio
import threading

from runrecovery_service import daemons
from support.waiting import until


def test_a_loop_closes_although_a_thread_of_it_hangs() -> None:
    hanging, ended = threading.Event(), threading.Event()

    def hang() -> None:
        hanging.set()
        ended.wait()

    async def begin() -> None:
        doing = asyncio.ensure_future(asyncio.to_thread(hang))
        await asyncio.to_thread(hanging.wait)
        doing.cancel()

    def close() -> None:
        with asyncio.Runner(loop_factory=daemons.new_event_loop) as runner:
            runner.run(begin())

    closing = threading.Thread(target=close)
    closing.start()
    try:
        until(lambda: not closing.is_alive(), "the loop is closed")
    finally:
        ended.set()
        closing.join()
