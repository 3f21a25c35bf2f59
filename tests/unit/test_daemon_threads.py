"""Threads that no exit waits for, also on a system that refuses to start threads."""

from __future__ import annotations

import asyncio
import threading

import pytest
from runrecovery_service import daemon_threads
from support.waiting import until


def test_a_loop_closes_while_one_of_its_threads_hangs() -> None:
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


async def test_work_waits_until_a_thread_can_start_and_runs_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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


async def test_a_runtime_error_of_the_work_is_raised_and_not_retried() -> None:
    def fail() -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        await daemon_threads.run_within(30, fail)
