"""A shim gates its agent, watches it and ends its whole tree."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import runrecovery_service
from process.trees import PATIENCE_S, Grow, Start, Tree, alive, in_ns, send_signal, until
from runrecovery_service.process import procfs, signals, wire
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.process.launch_errors import ShimLost
from runrecovery_service.process.shim_events import Empty, EndsItself, Exited
from runrecovery_service.process.shim_journal import killed_by_shim

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may do this")

# Each takes a launch milliseconds of processor time, as do the modules that they import.
HEAVY = {"collections", "ctypes", "enum", "functools", "re", "signal", "subprocess", "typing"}

ESCAPEES = ("child", "session", "daemon", "scrubbed", "scrubbed-daemon", "undumpable", "escapee")


def leave_a_mark(tmp_path: Path) -> tuple[list[str], Path]:
    mark = tmp_path / "ran"
    return ["/bin/sh", "-c", f"echo > {mark}"], mark


def test_a_shim_imports_no_heavy_module_of_the_standard_library() -> None:
    folder = str(Path(runrecovery_service.__file__).parents[1])
    program = "from runrecovery_service.process import shim_main; print(*sys.modules)"
    code = f"import sys; sys.path.append({folder!r}); {program}"

    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], check=True, capture_output=True, text=True
    )

    modules = set(done.stdout.split())
    assert "runrecovery_service.process.shim" in modules
    assert modules & HEAVY == set()


def test_a_gate_that_closes_before_the_release_means_that_the_agent_never_runs(
    start: Start, tmp_path: Path
) -> None:
    command, mark = leave_a_mark(tmp_path)
    tree = start(command, release=False)

    tree.process.close_gate()

    assert tree.shim_exit() == wire.NEVER_RAN == 125
    assert tree.events() == []
    assert not mark.exists()


def test_a_deadline_that_passes_before_the_release_means_that_the_agent_never_runs(
    start: Start, tmp_path: Path
) -> None:
    command, mark = leave_a_mark(tmp_path)
    tree = start(command, release=False, deadline_s=0.2)

    assert tree.shim_exit() == wire.NEVER_RAN
    with pytest.raises(ShimLost, match="the shim ended"):
        tree.process.release(in_ns(PATIENCE_S))
    assert not mark.exists()


def test_a_release_with_a_past_deadline_starts_no_agent(start: Start, tmp_path: Path) -> None:
    command, mark = leave_a_mark(tmp_path)
    tree = start(command, release=False)

    with pytest.raises(ShimLost, match="the shim ended"):
        tree.process.release(boot_time_ns() - 1)

    assert tree.shim_exit() == wire.NEVER_RAN
    assert not mark.exists()


def test_a_heartbeat_keeps_the_shim_at_its_gate(start: Start, tmp_path: Path) -> None:
    command, mark = leave_a_mark(tmp_path)
    tree = start(command, release=False)
    first = in_ns(0.7)
    tree.process.heartbeat(first)
    until(tree.heard_everything)
    tree.process.heartbeat(in_ns(PATIENCE_S))

    until(lambda: boot_time_ns() > first + 3e8)
    assert not mark.exists()
    tree.process.release(in_ns(PATIENCE_S))

    tree.events(Exited)
    assert mark.exists()


def test_a_heartbeat_and_a_release_after_the_deadline_start_no_agent(
    start: Start, tmp_path: Path
) -> None:
    command, mark = leave_a_mark(tmp_path)
    tree = start(command, release=False)
    deadline = in_ns(0.7)
    tree.process.heartbeat(deadline)
    until(tree.heard_everything)
    tree.stop_shim()
    until(lambda: boot_time_ns() > deadline)

    tree.process.heartbeat(in_ns(PATIENCE_S))
    with ThreadPoolExecutor(1) as pool:
        releasing = pool.submit(tree.process.release, in_ns(PATIENCE_S))
        send_signal(tree.shim, signal.SIGCONT)
        assert isinstance(releasing.exception(), ShimLost)

    assert tree.shim_exit() == wire.NEVER_RAN
    assert not mark.exists()


def test_nothing_of_the_agent_runs_before_the_release(start: Start, tmp_path: Path) -> None:
    command, mark = leave_a_mark(tmp_path)
    tree = start(command, release=False)

    tree.process.heartbeat(in_ns(PATIENCE_S))
    until(tree.heard_everything)
    assert procfs.descendants(procfs.scan(), tree.shim.pid) == []
    assert not mark.exists()

    tree.process.release(in_ns(PATIENCE_S))
    tree.events(Exited)
    assert mark.exists()


def test_a_gated_shim_has_the_watermark(start: Start) -> None:
    tree = start(["/bin/true"], release=False)

    assert tree.process.watermarked
    assert procfs.watermark(tree.shim.pid) == tree.lease.watermark
    assert (tree.process.pid, tree.process.start_ticks) == tree.shim.identity


def assert_it_ended_everything(tree: Tree, why: str) -> None:
    told = tree.events()
    assert told[0] == EndsItself(why)
    assert told[-1] == Empty()
    assert tree.shim_exit() == 0
    assert tree.nobody_alive()
    assert killed_by_shim(tree.journal) == tree.identities()


@pytest.mark.parametrize("manners", [(), ("stubborn",)], ids=["meek", "stubborn"])
def test_a_closed_gate_kills_every_descendant(grow: Grow, manners: tuple[str, ...]) -> None:
    tree = grow(*manners, *ESCAPEES, "stopped", "thread", "renegade")

    tree.process.close_gate()

    assert_it_ended_everything(tree, wire.SERVICE_GONE)


def test_a_service_that_does_not_read_the_report_keeps_no_process_alive(grow: Grow) -> None:
    tree = grow("child", "stubborn")
    fill_up(tree.process.report)

    tree.process.close_gate()

    assert tree.shim_exit() == 0
    assert tree.nobody_alive()
    assert killed_by_shim(tree.journal) == tree.identities()


def fill_up(reading_end: int) -> None:
    """Fill a pipe of which only the reading end is known."""
    writing_end = os.open(f"/proc/self/fd/{reading_end}", os.O_WRONLY | os.O_NONBLOCK)
    try:
        for size in (4096, 1):
            with suppress(BlockingIOError):
                while True:
                    os.write(writing_end, b"x" * size)
    finally:
        os.close(writing_end)


@only_root
def test_a_closed_gate_kills_processes_of_another_user(grow: Grow) -> None:
    tree = grow("other-user")

    tree.process.close_gate()

    assert_it_ended_everything(tree, wire.SERVICE_GONE)


def test_the_death_of_the_service_kills_the_tree(tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    script = Path(__file__).with_name("launch_once.py")
    command = [sys.executable, str(script), "hold", str(tmp_path / "journal")]
    with subprocess.Popen(command, stdout=theirs) as service:
        os.close(theirs)
        with os.fdopen(ours) as said:
            told = json.loads(said.readline())
            found = [procfs.read_proc(told[who]) for who in ("shim", "agent")]
            service.kill()
            service.wait(PATIENCE_S)

            assert None not in found
            until(lambda: not any(alive(one) for one in found if one is not None))


def test_a_missed_deadline_kills_every_descendant(grow: Grow) -> None:
    tree = grow("stubborn", *ESCAPEES)

    tree.process.heartbeat(in_ns(0.2))

    assert_it_ended_everything(tree, wire.LEASE_OVER)


def test_a_heartbeat_moves_the_deadline(grow: Grow) -> None:
    tree = grow("child")
    first = in_ns(0.7)
    tree.process.heartbeat(first)
    until(tree.heard_everything)
    tree.process.heartbeat(in_ns(PATIENCE_S))

    until(lambda: boot_time_ns() > first + 3e8)
    tree.process.heartbeat(in_ns(PATIENCE_S))
    until(tree.heard_everything)

    assert tree.alive("leader")
    assert tree.alive("child")
    assert alive(tree.shim)


def test_a_heartbeat_after_the_deadline_saves_no_process(grow: Grow) -> None:
    tree = grow("stubborn", "daemon")
    deadline = in_ns(0.7)
    tree.process.heartbeat(deadline)
    until(tree.heard_everything)
    tree.stop_shim()
    until(lambda: boot_time_ns() > deadline)

    assert tree.process.heartbeat(in_ns(PATIENCE_S))
    send_signal(tree.shim, signal.SIGCONT)

    assert_it_ended_everything(tree, wire.LEASE_OVER)


def test_heartbeats_to_a_stopped_shim_never_block(grow: Grow) -> None:
    tree = grow()
    tree.stop_shim()

    assert all(tree.process.heartbeat(in_ns(PATIENCE_S)) for _ in range(10_000))

    tree.kill_shim()
    assert not tree.process.heartbeat(in_ns(PATIENCE_S))
    tree.process.close_gate()
    assert not tree.process.heartbeat(in_ns(PATIENCE_S))


def test_kills_a_fork_storm(grow: Grow) -> None:
    tree = grow("storm")
    assert len(tree.processes_with_watermark()) == 302

    tree.process.close_gate()

    assert tree.shim_exit() == 0
    assert tree.nobody_alive()
    assert len(killed_by_shim(tree.journal)) == 302


def test_kills_a_process_that_forks_and_exits_all_the_time(grow: Grow) -> None:
    tree = grow("flicker", "flicker", "flicker")

    tree.process.close_gate()

    assert tree.shim_exit() == 0
    assert tree.nobody_alive()


def test_every_signal_of_the_shim_is_in_its_journal(grow: Grow) -> None:
    tree = grow("daemon")

    tree.process.close_gate()
    tree.shim_exit()

    entries = [json.loads(line) for line in tree.journal.read_text().splitlines()]
    lines = [entry for entry in entries if entry["event"] != wire.AGENT_EXITED]
    sent = [line["signal"] for line in lines if line["pid"] == tree.procs["daemon"].pid]
    assert sent == ["SIGSTOP", "SIGKILL"]
    for line in lines:
        assert line.pop("at_ns") > 0
        assert (line.pop("pid"), line.pop("start_ticks")) in tree.identities()
        assert line.pop("signal") in {"SIGSTOP", "SIGKILL"}
        assert line == {
            "event": "process.signalled",
            "why": wire.SERVICE_GONE,
            "evidence": "descent",
            "outcome": signals.SENT,
            "by": tree.shim.pid,
        }
    assert tree.journal.stat().st_mode & 0o777 == 0o600


def test_a_journal_has_only_whole_lines(tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    killed = {"signal": "SIGKILL", "outcome": "sent", "pid": 5, "start_ticks": 6}
    lines = [
        json.dumps(killed),
        json.dumps(killed | {"pid": 7, "outcome": "gone"}),
        json.dumps(killed | {"pid": 8, "signal": "SIGSTOP"}),
        "[Errno 24] Too many open files",
        "3",
        json.dumps(killed | {"pid": 9})[:-5],
    ]
    journal.write_text("\n".join(lines))

    assert killed_by_shim(journal) == {(5, 6)}
    assert killed_by_shim(tmp_path / "none") == frozenset()


# In a process of its own: what the shim prepares stays with the process.
REFUSES_LIMITS = """
import resource
from runrecovery_service.process import shim, wire

def refuse(*_):
    raise ValueError("not allowed to raise maximum limit")

resource.setrlimit = refuse
order = wire.Order(
    deadline_ns=0, watermark=1 << 60, program="", argv=[], env={}, cwd="",
    confinement=wire.Confinement(),
)
print(shim.Shim(-1, -1, -1, -1)._prepare_guard(order))
"""


def test_a_watermark_that_the_system_refuses_is_reported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", REFUSES_LIMITS], capture_output=True, text=True, check=False
    )

    assert (done.stdout, done.stderr) == ("False\n", "")
