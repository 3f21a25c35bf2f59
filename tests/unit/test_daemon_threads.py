"""Threads that nobody waits for, also on a system that refuses threads."""

from __future__ import annotations

import asyncio
import threading

import pytest
from runrecovery_service import daemon_threads
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
        with asyncio.Runner(loop_factory=daemon_threads.new_event_loop) as runner:
            runner.run(begin())

    closing = threading.Thread(target=close)
    closing.start()
    try:
        until(lambda: not closing.is_alive(), "the loop is closed")
    finally:
        ended.set()
        closing.join()


async def test_work_waits_for_a_thread_and_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    refusals = [2]
    calls: list[str] = []

    def refuse(thread: threading.Thread) -> None:
        if refusals[0]:
            refusals[0] -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)

    await daemon_threads.run_within(30, lambda: calls.append("call"))

    assert (calls, refusals) == (["call"], [0])


async def test_a_defect_in_the_work_is_not_mistaken_for_a_lack_of_threads() -> None:
    def fail() -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        await daemon_threads.run_within(30, fail)
