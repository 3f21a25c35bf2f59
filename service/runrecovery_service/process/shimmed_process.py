"""An agent process and the shim that guards it, with the pipes to both."""

from __future__ import annotations

import os
import select
import subprocess
import time
from dataclasses import field
from threading import Lock
from typing import IO, Final, cast

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process import wire
from runrecovery_service.process.launch_errors import LaunchFailed, ShimLost, launch_error
from runrecovery_service.process.shim_events import NotStarted, ShimEvent, Started, parse_event
from runrecovery_service.process.spool import Spool

SHIM_TIMEOUT_S: Final = 20.0
"""Longest wait for the shim to reach its gate, and then for the agent's start. Each takes some
20 ms."""


@dataclass(slots=True, kw_only=True, eq=False)
class ShimmedProcess:
    """An agent and its shim, with pipes to the agent's standard streams.

    The pipes are unbuffered, and blocking until an event loop first uses them. `close` and
    `dispose` close all of them.

    Attributes:
        popen: the shim, which leads a session of its own. The agent leads another one.
        start_ticks: the shim's start ticks.
        gate, report: the service's ends of the shim's two pipes.
        spool: standard output that was read from the agent and is not in the output file yet.
        watermarked: the tree carries the launch's watermark.
        agent: the event of the agent's start, None before it.
        unread_events: events that arrived together with the event that a caller waited for.
    """

    popen: subprocess.Popen[bytes]
    start_ticks: int
    gate: int
    report: int
    spool: Spool
    watermarked: bool = False
    agent: Started | None = field(default=None, init=False)
    unread_events: list[ShimEvent] = field(default_factory=list, init=False)
    _unparsed: bytes = field(default=b"", init=False, repr=False)
    _gate_open: bool = field(default=True, init=False)
    # The event loop must not write a heartbeat to a descriptor that a thread has just closed: its
    # number may already belong to a new file.
    _gate_lock: Lock = field(default_factory=Lock, init=False, repr=False)

    @property
    def pid(self) -> int:
        """Pid of the shim."""
        return self.popen.pid

    @property
    def stdin(self) -> IO[bytes]:
        """The pipe to the agent's standard input."""
        return cast("IO[bytes]", self.popen.stdin)

    @property
    def stdout(self) -> IO[bytes]:
        """The pipe from the agent's standard output."""
        return cast("IO[bytes]", self.popen.stdout)

    @property
    def stderr(self) -> IO[bytes]:
        """The pipe from the agent's standard error."""
        return cast("IO[bytes]", self.popen.stderr)

    def heartbeat(self, deadline_ns: int) -> bool:
        """Move the tree's deadline to `deadline_ns` (CLOCK_BOOTTIME); False if the shim is gone.

        If a stopped shim has let its pipe fill up, the heartbeat is dropped. That shim kills its
        tree once it continues. Returns True for a dropped heartbeat too.
        """
        return self._write_to_gate(b"%d\n" % deadline_ns)

    def _write_to_gate(self, line: bytes) -> bool:
        with self._gate_lock:
            if not self._gate_open:
                return False
            try:
                os.write(self.gate, line)
            except BlockingIOError:
                return True
            except OSError:
                return False
            return True

    def need_no_output(self) -> None:
        """Let the shim exit once its tree has ended, without saving more output of the agent."""
        self._write_to_gate(wire.DONE + b"\n")

    def leave_output(self) -> None:
        """Let the shim save the output that the output file lacks. The service reads no further."""
        self._write_to_gate(wire.LEFT + b"\n")

    def send_order(self, order: bytes) -> None:
        """Write the launch order to the shim.

        Raises:
            LaunchFailed: the shim did not read it in time.
            ShimLost: the shim is gone.
        """
        left = memoryview(order)
        until = time.monotonic() + SHIM_TIMEOUT_S
        os.set_blocking(self.gate, False)
        try:
            while left:
                if not _is_ready(self.gate, select.POLLOUT, until - time.monotonic()):
                    raise LaunchFailed(
                        f"the shim did not read its order within {SHIM_TIMEOUT_S:g} s"
                    )
                left = left[os.write(self.gate, left) :]
        except BrokenPipeError:
            raise ShimLost(f"the shim ended: {self._error_text()}") from None

    def release(self, deadline_ns: int) -> Started:
        """Let the shim start the agent, with `deadline_ns` as first deadline. Block for a few ms.

        Raises:
            LaunchFailed: the system refused to start it.
            LaunchDelayed: the system refused for a lack of descriptors, processes or memory.
            ShimLost: the shim is gone.
        """
        self._write_to_gate(b"%d\n%s\n" % (deadline_ns, wire.RELEASE))
        event = self.next_event()
        if isinstance(event, Started):
            self.agent = event
            return event
        if isinstance(event, NotStarted):
            raise launch_error(OSError(event.errno, event.reason), event.reason)
        raise LaunchFailed(f"shim: {event}")

    # -- events --------------------------------------------------------------------------------

    def next_event(self) -> ShimEvent:
        """Wait for one event of the shim. Call it only until the agent has started.

        Raises:
            LaunchFailed: no event came in time.
            ShimLost: the shim is gone.
        """
        until = time.monotonic() + SHIM_TIMEOUT_S
        while time.monotonic() < until:
            if not _is_readable(self.report, until - time.monotonic()):
                continue
            data = os.read(self.report, 4096)
            if not data:
                raise ShimLost(f"the shim ended: {self._error_text()}")
            events = self.parse_report(data)
            if events:
                self.unread_events += events[1:]
                return events[0]
        raise LaunchFailed(f"the shim reported nothing for {SHIM_TIMEOUT_S:g} s")

    def parse_report(self, data: bytes) -> list[ShimEvent]:
        """Return the events that are complete with these further bytes of the report."""
        *lines, self._unparsed = (self._unparsed + data).split(b"\n")
        return [parse_event(os.fsdecode(line)) for line in lines]

    def drain_report(self) -> list[ShimEvent]:
        """Return all events that have arrived, without waiting for more."""
        events, self.unread_events = self.unread_events, []
        while self.report >= 0 and _is_readable(self.report, 0):
            data = os.read(self.report, 4096)
            if not data:
                break
            events += self.parse_report(data)
        return events

    def _error_text(self) -> str:
        """Return the last line of standard error of a shim that has ended."""
        if not _is_readable(self.stderr.fileno(), 0):
            return "it reported no reason"
        lines = os.read(self.stderr.fileno(), 65536).decode("utf-8", "replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), "it reported no reason")

    # -- closing -------------------------------------------------------------------------------

    def close_report(self) -> None:
        """Close the report; later events are lost."""
        with self._gate_lock:
            if self.report >= 0:
                os.close(self.report)
                self.report = -1

    def close_gate(self) -> None:
        """Make the shim kill its whole tree and exit."""
        with self._gate_lock:
            if self._gate_open:
                self._gate_open = False
                os.close(self.gate)

    def close(self) -> None:
        """Close all pipes. The gate is one of them, so the shim kills all processes that live."""
        self.close_gate()
        self.close_report()
        for pipe in (self.stdin, self.stdout, self.stderr):
            pipe.close()
        self.spool.close()

    def dispose(self) -> None:
        """Close all pipes and reap the shim. Block until the shim has ended its tree and exited."""
        self.close()
        self.popen.wait()


def _is_readable(fd: int, seconds: float) -> bool:
    return _is_ready(fd, select.POLLIN, seconds)


def _is_ready(fd: int, event: int, seconds: float) -> bool:
    """Wait for the event on a descriptor; False after `seconds`.

    This uses poll, because select takes no descriptor above 1023.
    """
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(max(0.0, seconds) * 1000))
