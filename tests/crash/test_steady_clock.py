"""Deadlines follow the clock that also runs while the machine sleeps, in the service and in shims.

In a time namespace that clock is 100,000 s ahead of the other one: a reader of the wrong clock is
far too late or far too early.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any, Final

import pytest
from support.api import status_word
from support.engines import script
from support.service import Home
from support.waiting import until

NewHome = Callable[..., Home]

APART: Final = ("unshare", "--time", "--boottime", "100000")
READ: Final = """
import json, time
from runrecovery_service.clock import Clock
from runrecovery_service.process.boot_clock import boot_time_ns
def ns(): return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
apart = ns() - time.clock_gettime_ns(time.CLOCK_MONOTONIC)
print(json.dumps([apart / 1e9, ns(), Clock().steady().us * 1000 + 999, Clock().due_in(0).us * 1000
    + 999, boot_time_ns(), ns()]))
"""
HOLDS: Final = "import sys, time; sys.stdin.readline(); time.sleep(600)"
ASKS: Final = """
import sys, time
sys.stdin.readline()
print('{"type": "ask", "kind": "open_text", "prompt": "So?"}', flush=True)
time.sleep(600)
"""
ENDS: Final = """
import sys, time
sys.stdin.readline()
time.sleep(1.5)
print('{"type": "result", "output": {"done": true}}', flush=True)
"""
ENGINES: Final = {
    "holds": script(HOLDS),
    "asks": script(ASKS, profile="sticky_process", session_timeout_s=1.0),
    "ends": script(ENDS),
    "limited": script(HOLDS, max_run_time_s=1.0),
}


@pytest.fixture
def apart(new_home: NewHome) -> Callable[..., Home]:
    """Make homes whose services run in a time namespace."""
    tried = subprocess.run([*APART, "true"], check=False, capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"time namespaces are not permitted here: {tried.stderr.strip()}")

    def make(**settings: Any) -> Home:
        return new_home(prefix=APART, engines=ENGINES, **settings)

    return make


def test_all_readers_of_the_steady_clock_use_the_one_that_runs_during_sleep(
    apart: Callable[..., Home],
) -> None:
    told = subprocess.run(
        [*APART, sys.executable, "-c", READ], check=True, capture_output=True, timeout=60
    )

    seconds_apart, *readings = json.loads(told.stdout)

    assert seconds_apart > 90_000
    assert readings == sorted(readings)


def test_agents_and_deadlines_follow_the_steady_clock(apart: Callable[..., Home]) -> None:
    _, api = apart().start()
    for engine in ("ends", "asks", "limited"):
        api.create(engine, run_id=engine)

    ended = {run_id: api.until_ended(run_id) for run_id in ("ends", "asks", "limited")}

    assert {name: (status_word(run), run.error.code) for name, run in ended.items()} == {
        "ends": ("SUCCEEDED", ""),
        "asks": ("FAILED", "INTERACTION_WAIT_TIMEOUT"),
        "limited": ("FAILED", "RUN_TIMEOUT"),
    }


def test_a_shim_without_heartbeats_kills_its_tree_by_the_steady_clock(
    apart: Callable[..., Home],
) -> None:
    home = apart(lease_ttl_s=3)
    service, api = home.start()
    api.create("holds", run_id="holds")
    until(lambda: home.agents_of("holds"), "the agent runs")
    service.popen.send_signal(signal.SIGSTOP)
    try:
        until(lambda: not home.agents_of("holds"), "its shim kills it")
    finally:
        service.popen.send_signal(signal.SIGCONT)
