"""A sweep ends every process of a launch, and its shim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from process.sweeping import ESCAPEES, end, once_asked, only_root, unrecorded
from process.trees import Grow, Signals, Start, Tree, alive, until
from runrecovery_service.process import tree_ending
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.process.markers import LaunchMarkers
from runrecovery_service.process.tree_ending import end_trees


def orphaned(tree: Tree) -> Tree:
    """Kill shim and leader, so that only markers prove the rest."""
    tree.kill_shim()
    tree.end_leader()
    return tree


def test_kills_an_agent_and_its_children(grow: Grow) -> None:
    tree = grow("child", "child", "session")

    assert end(tree.lease) == Ending(found=4, ended=4, gone=True)
    assert tree.nobody_alive()


def test_kills_a_process_that_tries_to_escape(grow: Grow) -> None:
    tree = grow(*ESCAPEES, "renegade")

    ending = end(tree.lease)

    assert ending == Ending(found=11, ended=11, gone=True)
    assert ending.dead == tree.identities()
    assert tree.nobody_alive()


@pytest.mark.parametrize("known", [lambda lease: lease, unrecorded], ids=["recorded", "not"])
def test_kills_processes_that_a_dead_shim_and_a_dead_agent_left(
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
    """The renegade is in the agent's group and session, but has no marker."""
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
def test_kills_a_fork_storm_without_its_shim(
    grow: Grow, grace_s: float, manners: tuple[str, ...]
) -> None:
    tree = orphaned(grow(*manners, "storm"))

    ending = end(tree.lease, grace_s=min(grace_s, 0.2) if manners else grace_s)

    assert ending == Ending(found=301, ended=301, gone=True)
    assert tree.nobody_alive()


@pytest.mark.parametrize("grace_s", [0, 0.2])
@pytest.mark.parametrize("manners", [(), ("stubborn",)], ids=["meek", "stubborn"])
def test_kills_a_process_that_forks_and_exits_all_the_time_without_its_shim(
    grow: Grow, grace_s: float, manners: tuple[str, ...]
) -> None:
    tree = orphaned(grow(*manners, "flicker", "flicker", "flicker"))
    until(tree.processes_with_watermark)

    ending = end(tree.lease, grace_s=grace_s)

    assert ending.gone
    assert tree.nobody_alive()


@only_root
def test_kills_processes_of_another_user(grow: Grow) -> None:
    tree = orphaned(grow("other-user"))

    assert end(tree.lease) == Ending(found=1, ended=1, gone=True)
    assert tree.nobody_alive()


def test_kills_many_trees_together(grow: Grow) -> None:
    trees = [grow("stubborn", "child", "scrubbed-daemon") for _ in range(30)]
    for tree in trees[::3]:
        orphaned(tree)

    endings = end_trees([t.lease for t in trees], why="test", grace_s=0.2, deadline_s=60)

    assert {key: (one.found, one.ended, one.gone) for key, one in endings.items()} == {
        tree.lease.launch_key: (2, 2, True) if n % 3 == 0 else (3, 3, True)
        for n, tree in enumerate(trees)
    }
    assert all(tree.nobody_alive() for tree in trees)


def test_finds_a_process_that_is_forked_during_the_grace(grow: Grow, signals: Signals) -> None:
    tree = grow("hydra")

    ending = end(tree.lease, grace_s=1, clock=once_asked(signals, tree))

    assert ending == Ending(found=2, ended=2, gone=True)
    (late,) = signals.pids() - {tree.procs["leader"].pid}
    assert signals.names(late) == ["SIGTERM"]


def test_finds_a_process_that_a_scrubbed_one_forks_during_the_grace(
    grow: Grow, signals: Signals
) -> None:
    tree = grow("scrubbed-hydra")
    tree.kill_shim()

    ending = end(tree.lease, grace_s=1, clock=once_asked(signals, tree))

    assert ending == Ending(found=3, ended=3, gone=True)
    assert "SIGKILL" in signals.names(tree.procs["scrubbed-hydra"].pid)
    assert tree.nobody_alive()


def test_a_pinned_process_still_proves_its_children_after_its_own_proof_is_gone(
    grow: Grow, signals: Signals
) -> None:
    # At the SIGTERM it removes its watermark, its only marker, and forks.
    tree = orphaned(grow("turncoat-hydra"))
    hydra = tree.procs["turncoat-hydra"].pid
    del tree.procs["leader"]

    ending = end(tree.lease, grace_s=1, clock=once_asked(signals, tree))

    assert ending == Ending(found=2, ended=2, gone=True)
    (late,) = signals.pids() - {hydra}
    told = [line for line in signals.lines if line["pid"] == late]
    assert [(line["signal"], line["evidence"]) for line in told] == [("SIGTERM", "descent")]
    assert "SIGKILL" in signals.names(hydra)


@pytest.mark.parametrize("manners", [(), ("stubborn",)], ids=["meek", "stubborn"])
def test_a_healthy_shim_is_neither_signalled_nor_counted(
    grow: Grow, signals: Signals, manners: tuple[str, ...]
) -> None:
    tree = grow(*manners, "child", "daemon")

    ending = end(tree.lease, grace_s=0.2)

    assert ending == Ending(found=3, ended=3, gone=True)
    assert tree.shim.pid not in signals.pids()
    assert tree.shim_exit() == 0


def test_a_shim_without_a_tree_is_awaited_and_not_counted(grow: Grow, signals: Signals) -> None:
    tree = grow()
    tree.stop_shim()
    tree.end_leader()

    assert end(tree.lease) == Ending(gone=True)
    assert signals.names(tree.shim.pid) == ["SIGKILL"]
    assert not alive(tree.shim)


def test_a_stopped_shim_is_killed_after_its_whole_tree(
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
    monkeypatch.setattr(tree_ending, "log", log)
    ending = end(tree.lease, grace_s=0.2)

    assert ending == Ending(found=3, ended=3, gone=True)
    assert at_the_shims_signal == [True]
    assert log.lines[-1]["pid"] == tree.shim.pid
    assert (log.lines[-1]["signal"], log.lines[-1]["evidence"]) == ("SIGKILL", "shim")


def test_a_gated_shim_is_killed(start: Start, signals: Signals) -> None:
    """The service of the shim hangs, so the shim would wait for ever. It guards no agent yet."""
    tree = start(["/bin/true"], release=False)

    assert end(tree.lease) == Ending(gone=True)
    assert not alive(tree.shim)
    assert signals.pids() == {tree.shim.pid}
