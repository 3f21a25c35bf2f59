"""A start to which the system gives one thread too few leaves no claim behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Final

import pytest
from support.service import Home
from support.stores import query

# Becomes the service, and refuses each thread whose name contains the first argument. A forced end,
# which comes after a long wait for threads that do not end, has an exit code of its own.
REFUSES: Final = """
import os, runpy, sys, threading

_, refused, _, _, module, *words = sys.argv
force_exit = os._exit
os._exit = lambda _: force_exit(99)
start = threading.Thread.start

def refuse(thread):
    if refused in thread.name:
        raise RuntimeError("can't start new thread")
    start(thread)

threading.Thread.start = refuse
sys.argv[:] = [module, *words]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    "thread", ["storage_", "storage-lease_", "storage-trial_", "process_", "_poll_wrapper"]
)
def test_a_start_that_gets_no_thread_exits_with_4_and_leaves_no_lease(
    new_home: Callable[..., Home], postgresql_url: str, thread: str
) -> None:
    home = new_home(database=postgresql_url, prefix=(sys.executable, "-c", REFUSES, thread))

    service = home.spawn()

    assert service.exit_code(timeout_s=60) == 4, service.text
    assert service.text.endswith(
        "error: the system gives this process no more threads: can't start new thread\n"
        "hint: raise the limit on processes (TasksMax= of a unit, ulimit -u, pids.max)\n"
    )
    assert service.events("service.epoch_claimed") == []
    assert query(home, "SELECT * FROM instance") == []
    assert query(home, "SELECT * FROM instance_epoch") == []
