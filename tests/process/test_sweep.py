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
from typing import Any

import pytest
from process.trees import PATIENCE_S, Grow, Signals, Start, Tree, alive, strike, until
from runrecovery_service.process import procfs, sweep
from runrecovery_service.process.ending import Ending
from runrecovery_service.process.markers import COOKIE_VARIABLE, LaunchMarkers
from runrecovery_service.process.procfs import Proc
from runrecovery_service.process.sweep import end_trees

NewLease = Callable[[], LaunchMarkers]

ROOT = os.geteuid() == 0
only_root = pytest.mark.skipif(not ROOT, reason="only root may become another user")
ESCAPEES = ("child", "session", "daemon", "scrubbed", "scrubbed-session", "scrubbed-daemon",
            "undumpable", "escapee", "thread")  # fmt: skip


def end(
    lease: LaunchMarkers,
    *,
    grace_s: float = 5,
    deadline_s: float = 20,
    clock: Callable[[], float] = time.monotonic,
) -> Ending:
    endings = end_trees([lease], why="test", grace_s=grace_s, deadline_s=deadline_s, clock=clock)
    return endings[lease.launch_key]


def once(holds: Callable[[], bool]) -> Callable[[], float]:
    """A clock that starts when it holds: a busy machine's first look may outlast a short grace."""
    began: list[float] = []

    def clock() -> float:
        if not began and holds():
            began.append(time.monotonic())
        return time.monotonic() - began[0] if began else 0.0

    return clock


def once_asked(signals: Signals, *trees: Tree) -> Callable[[], float]:
    """A clock that starts when all have been sent SIGTERM."""
    everybody = [proc.pid for tree in trees for proc in tree.procs.values()]
    return once(lambda: all("SIGTERM" in signals.names(pid) for pid in everybody))


def launched_on(lease: LaunchMarkers, **host: Any) -> LaunchMarkers:
    """Return the markers as if they were of a launch on another host, boot or pid namespace."""
    return replace(lease, host=replace(lease.host, **host))


def unrecorded(lease: LaunchMarkers) -> LaunchMarkers:
    """The lease as a crash between the spawn and its recording leaves it."""
    return replace(lease, pid=None, start_ticks=None)


def orphaned(tree: Tree) -> Tree:
    """Kill shim and leader: what is left has nothing but its marks."""
    tree.kill_shim()
    tree.end_leader()
    return tree


# -- everything of ours ------------------------------------------------------------------------


def test_ends_an_agent_and_its_children(grow: Grow) -> None:
    tree = grow("child", "child", "session")

    assert end(tree.lease) == Ending(found=4, ended=4, gone=True)
    assert tree.nobody_alive()


def test_ends_who_tries_to_get_away(grow: Grow) -> None:
    tree = grow(*ESCAPEES, "renegade")

    ending = end(tree.lease)

    assert ending == Ending(found=11, ended=11, gone=True)
    assert ending.dead == tree.identities()
    assert tree.nobody_alive()


@pytest.mark.parametrize("known", [lambda lease: lease, unrecorded], ids=["recorded", "not"])
def test_ends_what_a_dead_shim_and_a_dead_agent_left(
    grow: Grow, known: Callable[[LaunchMarkers], LaunchMarkers]
) -> None:
    tree = orphaned(grow("stubborn", *ESCAPEES))

    ending = end(known(tree.lease), grace_s=0.1)

    assert ending == Ending(found=9, ended=9, gone=True)
    assert tree.nobody_alive()


@pytest.mark.parametrize("role", ["scrubbed-daemon", "escapee"])
def test_a_scrubbed_orphan_is_found_by_its_watermark(
    grow: Grow, signals: Signals, role: str
) -> None:
    tree = orphaned(grow(role))

    assert end(tree.lease) == Ending(found=1, ended=1, gone=True)
    assert not tree.alive(role)
    assert [line["evidence"] for line in signals.lines] == ["watermark"]


def test_a_scrubbed_orphan_without_a_watermark_is_not_touched(grow: Grow, signals: Signals) -> None:
    tree = orphaned(grow("scrubbed-daemon", "daemon"))

    ending = end(replace(unrecorded(tree.lease), watermark=None))

    assert ending == Ending(found=1, ended=1, gone=True)  # the daemon, by its cookie
    assert tree.alive("scrubbed-daemon")
    assert signals.pids() == {tree.procs["daemon"].pid}
    assert {line["evidence"] for line in signals.lines} == {"cookie"}


def test_neither_group_nor_session_proves_anything(grow: Grow, signals: Signals) -> None:
    """The renegade is in the agent's group and session, and nothing but that speaks against it."""
    tree = grow("renegade")
    tree.kill_shim()
    leader, renegade = tree.procs["leader"], tree.procs["renegade"]
    assert (renegade.group, renegade.session) == (leader.group, leader.session)

    ending = end(tree.lease)

    assert ending == Ending(found=1, ended=1, gone=True)
    assert tree.alive("renegade")
    assert renegade.pid not in signals.pids()


@pytest.mark.parametrize("grace_s", [0, 2])
@pytest.mark.parametrize("manners", [(), ("stubborn",)], ids=["meek", "stubborn"])
def test_ends_a_fork_storm_without_its_shim(
    grow: Grow, grace_s: float, manners: tuple[str, ...]
) -> None:
    tree = orphaned(grow(*manners, "storm"))

    ending = end(tree.lease, grace_s=min(grace_s, 0.2) if manners else grace_s)

    assert ending == Ending(found=301, ended=301, gone=True)
    assert tree.nobody_alive()


@pytest.mark.parametrize("grace_s", [0, 0.2])
@pytest.mark.parametrize("manners", [(), ("stubborn",)], ids=["meek", "stubborn"])
def test_ends_who_forks_and_exits_all_the_time_without_its_shim(
    grow: Grow, grace_s: float, manners: tuple[str, ...]
) -> None:
    tree = orphaned(grow(*manners, "flicker", "flicker", "flicker"))
    until(tree.bearers)

    ending = end(tree.lease, grace_s=grace_s)

    assert ending.gone
    assert tree.nobody_alive()


@only_root
def test_ends_processes_of_another_user(grow: Grow) -> None:
    tree = orphaned(grow("other-user"))

    assert end(tree.lease) == Ending(found=1, ended=1, gone=True)
    assert tree.nobody_alive()


def test_ends_many_trees_together(grow: Grow) -> None:
    trees = [grow("stubborn", "child", "scrubbed-daemon") for _ in range(30)]
    for tree in trees[::3]:
        orphaned(tree)

    endings = end_trees([t.lease for t in trees], why="test", grace_s=0.2, deadline_s=60)

    assert {key: (one.found, one.ended, one.gone) for key, one in endings.items()} == {
        tree.lease.launch_key: (2, 2, True) if n % 3 == 0 else (3, 3, True)
        for n, tree in enumerate(trees)
    }
    assert all(tree.nobody_alive() for tree in trees)


def test_finds_what_is_forked_during_the_grace(grow: Grow, signals: Signals) -> None:
    tree = grow("hydra")

    ending = end(tree.lease, grace_s=1, clock=once_asked(signals, tree))

    assert ending == Ending(found=2, ended=2, gone=True)
    (late,) = signals.pids() - {tree.procs["leader"].pid}
    assert signals.names(late) == ["SIGTERM"]


def test_finds_what_a_scrubbed_one_forks_during_the_grace(grow: Grow, signals: Signals) -> None:
    tree = grow("scrubbed-hydra")
    tree.kill_shim()

    ending = end(tree.lease, grace_s=1, clock=once_asked(signals, tree))

    assert ending == Ending(found=3, ended=3, gone=True)
    assert "SIGKILL" in signals.names(tree.procs["scrubbed-hydra"].pid)
    assert tree.nobody_alive()


def test_who_was_held_still_proves_its_children_when_its_own_proof_is_gone(
    grow: Grow, signals: Signals
) -> None:
    # At the SIGTERM it wipes off its watermark, the only thing that ties it to us, and forks.
    tree = orphaned(grow("turncoat-hydra"))
    hydra = tree.procs["turncoat-hydra"].pid
    del tree.procs["leader"]

    ending = end(tree.lease, grace_s=1, clock=once_asked(signals, tree))

    assert ending == Ending(found=2, ended=2, gone=True)
    (late,) = signals.pids() - {hydra}
    told = [line for line in signals.lines if line["pid"] == late]
    assert [(line["signal"], line["evidence"]) for line in told] == [("SIGTERM", "descent")]
    assert "SIGKILL" in signals.names(hydra)


# -- the shim ----------------------------------------------------------------------------------


@pytest.mark.parametrize("manners", [(), ("stubborn",)], ids=["meek", "stubborn"])
def test_a_healthy_shim_is_neither_signalled_nor_counted(
    grow: Grow, signals: Signals, manners: tuple[str, ...]
) -> None:
    tree = grow(*manners, "child", "daemon")

    ending = end(tree.lease, grace_s=0.2)

    assert ending == Ending(found=3, ended=3, gone=True)
    assert tree.shim.pid not in signals.pids()
    assert tree.shim_exit() == 0


def test_a_shim_that_guards_nobody_is_awaited_and_not_counted(grow: Grow, signals: Signals) -> None:
    tree = grow()
    tree.stop_shim()
    tree.end_leader()

    assert end(tree.lease) == Ending(gone=True)
    assert signals.names(tree.shim.pid) == ["SIGKILL"]
    assert not alive(tree.shim)


def test_a_stopped_shim_is_ended_after_all_of_its_tree(
    grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow("stubborn", "daemon", "escapee")
    tree.stop_shim()
    at_the_shims_signal: list[bool] = []

    class Log(Signals):
        def info(self, event: str, **facts: object) -> None:
            super().info(event, **facts)
            if facts["pid"] == tree.shim.pid:
                at_the_shims_signal.append(tree.nobody_alive())

    log = Log()
    monkeypatch.setattr(sweep, "log", log)
    ending = end(tree.lease, grace_s=0.2)

    assert ending == Ending(found=3, ended=3, gone=True)
    assert at_the_shims_signal == [True]
    assert log.lines[-1]["pid"] == tree.shim.pid
    assert (log.lines[-1]["signal"], log.lines[-1]["evidence"]) == ("SIGKILL", "shim")


def test_a_gated_shim_is_ended(start: Start, signals: Signals) -> None:
    """Nobody holds it any more but a service that hangs: it guards nothing, and must go."""
    tree = start(["/bin/true"], release=False)

    assert end(tree.lease) == Ending(gone=True)
    assert not alive(tree.shim)
    assert signals.pids() == {tree.shim.pid}


# -- nothing else ------------------------------------------------------------------------------


def test_leaves_a_sibling_lease_alone(grow: Grow, signals: Signals) -> None:
    ours, sibling = grow("child", "escapee"), grow("child", "escapee")

    end(ours.lease)

    assert all(sibling.alive(role) for role in sibling.procs)
    assert alive(sibling.shim)
    assert signals.pids() == {proc.pid for proc in ours.procs.values()}


def test_leaves_a_twin_alone(grow: Grow, signals: Signals, tmp_path: Path) -> None:
    """Same program, same words, same place, the shape of a tree of ours; but no mark."""
    ours = grow("child")
    command = Path(f"/proc/{ours.procs['leader'].pid}/cmdline").read_text().split("\0")[:-1]
    with subprocess.Popen(
        command, cwd=tmp_path, env={}, stdout=subprocess.PIPE, start_new_session=True
    ) as popen:
        assert popen.stdout is not None
        said = [popen.stdout.readline().split() for _ in range(2)]
        twins = [procfs.read_proc(int(pid)) for _, pid in said]
        try:
            end(ours.lease)

            assert [twin is not None and alive(twin) for twin in twins] == [True, True]
            assert signals.pids() == {proc.pid for proc in ours.procs.values()}
        finally:
            for twin in twins:
                assert twin is not None
                strike(twin, signal.SIGKILL)


@pytest.mark.parametrize("off_by", [-1, 1])
def test_a_reused_pid_is_a_stranger(
    grow: Grow, new_lease: NewLease, signals: Signals, off_by: int
) -> None:
    stranger = grow("child")
    leader = stranger.procs["leader"]

    ending = end(replace(new_lease(), pid=leader.pid, start_ticks=leader.start_ticks + off_by))

    assert ending == Ending(gone=True)
    assert stranger.alive("leader")
    assert stranger.alive("child")
    assert signals.lines == []


def forge_prefix(lease: LaunchMarkers) -> LaunchMarkers:
    return replace(lease, cookie=lease.cookie[:16] + secrets.token_hex(8))


def forge_key(lease: LaunchMarkers) -> LaunchMarkers:
    return replace(lease, launch_key=lease.launch_key + 1_000_000)


def forge_short(lease: LaunchMarkers) -> LaunchMarkers:
    return replace(lease, cookie=lease.cookie[:16])


def forge_empty(lease: LaunchMarkers) -> LaunchMarkers:
    return replace(lease, cookie="")


@pytest.mark.parametrize("forge", [forge_prefix, forge_key, forge_short, forge_empty])
@pytest.mark.parametrize("watermark", [None, 1])
def test_half_a_cookie_proves_nothing(
    grow: Grow,
    signals: Signals,
    forge: Callable[[LaunchMarkers], LaunchMarkers],
    watermark: int | None,
) -> None:
    tree = grow("daemon")
    off = None if watermark is None else (tree.lease.watermark or 0) + watermark

    ending = end(forge(replace(unrecorded(tree.lease), watermark=off)))

    assert ending == Ending(gone=True)
    assert tree.alive("daemon")
    assert signals.lines == []


def test_another_boot_is_gone_without_a_look(
    grow: Grow, signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow("child")

    def look() -> list[int]:
        raise AssertionError("looked")

    monkeypatch.setattr(procfs, "pids", look)
    ending = end(launched_on(tree.lease, boot_id="another"))

    assert ending == Ending(gone=True)
    assert tree.alive("leader")
    assert signals.lines == []


def test_a_pid_of_another_namespace_means_nothing(
    grow: Grow, new_lease: NewLease, signals: Signals
) -> None:
    stranger = grow("child")
    pid, start_ticks = stranger.shim.identity

    ending = end(
        replace(launched_on(new_lease(), pid_namespace=1), pid=pid, start_ticks=start_ticks)
    )

    assert ending == Ending(gone=True)
    assert stranger.alive("leader")
    assert alive(stranger.shim)
    assert signals.lines == []


def test_the_marks_of_another_namespace_mean_what_they_say(grow: Grow) -> None:
    # A service in a container shares the host's boot id; what it launched can be seen from here.
    tree = grow("daemon", "escapee")
    tree.kill_shim()

    ending = end(launched_on(tree.lease, pid_namespace=1))

    assert ending == Ending(found=3, ended=3, gone=True)
    assert tree.nobody_alive()


def test_tells_that_another_host_cannot_be_looked_at(grow: Grow, signals: Signals) -> None:
    tree = grow()

    ending = end(launched_on(tree.lease, host_id="elsewhere", boot_id="another"))

    assert ending.gone
    assert "another host (elsewhere)" in ending.refused[0]
    assert tree.alive("leader")
    assert signals.lines == []


def test_a_renamed_host_is_the_same_while_its_kernel_runs(grow: Grow) -> None:
    tree = grow()

    ending = end(launched_on(tree.lease, host_id="renamed"))

    assert ending == Ending(found=1, ended=1, gone=True)


def sweep_once(lease: LaunchMarkers, *words: str, **options: Any) -> dict[str, Any]:
    script = Path(__file__).with_name("sweep_once.py")
    done = subprocess.run(
        [sys.executable, script, json.dumps(asdict(lease)), *words],
        capture_output=True,
        timeout=PATIENCE_S,
        check=True,
        **options,
    )
    told: dict[str, Any] = json.loads(done.stderr)
    return told


@pytest.mark.parametrize("mark", ["cookie", "watermark"])
def test_never_touches_itself_although_it_bears_the_mark(new_lease: NewLease, mark: str) -> None:
    lease = new_lease()
    cookie = {COOKIE_VARIABLE: lease.token} if mark == "cookie" else {}
    words = ["marked"] if mark == "watermark" else []

    ending = sweep_once(lease, *words, env={**os.environ, **cookie})

    assert (ending["found"], ending["gone"]) == (0, False)
    assert f"({mark}) but is this service" in ending["refused"][0]


@only_root
def test_says_who_belongs_to_another_user_and_leaves_him(grow: Grow) -> None:
    tree = grow("escapee")
    tree.kill_shim()

    ending = sweep_once(tree.lease, "65534")

    assert (ending["found"], ending["ended"], ending["gone"]) == (2, 0, False)
    assert sorted(ending["refused"]) == sorted(
        f"pid {proc.pid} (watermark) may not be signalled by this user"
        for proc in tree.procs.values()
    )
    assert tree.alive("leader")
    assert tree.alive("escapee")


# -- reused pids, for real ---------------------------------------------------------------------


def _namespaces() -> bool:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
    writable = ["test", "-w", "/proc/sys/kernel/ns_last_pid"]
    try:
        done = subprocess.run([*command, *writable], capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


in_a_namespace = pytest.mark.skipif(
    not (ROOT and _namespaces()), reason="a pid namespace of our own takes root and unshare(1)"
)


def race(*words: str) -> dict[str, Any]:
    """Let pid_reuse.py swap a process of ours for an innocent one of the same pid."""
    script = Path(__file__).with_name("pid_reuse.py")
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, script,
         *words],
        capture_output=True,
        timeout=PATIENCE_S,
        check=True,
    )  # fmt: skip
    told: dict[str, Any] = json.loads(done.stdout)
    assert (told["swapped"], told["innocent"]) == (1, True)
    return told


@in_a_namespace
@pytest.mark.parametrize("grace_s", ["0", "0.2"])
@pytest.mark.parametrize("moment", ["before", "opening", "opened"])
def test_who_takes_the_pid_of_a_process_of_ours_is_not_touched(moment: str, grace_s: str) -> None:
    told = race(moment, grace_s)

    assert told["state"] not in {"T", "Z"}
    assert told["gone"]
    assert "sent" not in str(told["lines"])


@in_a_namespace
def test_the_shim_does_not_touch_who_takes_the_pid_of_a_descendant() -> None:
    assert race("shim", "0")["state"] not in {"T", "Z"}


@in_a_namespace
@pytest.mark.parametrize("left_out", ["prove", "send"])
def test_one_of_two_proofs_is_enough_to_save_an_innocent(left_out: str) -> None:
    assert race("opening", "0.2", left_out)["state"] not in {"T", "Z"}


@in_a_namespace
@pytest.mark.parametrize(
    "words",
    [("opening", "0.2", "prove", "send"), ("opening", "0", "send"), ("shim", "0", "send")],
    ids=["asked", "frozen", "shim"],
)
def test_without_the_proof_an_innocent_dies(words: tuple[str, ...]) -> None:
    """Or the tests above could not fail."""
    assert race(*words)["state"] == "Z"


# -- how they are ended ------------------------------------------------------------------------


def test_asks_before_it_kills(grow: Grow, signals: Signals) -> None:
    tree = grow("child")

    end(tree.lease)

    assert {line["signal"] for line in signals.lines} == {"SIGTERM"}
    assert signals.pids() == {proc.pid for proc in tree.procs.values()}


def test_kills_who_ignores_sigterm_after_the_grace(grow: Grow, signals: Signals) -> None:
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


def test_wakes_a_stopped_process_so_that_it_can_obey(grow: Grow, signals: Signals) -> None:
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
    """Call `note` before each look at everybody."""
    real = sweep._Sweep._scan

    def scan(self: sweep._Sweep) -> tuple[dict[int, Proc], dict[int, Any]]:
        note()
        return real(self)

    monkeypatch.setattr(sweep._Sweep, "_scan", scan)


def test_nothing_found_takes_two_scans_not_five(
    new_lease: NewLease, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    scans(monkeypatch, lambda: seen.append(True))

    endings = end_trees([new_lease() for _ in range(50)], why="test", grace_s=5, deadline_s=20)

    assert set(endings.values()) == {Ending(gone=True)}
    assert len(seen) == 2


def test_something_ended_takes_five_empty_scans(
    grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow()
    living: list[bool] = []
    scans(monkeypatch, lambda: living.append(tree.alive("leader")))

    end(tree.lease)

    assert living.count(False) >= 5


def test_ends_more_than_it_may_hold_descriptors_of(
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


# -- what could not be done --------------------------------------------------------------------


def test_says_who_may_not_be_signalled(
    grow: Grow, signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow()

    def forbid(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(signal, "pidfd_send_signal", forbid)
    began = time.monotonic()
    ending = end(tree.lease, grace_s=0.1, deadline_s=90)
    monkeypatch.undo()

    assert (ending.found, ending.ended, ending.gone) == (1, 0, False)
    assert f"pid {tree.procs['leader'].pid} (watermark) may not be signalled" in ending.refused[0]
    assert {line["outcome"] for line in signals.lines} == {"barred"}
    assert time.monotonic() - began < 60  # no use in waiting for the deadline


def test_says_who_survives_the_deadline(
    grow: Grow, signals: Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow()
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: None)
    times = {"SIGTERM": 0.2, "SIGKILL": 0.5}

    def clock() -> float:
        sent = max((times.get(str(line["signal"]), 0.0) for line in signals.lines), default=0.0)
        return sent if sent < times["SIGKILL"] else sent + time.monotonic() - began

    began = time.monotonic()
    ending = end(tree.lease, grace_s=0.1, deadline_s=0.4, clock=clock)
    monkeypatch.undo()

    assert (ending.found, ending.ended, ending.gone) == (1, 0, False)
    assert "is alive after SIGKILL (state " in ending.refused[0]


def test_leaves_nothing_frozen_when_the_deadline_passes(grow: Grow, signals: Signals) -> None:
    tree = grow("stubborn")
    leader = tree.procs["leader"].pid

    def time_is_up_after_the_freeze() -> float:
        return 1.0 if "SIGSTOP" in signals.names(leader) else 0.0

    end_trees(
        [tree.lease], why="test", grace_s=0, deadline_s=0.5, clock=time_is_up_after_the_freeze
    )

    assert signals.names(leader) == ["SIGSTOP", "SIGKILL"]


def test_being_unable_to_look_is_not_an_empty_scan(
    grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow()

    def blind() -> None:
        raise OSError(24, "Too many open files")

    scans(monkeypatch, blind)
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


@pytest.mark.parametrize("grace_s", [0, 5], ids=["frozen", "asked"])
def test_a_signal_goes_only_to_evidence_read_again(
    grow: Grow, signals: Signals, monkeypatch: pytest.MonkeyPatch, grace_s: float
) -> None:
    tree = grow()
    real = procfs.watermark
    seen: list[int] = []

    def once(pid: int) -> int | None:
        """Each process bears its mark when it is looked at first, and never again."""
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


# -- what it leaves and tells ------------------------------------------------------------------


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


def test_no_mark_is_ever_logged(grow: Grow, signals: Signals) -> None:
    tree = grow("daemon")

    ending = end(tree.lease)

    for told in (str(signals.lines), repr(ending), repr(tree.lease)):
        assert tree.lease.cookie not in told
        assert str(tree.lease.watermark) not in told


def test_there_is_one_place_that_sends_signals() -> None:
    root = Path(sweep.__file__).parents[1]
    words = ("pidfd_send_signal", "os.kill", "killpg", "send_signal(", ".terminate(", ".kill(")
    senders = {
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if any(word in path.read_text("utf-8") for word in words)
    }

    # The demo ends the services that it started itself, through its own Popen.
    assert senders - {"cli/demo/service_process.py"} == {"process/signals.py"}


def test_who_is_found_is_killed_though_the_first_look_outlasts_the_deadline(
    grow: Grow, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = grow("stubborn", "child", "escapee")
    skipped = [0.0]
    look = sweep._Sweep._scan_and_pin

    def look_slowly(self: sweep._Sweep) -> None:
        look(self)
        skipped[0] = 1000.0

    monkeypatch.setattr(sweep._Sweep, "_scan_and_pin", look_slowly)

    ending = end(tree.lease, grace_s=5, deadline_s=10, clock=lambda: time.monotonic() + skipped[0])

    assert tree.nobody_alive()
    assert ending.ended == ending.found == 3
