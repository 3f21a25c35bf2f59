"""A pool to which the system gives no more threads."""

from __future__ import annotations

import threading

import pytest
from runrecovery_service.domain.errors import ThreadsRefused
from runrecovery_service.thread_pool import SteadyThreadPool


def refuse(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_every_task_is_done_once_by_the_threads_that_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[int] = []
    with SteadyThreadPool(4) as pool:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        tasks = [pool.submit(done.append, number) for number in range(20)]
        for task in tasks:
            task.result(30)

    assert done == list(range(20))


def test_a_pool_grows_again_when_there_are_threads_again(monkeypatch: pytest.MonkeyPatch) -> None:
    both, go = threading.Barrier(2), threading.Event()
    with SteadyThreadPool(2) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", refuse)
            refused = [pool.submit(go.wait, 30) for _ in range(5)]
            go.set()
            assert [task.result(30) for task in refused] == [True] * 5
        met = [pool.submit(both.wait, 30) for _ in range(2)]

        assert sorted(task.result(30) for task in met) == [0, 1]


def test_a_pool_without_any_thread_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading.Thread, "start", refuse)

    with pytest.raises(ThreadsRefused) as caught:
        SteadyThreadPool(4)

    assert str(caught.value) == (
        "the system gives this process no more threads: can't start new thread"
    )
