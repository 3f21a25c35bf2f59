"""A launched tree, and how a test looks at it and strikes it, without the code that is tested."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import sys
import termios
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from runrecovery_service.process import procfs
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.process.markers import LaunchMarkers
from runrecovery_service.process.procfs import Proc
from runrecovery_service.process.resource_limits import ResourceLimits
from runrecovery_service.process.shim_events import ShimEvent
from runrecovery_service.process.shimmed_process import ShimmedProcess
from support import waiting

PATIENCE_S = 60


def until(holds: Callable[[], object]) -> None:
    """Return once it holds; fail when it does not in time."""
    waiting.until(holds, "it holds")


def alive(proc: Proc) -> bool:
    """True while that very process lives."""
    now = procfs.read_proc(proc.pid)
    return now is not None and now.identity == proc.identity and not now.dead


def strike(proc: Proc, number: int) -> None:
    """Send a signal to that very process, or to nobody."""
    pidfd = os.pidfd_open(proc.pid)
    try:
        assert alive(proc)
        signal.pidfd_send_signal(pidfd, number)
    finally:
        os.close(pidfd)


def in_ns(seconds: float) -> int:
    """Return a deadline for a shim: so many seconds from now."""
    return boot_time_ns() + int(seconds * 1e9)


@dataclass
class Tree:
    """A launched tree: its lease as the store would have it, and who announced himself."""

    process: ShimmedProcess
    lease: LaunchMarkers
    journal: Path
    shim: Proc
    procs: dict[str, Proc] = field(default_factory=dict)

    def alive(self, role: str) -> bool:
        """True while that very process lives."""
        return alive(self.procs[role])

    def end_leader(self) -> None:
        """Kill the leader alone, and wait until he is dead."""
        strike(self.procs["leader"], signal.SIGKILL)
        until(lambda: not self.alive("leader"))

    def kill_shim(self) -> None:
        """Kill the shim alone: what it guarded goes on, and nobody reaps or ends it."""
        strike(self.shim, signal.SIGKILL)
        self.process.popen.wait(PATIENCE_S)

    def stop_shim(self) -> None:
        """Stop the shim alone."""
        strike(self.shim, signal.SIGSTOP)
        until(lambda: self.shim_state() == "T")

    def shim_state(self) -> str:
        """Return the state of the shim; empty once it was reaped."""
        now = procfs.read_proc(self.shim.pid)
        return now.state if now is not None else ""

    def shim_exit(self) -> int:
        """Wait for the shim's exit code."""
        return self.process.popen.wait(PATIENCE_S)

    def bearers(self) -> list[Proc]:
        """Return who bears the watermark and lives, the shim aside."""
        return [proc for proc in bearers(self.lease) if proc.identity != self.shim.identity]

    def nobody_alive(self) -> bool:
        """True when all that announced themselves are dead, nobody else bears the mark, and
        nobody holds the output that all of them inherit: of that the kernel is certain, while a
        scan may miss who forks and exits all the time."""
        return (
            not any(map(alive, self.procs.values())) and not self.bearers() and self._fell_silent()
        )

    def _fell_silent(self) -> bool:
        out = self.process.stdout.fileno()
        os.set_blocking(out, False)
        try:
            while os.read(out, 4096):
                pass
        except BlockingIOError:
            return False
        return True

    def identities(self) -> set[tuple[int, int]]:
        """Return pid and start ticks of all that announced themselves."""
        return {proc.identity for proc in self.procs.values()}

    def heard_everything(self) -> bool:
        """True when the shim has read all that was written into the gate."""
        unread = fcntl.ioctl(self.process.gate, termios.FIONREAD, b"\0" * 4)
        return not int.from_bytes(unread, sys.byteorder)

    def events(self, last: type[object] | None = None) -> list[ShimEvent]:
        """Read what the shim tells, up to an event of this kind or the end of its report."""
        told: list[ShimEvent] = []
        while True:
            while self.process.unread_events:
                told.append(self.process.unread_events.pop(0))
                if last is not None and isinstance(told[-1], last):
                    return told
            poll = select.poll()
            poll.register(self.process.report, select.POLLIN)
            assert poll.poll(PATIENCE_S * 1000), "the shim says nothing"
            data = os.read(self.process.report, 4096)
            if not data:
                return told
            self.process.unread_events += self.process.parse_report(data)


class Start(Protocol):
    """Launches a command behind a shim."""

    def __call__(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        limits: ResourceLimits | None = None,
        deadline_s: float = PATIENCE_S,
        release: bool = True,
    ) -> Tree: ...


class Grow(Protocol):
    """Launches a tree of the roles of tree.py."""

    def __call__(self, *roles: str, deadline_s: float = PATIENCE_S) -> Tree: ...


def bearers(lease: LaunchMarkers) -> list[Proc]:
    """Return who bears a lease's watermark and lives."""
    # The newest first: who forks and exits all the time would run ahead of us.
    pids = sorted(procfs.pids(), reverse=True)
    found = [procfs.read_proc(pid) for pid in pids if procfs.watermark(pid) == lease.watermark]
    return [proc for proc in found if proc is not None and not proc.dead]


def clear_away(tree: Tree) -> None:
    """End everything of a tree, without the code that is tested."""
    popen = tree.process.popen
    if popen.poll() is None:  # our own child, and not reaped: its pid is its own
        popen.kill()
        popen.wait(PATIENCE_S)
    for proc in tree.procs.values():
        _put_down(proc)
    until(lambda: _nobody_left(tree.lease))
    tree.process.dispose()


def _nobody_left(lease: LaunchMarkers) -> bool:
    left = bearers(lease)
    for proc in left:
        _put_down(proc)
    return not left


def _put_down(proc: Proc) -> None:
    with suppress(ProcessLookupError, AssertionError):
        strike(proc, signal.SIGKILL)


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
