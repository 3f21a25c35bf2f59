"""Ending process trees: everything of ours, nothing else."""

from __future__ import annotations

import json
import os
import resource
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import pytest
from runrecovery_service.process import evidence, sweep
from runrecovery_service.process.evidence import COOKIE_VARIABLE, LeaseEvidence
from runrecovery_service.process.sweep import Ending, end_trees


class Tree(Protocol):
    lease: LeaseEvidence
    procs: dict[str, evidence.Proc]

    def alive(self, role: str) -> bool: ...
    def end_leader(self, *, reap: bool) -> None: ...
    def nobody_alive(self) -> bool: ...


class Signals(Protocol):
    lines: list[dict[str, object]]

    def names(self, pid: object) -> list[object]: ...
    def pids(self) -> set[object]: ...


Grow = Callable[..., Tree]


def end(lease: LeaseEvidence, *, grace_s: float = 5, deadline_s: float = 20) -> Ending:
    return end_trees([lease], grace_s=grace_s, deadline_s=deadline_s)[lease.lease_key]


def unrecorded(lease: LeaseEvidence) -> LeaseEvidence:
    """The lease as a crash between the spawn and its recording leaves it."""
    return replace(lease, pid=None, start_ticks=None)


def test_ends_a_leader_and_its_children(grow: Grow) -> None:
    tree = grow("child", "child", "session")

    assert end(tree.lease) == Ending(found=4, ended=4, gone=True)
    assert tree.nobody_alive()


def test_finds_a_double_forked_daemon_by_its_cookie(grow: Grow) -> None:
    tree = grow("daemon")
    tree.end_leader(reap=True)

    assert end(tree.lease) == Ending(found=1, ended=1, gone=True)
    assert not tree.alive("daemon")


def test_finds_a_tree_whose_pid_was_never_recorded(grow: Grow) -> None:
    tree = grow("child", "daemon", "scrubbed", "scrubbed-session", "scrubbed-daemon")

    assert end(unrecorded(tree.lease)) == Ending(found=6, ended=6, gone=True)
    assert tree.nobody_alive()


def test_ends_the_children_of_a_dead_leader(grow: Grow) -> None:
    tree = grow("child", "session", "scrubbed", "scrubbed-daemon")
    tree.end_leader(reap=True)

    # The child's cookie proves that the session is still the leader's: so the scrubbed are ours.
    assert end(tree.lease) == Ending(found=4, ended=4, gone=True)
    assert tree.nobody_alive()


def test_a_zombie_leader_still_proves_its_session(grow: Grow) -> None:
    tree = grow("scrubbed", "scrubbed-daemon")
    tree.end_leader(reap=False)

    assert end(tree.lease) == Ending(found=2, ended=2, gone=True)
    assert tree.nobody_alive()


def test_reports_scrubbed_processes_of_a_dead_leader_without_killing_them(
    grow: Grow, signals: Signals
) -> None:
    tree = grow("scrubbed")
    tree.end_leader(reap=True)

    ending = end(tree.lease)

    assert tree.alive("scrubbed")
    assert (ending.found, ending.ended, ending.gone) == (0, 0, False)
    assert len(ending.refused) == 1
    assert f"pid {tree.procs['scrubbed'].pid} " in ending.refused[0]
    assert signals.lines == []


def test_ends_who_lost_his_first_thread(grow: Grow) -> None:
    tree = grow("thread")
    tree.end_leader(reap=True)

    assert end(unrecorded(tree.lease)) == Ending(found=1, ended=1, gone=True)
    assert tree.nobody_alive()


def test_asks_before_it_kills(grow: Grow, signals: Signals) -> None:
    tree = grow("child")

    end(tree.lease)

    assert {line["signal"] for line in signals.lines} == {"SIGTERM"}
    assert signals.pids() == {proc.pid for proc in tree.procs.values()}


def test_kills_who_ignores_sigterm_after_the_grace(grow: Grow, signals: Signals) -> None:
    tree = grow("stubborn", "child", "daemon")
    began = time.monotonic()

    ending = end(tree.lease, grace_s=0.3)

    assert ending == Ending(found=3, ended=3, gone=True)
    assert tree.nobody_alive()
    assert 0.3 <= time.monotonic() - began < 5
    for proc in tree.procs.values():
        assert signals.names(proc.pid) == ["SIGTERM", "SIGSTOP", "SIGKILL"]


def test_returns_as_soon_as_all_are_gone(grow: Grow) -> None:
    tree = grow("child")
    began = time.monotonic()

    end(tree.lease, grace_s=30, deadline_s=60)

    assert time.monotonic() - began < 5


def test_wakes_a_stopped_process_so_that_it_can_obey(grow: Grow, signals: Signals) -> None:
    tree = grow("stopped")
    stopped = tree.procs["stopped"].pid

    ending = end(tree.lease, grace_s=30, deadline_s=60)

    assert ending.gone
    assert signals.names(stopped)[:2] == ["SIGTERM", "SIGCONT"]
    assert "SIGKILL" not in signals.names(stopped)


def test_two_trees_share_one_grace(grow: Grow, signals: Signals) -> None:
    trees = [grow("stubborn", "child") for _ in range(2)]

    endings = end_trees([tree.lease for tree in trees], grace_s=0.3, deadline_s=20)

    assert list(endings.values()) == [Ending(found=2, ended=2, gone=True)] * 2
    sent = [line["signal"] for line in signals.lines]
    assert sent == ["SIGTERM"] * 4 + ["SIGSTOP"] * 4 + ["SIGKILL"] * 4
    assert all(tree.nobody_alive() for tree in trees)


def test_a_grace_as_long_as_the_deadline_still_ends_in_killing(grow: Grow) -> None:
    tree = grow("stubborn")

    assert end(tree.lease, grace_s=2, deadline_s=2) == Ending(found=1, ended=1, gone=True)


def test_leaves_a_sibling_lease_alone(grow: Grow, signals: Signals) -> None:
    ours, sibling = grow("child", "daemon"), grow("child", "daemon")

    end(ours.lease)

    assert all(sibling.alive(role) for role in sibling.procs)
    assert signals.pids().isdisjoint(proc.pid for proc in sibling.procs.values())


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_reused_pid_is_a_stranger(grow: Grow, signals: Signals, off_by: int) -> None:
    stranger = grow("child", marked=False)
    ticks = stranger.procs["leader"].start_ticks + off_by

    ending = end(replace(stranger.lease, start_ticks=ticks))

    assert ending == Ending(gone=True)
    assert stranger.alive("leader")
    assert stranger.alive("child")
    assert signals.lines == []


def forge_prefix(lease: LeaseEvidence) -> LeaseEvidence:
    return replace(lease, cookie=lease.cookie[:16] + secrets.token_hex(8))


def forge_key(lease: LeaseEvidence) -> LeaseEvidence:
    return replace(lease, lease_key=lease.lease_key + 1_000_000)


def forge_short(lease: LeaseEvidence) -> LeaseEvidence:
    return replace(lease, cookie=lease.cookie[:16])


def forge_empty(lease: LeaseEvidence) -> LeaseEvidence:
    return replace(lease, cookie="")


@pytest.mark.parametrize("forge", [forge_prefix, forge_key, forge_short, forge_empty])
def test_half_a_cookie_proves_nothing(
    grow: Grow, signals: Signals, forge: Callable[[LeaseEvidence], LeaseEvidence]
) -> None:
    tree = grow("daemon")

    ending = end(forge(unrecorded(tree.lease)))

    assert ending == Ending(gone=True)
    assert tree.alive("daemon")
    assert signals.lines == []


@pytest.mark.parametrize("elsewhere", [{"boot_id": "another"}, {"pid_namespace": 1}])
def test_signals_nothing_for_another_boot_or_namespace(
    grow: Grow, signals: Signals, elsewhere: dict[str, str]
) -> None:
    tree = grow("child")

    ending = end(replace(tree.lease, **elsewhere))  # type: ignore[arg-type]

    assert ending == Ending(gone=True)
    assert tree.alive("leader")
    assert signals.lines == []


def test_tells_that_another_host_cannot_be_looked_at(grow: Grow, signals: Signals) -> None:
    tree = grow()

    ending = end(replace(tree.lease, host_id="elsewhere", boot_id="another"))

    assert ending.gone
    assert "another host (elsewhere)" in ending.refused[0]
    assert tree.alive("leader")
    assert signals.lines == []


def test_a_renamed_host_is_the_same_while_its_kernel_runs(grow: Grow) -> None:
    tree = grow()

    ending = end(replace(tree.lease, host_id="renamed"))

    assert ending == Ending(found=1, ended=1, gone=True)


def test_a_zombie_is_dead(grow: Grow, signals: Signals) -> None:
    tree = grow("zombie")

    ending = end(tree.lease)

    assert ending == Ending(found=1, ended=1, gone=True)  # the leader alone
    assert tree.procs["zombie"].pid not in signals.pids()


def test_an_unreaped_leader_is_dead(grow: Grow, signals: Signals) -> None:
    tree = grow()
    tree.end_leader(reap=False)

    assert end(tree.lease) == Ending(gone=True)
    assert signals.lines == []


def test_nothing_found_takes_two_scans_not_five(
    new_lease: Callable[[], LeaseEvidence], monkeypatch: pytest.MonkeyPatch
) -> None:
    scans: list[object] = []
    real = evidence.scan

    def scan(*args: set[int]) -> dict[int, evidence.Proc]:
        scans.append(args)
        return real(*args)

    monkeypatch.setattr(evidence, "scan", scan)

    endings = end_trees([new_lease() for _ in range(50)], grace_s=5, deadline_s=20)

    assert set(endings.values()) == {Ending(gone=True)}
    assert scans.count(()) == 2


def test_something_ended_takes_five_empty_scans(
    grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow()
    living: list[bool] = []
    real = evidence.scan

    def scan(*args: set[int]) -> dict[int, evidence.Proc]:
        if not args:
            living.append(tree.alive("leader"))
        return real(*args)

    monkeypatch.setattr(evidence, "scan", scan)

    end(tree.lease)

    assert living.count(False) >= 5


def test_finds_what_is_forked_during_the_grace(grow: Grow, signals: Signals) -> None:
    tree = grow("hydra")

    ending = end(tree.lease, grace_s=1)

    assert ending == Ending(found=2, ended=2, gone=True)
    late = next(line for line in signals.lines if line["evidence"] == "descent")
    assert late["signal"] == "SIGTERM"


def test_who_was_held_still_proves_its_children_when_its_own_proof_is_gone(
    grow: Grow, signals: Signals
) -> None:
    # The leader obeys SIGTERM; with it goes what tied the scrubbed one, and its late child, to us.
    tree = grow("scrubbed-hydra")
    hydra = tree.procs["scrubbed-hydra"].pid

    ending = end(tree.lease, grace_s=1)

    assert ending == Ending(found=3, ended=3, gone=True)
    late = signals.pids() - {proc.pid for proc in tree.procs.values()}
    assert [signals.names(pid) for pid in late] == [["SIGTERM"]]
    assert "SIGKILL" in signals.names(hydra)


def test_says_who_may_not_be_signalled(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = grow()

    def forbid(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(signal, "pidfd_send_signal", forbid)
    began = time.monotonic()
    ending = end(tree.lease, grace_s=0.1, deadline_s=30)

    assert (ending.found, ending.ended, ending.gone) == (1, 0, False)
    assert f"pid {tree.procs['leader'].pid} (leader) may not be signalled" in ending.refused[0]
    assert time.monotonic() - began < 10  # no use in waiting for the deadline


def test_says_who_survives_the_deadline(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = grow()
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: None)

    ending = end(tree.lease, grace_s=0.1, deadline_s=0.4)

    assert (ending.found, ending.ended, ending.gone) == (1, 0, False)
    assert "is alive after SIGKILL (state S)" in ending.refused[0]


def test_leaves_nothing_frozen_when_the_deadline_passes(grow: Grow, signals: Signals) -> None:
    tree = grow("stubborn")
    leader = tree.procs["leader"].pid

    def time_is_up_after_the_freeze() -> float:
        return 1.0 if "SIGSTOP" in signals.names(leader) else 0.0

    end_trees([tree.lease], grace_s=0, deadline_s=0.5, clock=time_is_up_after_the_freeze)

    assert signals.names(leader) == ["SIGSTOP", "SIGKILL"]


def test_ends_more_than_it_may_hold_descriptors_of(
    grow: Grow, signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow("stubborn", *["daemon"] * 20)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (32, 32))

    ending = end(tree.lease, grace_s=0.1)

    asked = [pid for pid in signals.pids() if "SIGTERM" in signals.names(pid)]
    assert len(asked) == 8  # a quarter of the limit; the others were held when these had ended
    assert ending == Ending(found=21, ended=21, gone=True)
    assert tree.nobody_alive()


def test_being_unable_to_look_is_not_an_empty_scan(
    grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow()

    def blind(*_: object) -> dict[int, evidence.Proc]:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(evidence, "scan", blind)
    ending = end(tree.lease, deadline_s=0.3)

    assert not ending.gone
    assert tree.alive("leader")


def test_who_cannot_be_held_is_not_gone(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = grow()

    def no_descriptor_left(_: int) -> int:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(os, "pidfd_open", no_descriptor_left)
    ending = end(tree.lease, deadline_s=0.3)
    monkeypatch.undo()

    assert not ending.gone
    assert tree.alive("leader")


def test_leaves_no_descriptor_open_of_survivors(
    grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow()
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: None)
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208

    end(tree.lease, grace_s=0, deadline_s=0.1)

    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_leaves_no_descriptor_open(grow: Grow) -> None:
    tree = grow("stubborn", "child", "daemon")
    before = set(os.listdir("/proc/self/fd"))  # noqa: PTH208

    end(tree.lease, grace_s=0.1)

    assert set(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_never_touches_itself_although_it_bears_the_cookie(
    new_lease: Callable[[], LeaseEvidence],
) -> None:
    lease = new_lease()

    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("sweep_once.py"), json.dumps(asdict(lease))],
        env={**os.environ, COOKIE_VARIABLE: lease.token},
        capture_output=True,
        timeout=30,
        check=True,
    )

    ending = json.loads(done.stderr)
    assert (ending["found"], ending["gone"]) == (0, False)
    assert "is this service" in ending["refused"][0]


def test_a_signal_goes_only_to_evidence_read_again(
    grow: Grow, signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow()
    real = evidence.scan

    def changed_since(*args: set[int]) -> dict[int, evidence.Proc]:
        """The full scan sees the leader; read again, its pid is somebody else's."""
        return {
            pid: replace(proc, start_ticks=proc.start_ticks + 1) if args else proc
            for pid, proc in real(*args).items()
        }

    monkeypatch.setattr(evidence, "scan", changed_since)
    monkeypatch.setattr(evidence, "cookies", lambda _: {})

    ending = end(tree.lease, deadline_s=0.3)

    assert signals.lines == []
    assert tree.alive("leader")
    assert not ending.gone


def test_every_signal_is_logged_with_its_reason(grow: Grow, signals: Signals) -> None:
    tree = grow("daemon")

    end(tree.lease)

    leader = next(line for line in signals.lines if line["pid"] == tree.procs["leader"].pid)
    daemon = next(line for line in signals.lines if line["pid"] == tree.procs["daemon"].pid)
    assert leader == {
        "event": "process.signalled",
        "pid": tree.procs["leader"].pid,
        "signal": "SIGTERM",
        "lease": tree.lease.lease_key,
        "run": tree.lease.run_key,
        "evidence": "leader",
    }
    assert daemon["evidence"] == "cookie"


def test_two_sweeps_of_one_lease_do_not_disturb_each_other(grow: Grow) -> None:
    tree = grow("child", "daemon")
    with ThreadPoolExecutor(2) as pool:
        endings = list(pool.map(end, [tree.lease, tree.lease]))

    assert [ending.gone for ending in endings] == [True, True]
    assert tree.nobody_alive()


def test_sweeping_twice_changes_nothing(grow: Grow) -> None:
    tree = grow("child")
    end(tree.lease)

    assert end(tree.lease) == Ending(gone=True)


def test_only_the_sweep_sends_signals() -> None:
    root = Path(sweep.__file__).parents[1]
    words = ("pidfd_send_signal", "os.kill", "killpg", "send_signal(", ".terminate(", ".kill(")
    senders = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if any(word in path.read_text("utf-8") for word in words)
    }

    # The demo ends the services that it started itself, through its own Popen.
    assert senders - {"cli/demo.py"} == {"process/sweep.py"}
