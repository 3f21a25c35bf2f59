"""A thread pool on a system that refuses to start more threads."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from runrecovery_service.background_stream import BackgroundStream
from runrecovery_service.domain.start_errors import ThreadsRefused
from runrecovery_service.steady_thread_pool import SteadyThreadPool
from runrecovery_service.storage import quick_check
from runrecovery_service.storage.group_commit import GroupCommitWriter


def refuse(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def looked_at(_: object) -> None:
    """Run the quick check of a database."""
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.execute("CREATE TABLE instance (lease_until INTEGER)")
        quick_check.find_damage(connection)


def test_every_task_runs_once_on_the_threads_that_could_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[int] = []
    with SteadyThreadPool(4) as pool:
        monkeypatch.setattr(threading.Thread, "start", refuse)
        tasks = [pool.submit(done.append, number) for number in range(20)]
        for task in tasks:
            task.result(30)

    assert done == list(range(20))


def test_a_pool_grows_again_when_threads_can_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.parametrize("start", [BackgroundStream, GroupCommitWriter, looked_at])
def test_a_start_without_a_needed_thread_is_refused_with_a_message(
    monkeypatch: pytest.MonkeyPatch, start: Callable[[Any], object]
) -> None:
    monkeypatch.setattr(threading.Thread, "start", refuse)

    with pytest.raises(ThreadsRefused) as caught:
        start(2)

    assert str(caught.value) == (
        "the system gives this process no more threads: can't start new thread"
    )


# Each thread has a stack as large as the limit, and there is no room for one of them.
NO_ROOM = ("sh", "-c", 'ulimit -s 16000000; ulimit -v 8000000; exec "$@"', "sh")


@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_command_that_gets_no_threads_exits_with_the_documented_code(
    tmp_path: Path, command: str
) -> None:
    done = subprocess.run(
        [*NO_ROOM, sys.executable, "-m", "runrecovery_service", command, "--data-dir", "data"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr == (
        "error: the system gives this process no more threads: can't start new thread\n"
        "hint: raise the limit on processes (TasksMax= of a unit, ulimit -u, pids.max)\n"
    )
    assert list(tmp_path.iterdir()) == []
