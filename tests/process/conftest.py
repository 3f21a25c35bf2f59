"""Real process trees, each of which lives for 60 s at most and is killed after its test."""

from __future__ import annotations

import itertools
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from process.trees import PATIENCE_S, Grow, Signals, Start, Tree, clear_away, in_ns
from runrecovery_service.process import procfs, tree_ending
from runrecovery_service.process.host import Host
from runrecovery_service.process.launch import OutputRest, prepare
from runrecovery_service.process.markers import COOKIE_VARIABLE, LaunchMarkers
from runrecovery_service.process.resource_limits import ResourceLimits
from runrecovery_service.process.watermark import watermark_bits

QUIET = {"stubborn", "hydra", "flicker"}
"""Roles of tree.py that print no line."""
_KEYS = itertools.count(1)


@pytest.fixture
def new_lease() -> Callable[[], LaunchMarkers]:
    """Make launch markers of this host without a recorded process."""

    def make() -> LaunchMarkers:
        here = Host.here()
        key = next(_KEYS)
        return LaunchMarkers(
            launch_key=key,
            run_key=1000 + key,
            cookie=secrets.token_hex(16),
            watermark=secrets.randbits(watermark_bits()),
            pid=None,
            start_ticks=None,
            host=here,
        )

    return make


@pytest.fixture
def start(new_lease: Callable[[], LaunchMarkers], tmp_path: Path) -> Iterator[Start]:
    """Launch commands behind shims; kill the rest of their trees afterwards."""
    trees: list[Tree] = []

    def make(
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        limits: ResourceLimits | None = None,
        deadline_s: float = PATIENCE_S,
        release: bool = True,
        rest: OutputRest | None = None,
    ) -> Tree:
        lease = new_lease()
        journal = tmp_path / f"journal{lease.launch_key}"
        process = prepare(
            command,
            markers=lease,
            cwd=cwd or tmp_path,
            env={COOKIE_VARIABLE: lease.token, **(env or {})},
            deadline_ns=in_ns(deadline_s),
            journal=journal,
            limits=limits,
            rest=rest,
        )
        shim = procfs.read_proc(process.pid)
        assert shim is not None
        lease = replace(lease, pid=process.pid, start_ticks=process.start_ticks)
        trees.append(Tree(process=process, lease=lease, journal=journal, shim=shim))
        if release:
            process.release(in_ns(deadline_s))
        return trees[-1]

    yield make
    for tree in trees:
        clear_away(tree)


@pytest.fixture
def grow(start: Start) -> Grow:
    """Launch trees of the roles of tree.py."""

    def make(*roles: str, deadline_s: float = PATIENCE_S) -> Tree:
        script = Path(__file__).with_name("tree.py")
        tree = start([sys.executable, "-S", str(script), *roles], deadline_s=deadline_s)
        for _ in [*(role for role in roles if role not in QUIET), "leader"]:
            role, pid = tree.process.stdout.readline().decode().split()
            proc = procfs.read_proc(int(pid))
            assert proc is not None
            tree.procs[role if role not in tree.procs else f"{role}{pid}"] = proc
        return tree

    return make


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Signals:
    """Record every signal that a sweep sends."""
    recorder = Signals()
    monkeypatch.setattr(tree_ending, "log", recorder)
    return recorder
