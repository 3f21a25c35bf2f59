"""The service, the shims or the next start kill the processes of every run."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest
from runrecovery.v1 import recovery_pb2, run_pb2
from runrecovery.v1 import recovery_service_pb2 as recovery_rpc
from support.api import Api, refused, state_word, status_word
from support.engines import GOOD_ENGINES, script
from support.processes import (
    ProcessIdentity,
    is_alive,
    is_stopped,
    living_process,
    lock_limit,
    processes_with_watermark,
    send_signal,
)
from support.service import Home, ServiceProcess
from support.waiting import until

NewHome = Callable[..., Home]

QUESTION: Final = {"kind": "confirm", "prompt": "Go on?"}
ASKS: Final = {"questions": [QUESTION]}
REQUEUE: Final = run_pb2.RESTART_POLICY_REQUEUE
RESTART, LOST = "ORCHESTRATOR_RESTART_INTERRUPTED", "INTERACTION_PROCESS_LOST"
SHUTDOWN: Final = recovery_pb2.RECONCILIATION_TRIGGER_SHUTDOWN
STARTUP: Final = recovery_pb2.RECONCILIATION_TRIGGER_STARTUP
COMPLETED: Final = recovery_pb2.RECONCILIATION_STATE_COMPLETED
TTL_S: Final = 3
SOON_S: Final = 5.0
NOBODY: Final = 65534
# A family of three: the second has forked twice and left its session, the third has also an empty
# environment and is not dumpable. All ignore SIGTERM.
ESCAPES: Final = """
import ctypes, os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdin.readline()
LIVES = "import ctypes, time; ctypes.CDLL(None).prctl(4, 0, 0, 0, 0); time.sleep(600)"
for env in (dict(os.environ), {}):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for stream in (0, 1, 2):
                os.dup2(os.open(os.devnull, os.O_RDWR), stream)
            os.execve(sys.executable, [sys.executable, "-I", "-S", "-c", LIVES], env)
        os._exit(0)
    os.wait()
print('{"type": "progress", "message": "escaped"}', flush=True)
time.sleep(600)
"""
# Waits for its answer in a process that, unlike the demo agent, outlives its service.
STAYS: Final = """
import sys, time
sys.stdin.readline()
print('{"type": "ask", "kind": "open_text", "prompt": "So?"}', flush=True)
time.sleep(600)
"""
ENGINES: Final = {
    **GOOD_ENGINES,
    "escapes": script(ESCAPES),
    "stays": script(STAYS, profile="sticky_process"),
}


def play(home: Home, api: Api) -> None:
    """Create runs that work and runs that wait."""
    api.create("resumable", ASKS, run_id="waiting")
    api.until_status("waiting", "WAITING_USER")
    api.create("stays", {}, run_id="sticky")
    api.until_status("sticky", "WAITING_USER")
    api.create("resumable", {"hold": True, "children": 3}, run_id="tree")
    api.create("resumable", {"hold": True}, run_id="again", restart_policy=REQUEUE)
    until_tree_is_complete(home, api)
    until(lambda: len(home.agents_of("again")) == 1, "the other works")


def until_tree_is_complete(home: Home, api: Api) -> None:
    """Wait until the run `tree` works and has all its processes."""
    until(lambda: api.get("tree").attempt == 1, "it is launched")
    until(lambda: b"worked" in b"".join(p.data for p in api.output("tree")), "it works")
    until(lambda: len(home.agents_of("tree")) == 4, "the tree is complete")


def until_escapees_live(home: Home, api: Api) -> int:
    """Wait for the three processes and the shim of the run `escapes`; return their watermark."""
    (shim,) = until(lambda: home.shims_of("escapes"), "it is launched")
    until(lambda: api.get("escapes").attempt == 1, "it is launched")
    until(lambda: b"escaped" in b"".join(p.data for p in api.output("escapes")), "it has escaped")
    watermark = home.watermark_of("escapes")
    until(
        lambda: len(processes_with_watermark(watermark)) == 4,
        "all three and the shim live",
    )
    assert is_alive(shim)
    return watermark


def until_second_attempt(api: Api) -> run_pb2.Run:
    """Wait for the second attempt of the run `again`; return the run."""
    until(lambda: api.get("again").attempt == 2, "it starts over")
    return api.get("again")


def told(api: Api, *run_ids: str) -> dict[str, tuple[str, str, str]]:
    """Return status, error code and recovery_reason of runs."""
    runs = {run_id: api.get(run_id) for run_id in run_ids}
    return {
        run_id: (status_word(run), run.error.code, run.recovery.recovery_reason)
        for run_id, run in runs.items()
    }


def reports(api: Api) -> list[recovery_pb2.Reconciliation]:
    """Return all reports, newest first."""
    request = recovery_rpc.ListReconciliationsRequest()
    return list(api.recovery.ListReconciliations(request, timeout=10).reconciliations)


def decisions(report: recovery_pb2.Reconciliation) -> dict[str, int]:
    return {count.rule: count.count for count in report.decisions}


def service_of(service: ServiceProcess) -> ProcessIdentity:
    found = living_process(service.pid)
    assert found is not None
    return found


# -- a service that stands still ---------------------------------------------------------------


def test_a_service_that_was_frozen_beyond_its_lease_finds_its_trees_dead(
    new_home: NewHome,
) -> None:
    home = new_home(engines=ENGINES, lease_ttl_s=TTL_S)
    service, api = home.start()
    play(home, api)
    (agent,) = home.agents_of("again")
    was = service_of(service)

    send_signal(was, signal.SIGSTOP)
    stopped = time.monotonic()
    until(lambda: home.agents() == [], "the shims have ended their trees", timeout_s=TTL_S + SOON_S)
    assert is_stopped(was)
    until(lambda: time.monotonic() > stopped + TTL_S + 0.5, "its lease is over")
    send_signal(was, signal.SIGCONT)

    for run_id in ("tree", "sticky"):
        api.until_ended(run_id)
    assert told(api, "waiting", "tree", "sticky") == {
        "waiting": ("WAITING_USER", "", ""),
        "tree": ("FAILED", RESTART, ""),
        "sticky": ("FAILED", LOST, ""),
    }
    again = until_second_attempt(api)
    until(lambda: len(home.agents_of("again")) == 1, "its second attempt works")
    assert status_word(again) == "RUNNING"
    assert home.agents_of("again") != [agent]
    assert api.health_of() == "SERVING"
    assert status_word(api.until_ended(api.create("resumable", {}).run_id)) == "SUCCEEDED"
    assert api.reply("waiting", 1, "yes").run_id == "waiting"
    assert status_word(api.until_ended("waiting")) == "SUCCEEDED"
    assert service.popen.poll() is None


def test_a_service_that_was_frozen_briefly_keeps_its_agents(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES, lease_ttl_s=60)
    service, api = home.start()
    play(home, api)
    before = home.agents()
    was = service_of(service)

    send_signal(was, signal.SIGSTOP)
    until(lambda: is_stopped(was), "it is stopped")
    send_signal(was, signal.SIGCONT)

    assert api.health_of() == "SERVING"
    assert home.agents() == before


# -- a planned stop ----------------------------------------------------------------------------

AFTER_A_STOP: Final = {
    "waiting": ("WAITING_USER", "", "resumable_waiting_preserved"),
    "sticky": ("FAILED", LOST, "sticky_process_lost"),
    "tree": ("FAILED", RESTART, "running_interrupted"),
}


def test_a_stop_leaves_no_process_and_every_run_decided(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES, cancel_grace_s=0.3)
    service, api = home.start()
    play(home, api)

    assert service.stop() == 0

    assert home.agents() == []
    assert home.shims() == []
    assert dict(home.rows("SELECT run_id, status FROM run")) == {
        "waiting": "WAITING_USER", "sticky": "FAILED", "tree": "FAILED", "again": "QUEUED"
    }  # fmt: skip
    assert home.rows("SELECT DISTINCT state FROM process_lease") == [("CLOSED",)]
    assert home.rows("SELECT cause, state FROM reconciliation ORDER BY id") == [
        ("STARTUP", "COMPLETED"), ("SHUTDOWN", "COMPLETED")
    ]  # fmt: skip

    service, api = home.start()

    start, stop, first = reports(api)
    assert told(api, *AFTER_A_STOP) == AFTER_A_STOP
    assert [report.trigger for report in (start, stop, first)] == [STARTUP, SHUTDOWN, STARTUP]
    assert decisions(stop) == {
        "resumable_waiting_preserved": 1, "sticky_process_lost": 1, "running_interrupted": 1,
        "requeued": 1,
    }  # fmt: skip
    assert (stop.epoch, stop.orphans.found, stop.orphans.ended, stop.orphans.refused) == (
        1,
        6,
        6,
        0,
    )
    assert not stop.HasField("containment")
    assert decisions(start) == {}
    assert (start.runs_scanned, start.runs_unchanged, start.orphans.found) == (2, 2, 0)
    again = until_second_attempt(api)
    assert again.recovery.recovery_reason == "requeued"
    for run_id in ("waiting", "sticky", "tree", "again"):
        info = api.recovery_info(run_id)
        assert (info.recovery.recovery_count, info.recovery.epoch) == (1, 1)
        assert info.recovery.reconciliation_id == stop.reconciliation_id
    assert api.get("tree").recovery.processes_ended == 4
    assert status_word(api.reply("waiting", 1, "yes")) == "QUEUED"
    assert status_word(api.until_ended("waiting")) == "SUCCEEDED"


def test_after_a_second_signal_the_shims_kill_the_trees(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES, cancel_grace_s=60.0)
    service, api = home.start()
    api.create("resumable", {"hold": True, "ignore_sigterm": True}, run_id="stubborn")
    api.create("escapes", {}, run_id="escapes")
    until(lambda: len(home.agents_of("stubborn")) == 1, "the agent runs")
    watermark = until_escapees_live(home, api)
    service.terminate()
    until(lambda: service.events("recovery.started")[1:], "it has begun to end them")
    service.terminate()

    assert service.exit_code() == 128 + signal.SIGTERM
    until(lambda: home.agents() == [], "the shims end their trees", timeout_s=SOON_S)
    until(lambda: not processes_with_watermark(watermark), "and exit", timeout_s=SOON_S)

    _, api = home.start()
    start, stop, _ = reports(api)
    assert (stop.trigger, stop.state) == (SHUTDOWN, recovery_pb2.RECONCILIATION_STATE_FAILED)
    assert decisions(start) == {"running_interrupted": 2}
    assert not start.safe_mode
    assert told(api, "stubborn")["stubborn"] == ("FAILED", RESTART, "running_interrupted")


# -- a kill, with and without the shims --------------------------------------------------------


def test_after_a_kill_the_shims_kill_their_trees_and_the_next_start_counts_them(
    new_home: NewHome,
) -> None:
    home = new_home(engines=ENGINES)
    service, api = home.start()
    api.create("escapes", {}, run_id="escapes")
    watermark = until_escapees_live(home, api)

    service.kill()
    until(lambda: not processes_with_watermark(watermark), "its tree is dead", timeout_s=SOON_S)
    _, api = home.start()

    report = api.status().reconciliation
    assert (report.orphans.found, report.orphans.ended, report.orphans.refused) == (3, 3, 0)
    assert api.get("escapes").recovery.processes_ended == 3


def test_after_a_kill_of_service_and_shims_the_next_start_kills_every_tree_before_it_serves(
    new_home: NewHome,
) -> None:
    home = new_home(engines=ENGINES)
    service, api = home.start()
    api.create("escapes", {}, run_id="escapes")
    api.create("resumable", {"hold": True, "children": 3}, run_id="tree")
    until_escapees_live(home, api)
    until_tree_is_complete(home, api)
    watermarks = [home.watermark_of(run_id) for run_id in ("escapes", "tree")]
    home.kill_with_shims(service)
    orphans = [len(processes_with_watermark(watermark)) for watermark in watermarks]

    service, api = home.start()
    left = [pid for watermark in watermarks for pid in processes_with_watermark(watermark)]

    assert orphans == [3, 4]
    assert left == []
    report = api.status().reconciliation
    assert (report.orphans.found, report.orphans.ended, report.orphans.refused) == (7, 7, 0)
    assert {run_id: api.get(run_id).recovery.processes_ended for run_id in ("escapes", "tree")} == {
        "escapes": 3, "tree": 4
    }  # fmt: skip
    assert home.agents() == []


def test_a_run_whose_shim_is_killed_under_a_living_service_fails(
    new_home: NewHome,
) -> None:
    home = new_home(engines=ENGINES)
    _, api = home.start()
    api.create("escapes", {}, run_id="escapes")
    watermark = until_escapees_live(home, api)
    (shim,) = home.shims()

    send_signal(shim, signal.SIGKILL)
    run = api.until_ended("escapes")

    assert run.error.code == "SUPERVISION_LOST"
    assert processes_with_watermark(watermark) == []
    assert api.health_of() == "SERVING"


# -- what is proved ----------------------------------------------------------------------------

UNMARKED: Final = ("prlimit", "--locks=100:100")
"""A service that is itself under a small limit on file locks cannot set a watermark."""


def test_a_start_reports_its_containment_level(new_home: NewHome) -> None:
    home = new_home(containment="strict")
    service, api = home.start()

    status = api.status()

    proved = recovery_pb2.CONTAINMENT_LEVEL_WATERMARK
    assert (status.containment.level, status.reconciliation.containment.level) == (proved, proved)
    (event,) = service.events("service.containment")
    assert (event["proved"], event["detail"]) == ("WATERMARK", status.containment.detail)
    assert event["level"] == "info"
    assert list(status.unended_launches) == []


def test_a_start_that_cannot_meet_strict_containment_exits_with_11(new_home: NewHome) -> None:
    home = new_home(containment="strict", prefix=UNMARKED)

    service = home.spawn()

    assert service.exit_code() == 11
    assert "strict" in service.text
    assert "COOKIE" in service.text
    assert not service.events("service.serving")
    assert not service.events("recovery.started")


def test_a_start_without_watermarks_reports_a_lower_containment_level(new_home: NewHome) -> None:
    home = new_home(prefix=UNMARKED, engines=ENGINES)
    service, api = home.start()
    api.create("resumable", {"hold": True, "children": 3}, run_id="tree")
    until_tree_is_complete(home, api)

    status = api.status()

    proved = recovery_pb2.CONTAINMENT_LEVEL_COOKIE
    assert (status.containment.level, status.reconciliation.containment.level) == (proved, proved)
    (event,) = service.events("service.containment")
    assert (event["proved"], event["level"]) == ("COOKIE", "warning")
    assert home.rows("SELECT watermark FROM process_lease") == [(None,)]
    home.kill_with_shims(service)
    assert len(home.agents_of("tree")) == 4
    _, api = home.start()
    assert home.agents() == []
    assert api.get("tree").recovery.processes_ended == 4


# -- what an agent gets ------------------------------------------------------------------------


def test_an_agent_has_three_descriptors_and_a_folder_of_its_own(new_home: NewHome) -> None:
    home = new_home()
    _, api = home.start()
    api.create("resumable", {"hold": True}, run_id="holds")
    (pid,) = until(lambda: home.agents_of("holds"), "the agent runs")
    until(lambda: b"worked" in b"".join(p.data for p in api.output("holds")), "it has begun")

    place = Path(f"/proc/{pid}/cwd").readlink()

    assert {entry.name for entry in Path(f"/proc/{pid}/fd").iterdir()} == {"0", "1", "2"}
    assert place.is_relative_to(home.data / "runs")
    assert [stat_mode(folder) for folder in (place, *place.parents[:3])] == [0o700] * 4
    assert os.getsid(pid) == pid
    assert lock_limit(pid) == home.watermark_of("holds")


def stat_mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def limits_of(pid: int) -> dict[str, tuple[str, str]]:
    """Return soft and hard limits by their names in /proc."""
    lines = Path(f"/proc/{pid}/limits").read_text("ascii").splitlines()[1:]
    return {line[:26].strip(): (line[26:47].strip(), line[47:68].strip()) for line in lines}


def niceness_of(pid: int) -> int:
    return os.getpriority(os.PRIO_PROCESS, pid)


def test_an_agent_has_the_configured_limits_of_its_engine(new_home: NewHome) -> None:
    holds = "import sys, time; sys.stdin.readline(); time.sleep(600)"
    bounded = script(holds, nice=5, max_memory="512M", max_open_files=64, max_processes=4000)
    home = new_home(engines={"bounded": bounded, "free": script(holds)})
    service, api = home.start()
    for engine in home.engines:
        api.create(engine, {}, run_id=engine)
    (pid,) = until(lambda: home.agents_of("bounded"), "the agent runs")
    (free,) = until(lambda: home.agents_of("free"), "the agent runs")

    limits = limits_of(pid)

    assert limits["Max data size"] == (str(512 * 2**20),) * 2
    assert limits["Max open files"] == ("64", "64")
    assert limits["Max processes"] == ("4000", "4000")
    assert niceness_of(pid) == min(19, niceness_of(service.pid) + 5)
    # An agent's file locks are its watermark. Its open files are as many as this test may open: the
    # service raises that limit for itself alone.
    own = {"Max file locks", "Max open files"}
    others = {name: pair for name, pair in limits_of(free).items() if name not in own}
    assert others == {
        name: pair for name, pair in limits_of(service.pid).items() if name not in own
    }
    assert limits_of(free)["Max open files"] == limits_of(os.getpid())["Max open files"]
    assert niceness_of(free) == niceness_of(service.pid)


# -- what cannot be ended ----------------------------------------------------------------------


@contextmanager
def process_of_another_user(watermark: int) -> Iterator[ProcessIdentity]:
    """Run a process of another user with the watermark of a launch."""
    limit = f"--locks={watermark}:{watermark}"
    become = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
    popen = subprocess.Popen(
        ["prlimit", limit, *become, "sleep", "600"], cwd="/", start_new_session=True
    )
    try:
        until(lambda: Path(f"/proc/{popen.pid}/comm").read_text().strip() == "sleep", "it sleeps")
        found = living_process(popen.pid)
        assert found is not None
        yield found
    finally:
        popen.kill()
        popen.wait()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_a_launch_that_cannot_be_killed_is_reported_and_delays_its_run_until_it_is_gone(
    new_home: NewHome,
) -> None:
    # Root without the privilege to signal others: as any other user, for whom this is so anyway.
    home = new_home(prefix=("setpriv", "--bounding-set=-kill"), engines=ENGINES)
    service, api = home.start()
    api.create("resumable", {"hold": True}, run_id="again", restart_policy=REQUEUE)
    (agent,) = until(lambda: home.agents_of("again"), "the agent runs")
    watermark = home.watermark_of("again")
    with process_of_another_user(watermark) as stuck:
        home.kill_with_shims(service)
        service, api = home.start()

        status = api.status()
        run = api.get("again")
        assert processes_with_watermark(watermark) == [stuck.pid]  # the agent itself was ended
        (left,) = status.unended_launches
        assert (left.run_id, left.attempt) == ("again", 1)
        assert left.launched_at.ToNanoseconds() >= run.created_at.ToNanoseconds()
        assert status.reconciliation.orphans.refused == 1
        assert any(f"pid {stuck.pid}" in warning for warning in status.reconciliation.warnings)
        assert (status_word(run), state_word(run.recovery)) == ("QUEUED", "RECOVERED_QUEUED")
        assert home.rows("SELECT state FROM process_lease") == [("KILL_PENDING",)]
        # Others are launched beside it, and it is not.
        assert status_word(api.until_ended(api.create("resumable", {}).run_id)) == "SUCCEEDED"
        until(
            lambda: service.events("process.signal_refused")[1:],
            "the sweep has tried again",
        )
        assert api.get("again").attempt == 1
        assert api.health_of() == "SERVING"
        assert is_alive(stuck)

    until(lambda: not api.status().unended_launches, "nothing is left to name")
    until(lambda: api.get("again").attempt == 2, "it is launched again")
    until(lambda: home.agents_of("again"), "it works again")
    assert home.agents_of("again") != [agent]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process of another user")
def test_a_canceled_run_ends_even_if_one_of_its_processes_cannot_be_killed(
    new_home: NewHome,
) -> None:
    home = new_home(prefix=("setpriv", "--bounding-set=-kill"), engines=ENGINES, cancel_grace_s=0.1)
    _, api = home.start()
    api.create("resumable", {"hold": True}, run_id="holds")
    until(lambda: home.agents_of("holds"), "the agent runs")
    with process_of_another_user(home.watermark_of("holds")):
        api.cancel("holds")
        run = api.until_ended("holds")
        named = [left.run_id for left in api.status().unended_launches]

    assert status_word(run) == "CANCELED"
    assert named == ["holds"]
    until(lambda: not api.status().unended_launches, "nothing is left to name")
    assert refused(lambda: api.reply("holds", 1, "yes")).reason == "RUN_NOT_WAITING"


# -- agents that turn against what guards them -------------------------------------------------

STOPS_ITS_SHIM: Final = """
import os, signal, sys, time
sys.stdin.readline()
os.kill(os.getppid(), signal.SIGSTOP)
time.sleep(600)
"""
PIPES_IN_THE_WAY: Final = """
import os, sys, time
sys.stdin.readline()
os.chdir("..")
for name in ("shim-1.log", "stdout.log", "shim-2.log"):
    if os.path.exists(name):
        os.unlink(name)
    os.mkfifo(name)
print('{"type": "progress", "message": "in the way"}', flush=True)
time.sleep(600)
"""


def test_a_shim_that_was_stopped_counts_as_lost(new_home: NewHome) -> None:
    home = new_home(engines={**GOOD_ENGINES, "stops": script(STOPS_ITS_SHIM)})
    _, api = home.start()
    api.create("stops", run_id="stops")

    run = api.until_ended("stops")

    assert run.error.code == "SUPERVISION_LOST"
    assert home.agents() == []


def until_pipes_are_there(home: Home, key: int) -> None:
    """Wait until the agent of a run has replaced files by pipes."""
    last = home.data / "runs" / str(key) / "1" / "shim-2.log"
    until(last.exists, "the pipes are there")


def test_pipes_in_place_of_output_files_block_no_other_run(new_home: NewHome) -> None:
    home = new_home(engines={**GOOD_ENGINES, "pipes": script(PIPES_IN_THE_WAY)}, max_concurrent=2)
    service, api = home.start()
    for number in range(10):  # more than there are threads
        run_id = f"canceled-{number}"
        api.create("pipes", run_id=run_id)
        until_pipes_are_there(home, number + 1)
        api.cancel(run_id)
        assert status_word(api.until_ended(run_id)) == "CANCELED"
    api.create("pipes", run_id="killed")
    until_pipes_are_there(home, 11)

    service.kill()
    service, api = home.start()

    assert status_word(api.get("killed")) == "FAILED"
    assert home.agents() == []
    assert service.stop() == 0
