"""A launched tree, which tests read and signal without the code under test."""

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
from runrecovery_service.process.launch import OutputRest
from runrecovery_service.process.markers import LaunchMarkers
from runrecovery_service.process.procfs import Proc
from runrecovery_service.process.resource_limits import ResourceLimits
from runrecovery_service.process.shim_events import ShimEvent
from runrecovery_service.process.shimmed_process import ShimmedProcess
from support import waiting

PATIENCE_S = 60


def until(holds: Callable[[], object]) -> None:
    """Wait until a condition holds; fail if it does not in time."""
    waiting.until(holds, "it holds")


def alive(proc: Proc) -> bool:
    """Return whether this process lives, and not a later one with its pid."""
    now = procfs.read_proc(proc.pid)
    return now is not None and now.identity == proc.identity and not now.dead


def send_signal(proc: Proc, number: int) -> None:
    """Send a signal to this process, and not to a later one with its pid; fail if it is dead."""
    pidfd = os.pidfd_open(proc.pid)
    try:
        assert alive(proc)
        signal.pidfd_send_signal(pidfd, number)
    finally:
        os.close(pidfd)


def in_ns(seconds: float) -> int:
    """Return a deadline for a shim, this number of seconds from now."""
    return boot_time_ns() + int(seconds * 1e9)


@dataclass
class Tree:
    """A launched tree: the markers of its launch, and its processes by their printed roles."""

    process: ShimmedProcess
    lease: LaunchMarkers
    journal: Path
    shim: Proc
    procs: dict[str, Proc] = field(default_factory=dict)

    def alive(self, role: str) -> bool:
        """Return whether this process lives, and not a later one with its pid."""
        return alive(self.procs[role])

    def end_leader(self) -> None:
        """Kill the leader alone, and wait for its death."""
        send_signal(self.procs["leader"], signal.SIGKILL)
        until(lambda: not self.alive("leader"))

    def kill_shim(self) -> None:
        """Kill the shim alone; its tree lives on, unreaped."""
        send_signal(self.shim, signal.SIGKILL)
        self.process.popen.wait(PATIENCE_S)

    def stop_shim(self) -> None:
        """Stop the shim alone."""
        send_signal(self.shim, signal.SIGSTOP)
        until(lambda: self.shim_state() == "T")

    def shim_state(self) -> str:
        """Return the state of the shim, or "" once it was reaped."""
        now = procfs.read_proc(self.shim.pid)
        return now.state if now is not None else ""

    def shim_exit(self) -> int:
        """Wait for the shim's exit code."""
        return self.process.popen.wait(PATIENCE_S)

    def processes_with_watermark(self) -> list[Proc]:
        """Return the living processes with the watermark, without the shim."""
        return [
            proc
            for proc in processes_with_watermark(self.lease)
            if proc.identity != self.shim.identity
        ]

    def nobody_alive(self) -> bool:
        """Return whether the whole tree is dead.

        All known processes are dead, no other process has the watermark, and no process holds the
        inherited output. Only the last is certain: a scan may miss a process that forks and exits
        all the time.
        """
        return (
            not any(map(alive, self.procs.values()))
            and not self.processes_with_watermark()
            and self._fell_silent()
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
        """Return pid and start ticks of all known processes."""
        return {proc.identity for proc in self.procs.values()}

    def heard_everything(self) -> bool:
        """Return whether the shim has read everything from its gate."""
        unread = fcntl.ioctl(self.process.gate, termios.FIONREAD, b"\0" * 4)
        return not int.from_bytes(unread, sys.byteorder)

    def events(self, last: type[object] | None = None) -> list[ShimEvent]:
        """Read the events of the shim, up to an event of this kind or the end of its report."""
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
        rest: OutputRest | None = None,
    ) -> Tree: ...


class Grow(Protocol):
    """Launches a tree of the roles of tree.py."""

    def __call__(self, *roles: str, deadline_s: float = PATIENCE_S) -> Tree: ...


def processes_with_watermark(lease: LaunchMarkers) -> list[Proc]:
    """Return the living processes with the watermark of a launch."""
    # The newest first: a process that forks and exits all the time would outrun the scan.
    pids = sorted(procfs.pids(), reverse=True)
    found = [procfs.read_proc(pid) for pid in pids if procfs.watermark(pid) == lease.watermark]
    return [proc for proc in found if proc is not None and not proc.dead]


def clear_away(tree: Tree) -> None:
    """Kill everything of a tree, without the code under test."""
    popen = tree.process.popen
    if popen.poll() is None:  # our own child, and not reaped: its pid is its own
        popen.kill()
        popen.wait(PATIENCE_S)
    for proc in tree.procs.values():
        _kill(proc)
    until(lambda: _is_cleared(tree.lease))
    tree.process.dispose()


def _is_cleared(lease: LaunchMarkers) -> bool:
    left = processes_with_watermark(lease)
    for proc in left:
        _kill(proc)
    return not left


def _kill(proc: Proc) -> None:
    with suppress(ProcessLookupError, AssertionError):
        send_signal(proc, signal.SIGKILL)


class Signals:
    """Replaces the log of the sweep; keeps the logged signals, in order."""

    def __init__(self) -> None:
        self.lines: list[dict[str, object]] = []

    def info(self, event: str, **facts: object) -> None:
        """Keep a line of the log, in place of writing it."""
        self.lines.append({"event": event, **facts})

    warning = info

    def names(self, pid: object) -> list[object]:
        """Return the names of the signals that one process got, in order."""
        return [line["signal"] for line in self.lines if line["pid"] == pid]

    def pids(self) -> set[object]:
        """Return the pids that got a signal."""
        return {line["pid"] for line in self.lines}
