"""How a sweep kills processes; its report, its log, and the processes and files that it leaves."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from process.sweeping import ESCAPEES, NewLease, end, once, once_asked, unrecorded
from process.trees import Grow, Signals, until
from runrecovery_service.process import procfs, tree_ending
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.process.procfs import Proc
from runrecovery_service.process.tree_ending import end_trees


def test_sends_sigterm_before_sigkill(grow: Grow, signals: Signals) -> None:
    tree = grow("child")

    end(tree.lease)

    assert {line["signal"] for line in signals.lines} == {"SIGTERM"}
    assert signals.pids() == {proc.pid for proc in tree.procs.values()}


def test_kills_a_process_that_ignores_sigterm_after_the_grace(grow: Grow, signals: Signals) -> None:
    tree = grow("stubborn", "child", "daemon")
    began = time.monotonic()

    ending = end(tree.lease, grace_s=0.3, clock=once_asked(signals, tree))

    assert ending == Ending(found=3, ended=3, gone=True)
    assert tree.nobody_alive()
    assert time.monotonic() - began >= 0.3
    for proc in tree.procs.values():
        assert signals.names(proc.pid) == ["SIGTERM", "SIGSTOP", "SIGKILL"]


def test_returns_as_soon_as_all_are_gone(grow: Grow) -> None:
    tree = grow("child")
    began = time.monotonic()

    end(tree.lease, grace_s=60, deadline_s=90)

    assert time.monotonic() - began < 50


def test_continues_a_stopped_process_so_that_it_can_handle_sigterm(
    grow: Grow, signals: Signals
) -> None:
    tree = grow("stopped")
    stopped = tree.procs["stopped"].pid

    ending = end(tree.lease, grace_s=30, deadline_s=60)

    assert ending.gone
    assert signals.names(stopped)[:2] == ["SIGTERM", "SIGCONT"]
    assert "SIGKILL" not in signals.names(stopped)


def test_two_trees_share_one_grace(grow: Grow, signals: Signals) -> None:
    trees = [grow("stubborn", "child") for _ in range(2)]

    clock = once_asked(signals, *trees)
    endings = end_trees(
        [t.lease for t in trees], why="test", grace_s=0.3, deadline_s=20, clock=clock
    )

    assert list(endings.values()) == [Ending(found=2, ended=2, gone=True)] * 2
    sent = [line["signal"] for line in signals.lines]
    assert sent == ["SIGTERM"] * 4 + ["SIGSTOP"] * 4 + ["SIGKILL"] * 4
    assert all(tree.nobody_alive() for tree in trees)


def test_a_grace_as_long_as_the_deadline_still_ends_in_killing(grow: Grow) -> None:
    tree = grow("stubborn")

    assert end(tree.lease, grace_s=5, deadline_s=5) == Ending(found=1, ended=1, gone=True)


def test_a_zombie_is_dead(grow: Grow, signals: Signals) -> None:
    tree = grow("zombie")

    ending = end(tree.lease)

    assert ending == Ending(found=1, ended=1, gone=True)  # the leader alone
    assert tree.procs["zombie"].pid not in signals.pids()


def test_an_unreaped_shim_is_dead(grow: Grow, signals: Signals) -> None:
    tree = grow()
    tree.process.close_gate()
    until(lambda: tree.shim_state() == "Z")

    assert end(tree.lease) == Ending(gone=True)
    assert signals.lines == []


def scans(monkeypatch: pytest.MonkeyPatch, note: Callable[[], object]) -> None:
    """Call `note` before each scan of all processes."""
    real = tree_ending._Sweep._scan

    def scan(self: tree_ending._Sweep) -> tuple[dict[int, Proc], dict[int, Any]]:
        note()
        return real(self)

    monkeypatch.setattr(tree_ending._Sweep, "_scan", scan)


def test_a_launch_without_processes_takes_two_scans(
    new_lease: NewLease, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    scans(monkeypatch, lambda: seen.append(True))

    endings = end_trees([new_lease() for _ in range(50)], why="test", grace_s=5, deadline_s=20)

    assert set(endings.values()) == {Ending(gone=True)}
    assert len(seen) == 2


def test_a_launch_with_killed_processes_takes_five_empty_scans(
    grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow()
    living: list[bool] = []
    scans(monkeypatch, lambda: living.append(tree.alive("leader")))

    end(tree.lease)

    assert living.count(False) >= 5


def test_kills_more_processes_than_it_may_open_pidfds(
    grow: Grow, signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow("stubborn", *["daemon"] * 20)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (32, 32))

    def asked() -> int:
        return sum("SIGTERM" in signals.names(pid) for pid in signals.pids())

    ending = end(tree.lease, grace_s=0.1, clock=once(lambda: asked() > 0))

    assert asked() == 8  # a quarter of the limit; the others were held when these had ended
    assert ending == Ending(found=21, ended=21, gone=True)
    assert tree.nobody_alive()


def test_two_sweeps_of_one_lease_do_not_disturb_each_other(grow: Grow) -> None:
    tree = grow("child", "daemon", "escapee")
    with ThreadPoolExecutor(2) as pool:
        endings = list(pool.map(end, [tree.lease, tree.lease]))

    assert [ending.gone for ending in endings] == [True, True]
    assert tree.nobody_alive()


def test_a_sweep_and_the_shim_do_not_disturb_each_other(grow: Grow) -> None:
    tree = grow("stubborn", *ESCAPEES)
    with ThreadPoolExecutor(1) as pool:
        sweeping = pool.submit(end, tree.lease, grace_s=0.1)
        tree.process.close_gate()
        ending = sweeping.result()

    assert ending.gone
    assert ending.found == ending.ended
    assert tree.shim_exit() == 0
    assert tree.nobody_alive()


def test_sweeping_twice_changes_nothing(grow: Grow) -> None:
    tree = grow("child")
    end(tree.lease)

    assert end(tree.lease) == Ending(gone=True)


def test_reports_a_process_that_may_not_be_signalled(
    grow: Grow, signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow()

    def forbid(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr("_signal.pidfd_send_signal", forbid)
    began = time.monotonic()
    ending = end(tree.lease, grace_s=0.1, deadline_s=90)
    monkeypatch.undo()

    assert (ending.found, ending.ended, ending.gone) == (1, 0, False)
    assert f"pid {tree.procs['leader'].pid} (watermark) may not be signalled" in ending.refused[0]
    assert {line["outcome"] for line in signals.lines} == {"barred"}
    assert time.monotonic() - began < 60  # no use in waiting for the deadline


def test_reports_a_process_that_survives_the_deadline(
    grow: Grow, signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow()
    monkeypatch.setattr("_signal.pidfd_send_signal", lambda *_: None)
    times = {"SIGTERM": 0.2, "SIGKILL": 0.5}

    def clock() -> float:
        sent = max((times.get(str(line["signal"]), 0.0) for line in signals.lines), default=0.0)
        return sent if sent < times["SIGKILL"] else sent + time.monotonic() - began

    began = time.monotonic()
    ending = end(tree.lease, grace_s=0.1, deadline_s=0.4, clock=clock)
    monkeypatch.undo()

    assert (ending.found, ending.ended, ending.gone) == (1, 0, False)
    assert "is alive after SIGKILL (state " in ending.refused[0]


def test_leaves_no_process_stopped_when_the_deadline_passes(grow: Grow, signals: Signals) -> None:
    tree = grow("stubborn")
    leader = tree.procs["leader"].pid

    def time_is_up_after_the_freeze() -> float:
        return 1.0 if "SIGSTOP" in signals.names(leader) else 0.0

    end_trees(
        [tree.lease], why="test", grace_s=0, deadline_s=0.5, clock=time_is_up_after_the_freeze
    )

    assert signals.names(leader) == ["SIGSTOP", "SIGKILL"]


def test_an_unreadable_proc_is_no_empty_scan(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = grow()

    def blind() -> None:
        raise OSError(24, "Too many open files")

    scans(monkeypatch, blind)
    ending = end(tree.lease, deadline_s=0.3)

    assert not ending.gone
    assert tree.alive("leader")


def test_a_process_without_a_pidfd_is_not_gone(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = grow()

    def no_descriptor_left(_: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", no_descriptor_left)
    ending = end(tree.lease, deadline_s=0.3)
    monkeypatch.undo()

    assert not ending.gone
    assert tree.alive("leader")


@pytest.mark.parametrize("grace_s", [0, 5], ids=["frozen", "asked"])
def test_a_signal_is_sent_only_after_the_proof_was_read_again(
    grow: Grow, signals: Signals, monkeypatch: pytest.MonkeyPatch, grace_s: float
) -> None:
    tree = grow()
    real = procfs.watermark
    seen: list[int] = []

    def once(pid: int) -> int | None:
        """Let each process have its marker at the first read only."""
        if pid in seen:
            return None
        seen.append(pid)
        return real(pid)

    monkeypatch.setattr(procfs, "watermark", once)
    ending = end(replace(unrecorded(tree.lease), cookie=""), grace_s=grace_s, deadline_s=0.5)
    monkeypatch.undo()

    assert "sent" not in {line["outcome"] for line in signals.lines}
    assert tree.alive("leader")
    assert not ending.gone
    assert "carried a marker (watermark) when it was found, but not when it was read again" in str(
        ending.refused
    )


def test_leaves_no_descriptor_open_of_survivors(
    grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow()
    monkeypatch.setattr("_signal.pidfd_send_signal", lambda *_: None)
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208

    end(tree.lease, grace_s=0, deadline_s=0.1)

    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_leaves_no_descriptor_open(grow: Grow) -> None:
    tree = grow("stubborn", "child", "daemon")
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208

    end(tree.lease, grace_s=0.1)

    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_every_signal_is_logged_with_its_reason(grow: Grow, signals: Signals) -> None:
    tree = grow("stubborn", "escapee", "renegade")

    end(tree.lease, grace_s=0.1, clock=once_asked(signals, tree))

    for proc in tree.procs.values():
        told = [line for line in signals.lines if line["pid"] == proc.pid]
        assert told == [
            {
                "event": "process.signalled",
                "pid": proc.pid,
                "signal": name,
                "lease": tree.lease.launch_key,
                "run": tree.lease.run_key,
                "why": "test",
                "evidence": "descent" if proc is tree.procs["renegade"] else "watermark",
                "outcome": "sent",
            }
            for name in ("SIGTERM", "SIGSTOP", "SIGKILL")
        ]


def test_no_marker_is_ever_logged(grow: Grow, signals: Signals) -> None:
    tree = grow("daemon")

    ending = end(tree.lease)

    for told in (str(signals.lines), repr(ending), repr(tree.lease)):
        assert tree.lease.cookie not in told
        assert str(tree.lease.watermark) not in told


def test_there_is_one_place_that_sends_signals() -> None:
    root = Path(tree_ending.__file__).parents[1]
    words = ("pidfd_send_signal", "os.kill", "killpg", "send_signal(", ".terminate(", ".kill(")
    senders = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if any(word in path.read_text("utf-8") for word in words)
    }

    # The demo ends the services that it started itself, through its own Popen.
    assert senders - {"cli/demo/service_process.py"} == {"process/signals.py"}


def test_a_found_process_is_killed_even_if_the_first_scan_outlasts_the_deadline(
    grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow("stubborn", "child", "escapee")
    skipped = [0.0]
    look = tree_ending._Sweep._scan_and_pin

    def look_slowly(self: tree_ending._Sweep) -> None:
        look(self)
        skipped[0] = 1000.0

    monkeypatch.setattr(tree_ending._Sweep, "_scan_and_pin", look_slowly)

    ending = end(tree.lease, grace_s=5, deadline_s=10, clock=lambda: time.monotonic() + skipped[0])

    assert tree.nobody_alive()
    assert ending.ended == ending.found == 3
