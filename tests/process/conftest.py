"""Real process trees of our own making. Each lives 60 s at most and is ended after its test."""

from __future__ import annotations

import itertools
import os
import secrets
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from runrecovery_service.process import evidence, sweep
from runrecovery_service.process.evidence import COOKIE_VARIABLE, Host, LeaseEvidence
from runrecovery_service.process.launch import LaunchedProcess, dispose, launch

_KEYS = itertools.count(1)


@dataclass
class Tree:
    """A launched tree: its lease as the store would have it, and who announced himself."""

    process: LaunchedProcess
    lease: LeaseEvidence
    procs: dict[str, evidence.Proc]

    def alive(self, role: str) -> bool:
        """True while that very process lives."""
        return alive(self.procs[role])

    def end_leader(self, *, reap: bool) -> None:
        """Kill the leader alone; unless reaped it stays a zombie."""
        self.process.popen.kill()
        os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOWAIT)
        if reap:
            self.process.popen.wait()

    def nobody_alive(self) -> bool:
        """True when all that announced themselves are dead."""
        return not any(map(alive, self.procs.values()))


def alive(proc: evidence.Proc) -> bool:
    """True while that very process lives."""
    now = evidence.read_proc(proc.pid)
    return now is not None and now.identity == proc.identity and not now.dead


@pytest.fixture
def new_lease() -> Callable[[], LeaseEvidence]:
    """Make leases of this host whose process is not recorded."""

    def make() -> LeaseEvidence:
        here = Host.here()
        key = next(_KEYS)
        return LeaseEvidence(
            lease_key=key,
            run_key=1000 + key,
            cookie=secrets.token_hex(16),
            pid=None,
            start_ticks=None,
            boot_id=here.boot_id,
            pid_namespace=here.pid_namespace,
            host_id=here.host_id,
        )

    return make


@pytest.fixture
def grow(new_lease: Callable[[], LeaseEvidence], tmp_path: Path) -> Iterator[Callable[..., Tree]]:
    """Launch trees of the roles of tree.py; end what is left of them afterwards."""
    trees: list[Tree] = []

    def make(*roles: str, marked: bool = True) -> Tree:
        lease = new_lease()
        mark = {COOKIE_VARIABLE: lease.token} if marked else {}
        script = Path(__file__).with_name("tree.py")
        command = [sys.executable, "-S", str(script), *roles]
        process = launch(command, cwd=tmp_path, env=mark)
        tree = Tree(
            process=process,
            lease=replace(lease, pid=process.pid, start_ticks=process.start_ticks),
            procs={},
        )
        trees.append(tree)
        for _ in [*(role for role in roles if role not in {"stubborn", "hydra"}), "leader"]:
            role, pid = process.stdout.readline().decode().split()
            proc = evidence.read_proc(int(pid))
            assert proc is not None
            tree.procs[role if role not in tree.procs else f"{role}{pid}"] = proc
        return tree

    yield make
    for tree in trees:
        for proc in tree.procs.values():
            _put_down(proc)
        if tree.process.popen.returncode is None:
            tree.process.popen.kill()
        dispose(tree.process)


def _put_down(proc: evidence.Proc) -> None:
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(proc.pid)
        try:
            if alive(proc):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        finally:
            os.close(pidfd)


class Signals:
    """Stands in for the sweep's log: what was signalled, in order."""

    def __init__(self) -> None:
        self.lines: list[dict[str, object]] = []

    def info(self, event: str, **facts: object) -> None:
        """Keep a line."""
        self.lines.append({"event": event, **facts})

    warning = info

    def names(self, pid: object) -> list[object]:
        """Return what one process was sent."""
        return [line["signal"] for line in self.lines if line["pid"] == pid]

    def pids(self) -> set[object]:
        """Return who was sent anything."""
        return {line["pid"] for line in self.lines}


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> Signals:
    """Record every signal that a sweep sends."""
    recorder = Signals()
    monkeypatch.setattr(sweep, "log", recorder)
    return recorder
