"""Work that may never end, on a system without threads."""

from __future__ import annotations

import threading

import pytest
from runrecovery_service import daemons


async def test_work_waits_for_a_thread_and_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start
    left = [2]
    done: list[str] = []

    def refuse(thread: threading.Thread) -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)

    await daemons.within(30, lambda: done.append("done"))

    assert (done, left) == (["done"], [0])


async def test_a_defect_in_the_work_is_not_taken_for_a_lack_of_threads() -> None:
    def fail() -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        await daemons.within(30, fail)
