"""Reports to systemd that the service is alive, what it waits for, and when it serves.

The protocol is sd_notify(3): datagrams to the socket that NOTIFY_SOCKET names.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import field
from time import CLOCK_MONOTONIC, clock_gettime_ns
from typing import Final, Self

import structlog

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc.gate import Gate, ServiceState

log = structlog.get_logger()

INTERVAL_S: Final = 5.0
"""The longest pause between two messages."""
EXTENSION_S: Final = 30.0
"""How far each message during a start or a stop extends the time limit of systemd. A service that
hangs sends no message, so systemd ends it after this time."""

_STATUS: Final[Mapping[ServiceState, str]] = {
    ServiceState.RECOVERING: "recovering the runs of earlier starts",
    ServiceState.RECOVERY_FAILED: "the recovery failed, and will be tried again",
    ServiceState.SERVING: "serving",
    ServiceState.DRAINING: "stopping",
}


@dataclass(slots=True, kw_only=True, eq=False)
class SystemdNotifier:
    """Sends the state of the service at each change, and at least every `INTERVAL_S`.

    The event loop sends the messages, so that systemd's watchdog notices a loop that hangs.

    Attributes:
        address: the socket of systemd; empty: no message is sent.
        watchdog_s: systemd ends the service after this many seconds without a message; None: never.
    """

    gate: Gate
    address: str
    watchdog_s: float | None
    _task: asyncio.Task[None] | None = field(default=None, init=False)
    _channel: socket.socket | None = field(default=None, init=False)
    _ready: bool = field(default=False, init=False)
    _failed: bool = field(default=False, init=False)
    _reload_refused: bool = field(default=False, init=False)

    @classmethod
    def from_environment(cls, gate: Gate, environ: Mapping[str, str]) -> Self:
        """Return the notifier that the environment variables of systemd ask for."""
        watchdog_s = None
        if environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
            with suppress(ValueError):
                watchdog_s = int(environ.get("WATCHDOG_USEC", "")) / 1e6
        return cls(gate=gate, address=environ.get("NOTIFY_SOCKET", ""), watchdog_s=watchdog_s)

    @property
    def _path(self) -> str:
        """The address as the `socket` module expects it: an abstract address begins with a NUL."""
        return f"\0{self.address[1:]}" if self.address.startswith("@") else self.address

    def start(self) -> None:
        """Send messages from now on, if systemd has given an address."""
        if self.address:
            # Kept open, so that messages to the watchdog continue when no descriptor is left.
            self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            self._channel.settimeout(0)
            self._task = asyncio.create_task(self._run(), name="systemd")

    async def stop(self) -> None:
        """Send no more messages."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def begin_reload(self) -> None:
        """Report to systemd that the configuration is being reloaded."""
        # Only an active unit may reload, and the unit is active only while the service serves.
        if self._ready and self.gate.state is ServiceState.SERVING:
            now_us = clock_gettime_ns(CLOCK_MONOTONIC) // 1000
            self._send([f"RELOADING=1\nMONOTONIC_USEC={now_us}"])

    def end_reload(self, *, refused: bool) -> None:
        """Report that the reload has ended. If it was refused, the status text says so."""
        self._reload_refused = refused
        if self._ready and not self.gate.draining:
            self._send([*self.message(), "READY=1"])

    async def _run(self) -> None:
        interval_s = min(INTERVAL_S, (self.watchdog_s or INTERVAL_S) / 2)
        while True:
            change = self.gate.change
            self._send(self.message())
            await self.gate.wait(change, timeout_s=interval_s)

    def message(self) -> list[str]:
        """Return the assignments of the next message."""
        state = self.gate.state
        lines = [f"STATUS={self._status(state)}"]
        if state is ServiceState.SERVING and not self._ready:
            self._ready = True
            lines.append("READY=1")
        if state is ServiceState.DRAINING:
            lines.append("STOPPING=1")
        if state is not ServiceState.SERVING:
            lines.append(f"EXTEND_TIMEOUT_USEC={int(EXTENSION_S * 1e6)}")
        if self.watchdog_s is not None:
            lines.append("WATCHDOG=1")
        return lines

    def _status(self, state: ServiceState) -> str:
        status = _STATUS[state]
        if state is ServiceState.SERVING and not self.gate.storage_answers:
            return f"{status}; the database does not answer"
        if state is ServiceState.SERVING and not self.gate.listens:
            return f"{status}; another process has the listen address"
        if state is ServiceState.SERVING and self._reload_refused:
            return f"{status}; the last reload was refused, and the log says why"
        if state is ServiceState.DRAINING and not self.gate.ends_streams:
            return f"{status}; turns under way may end by themselves"
        return status

    def _send(self, lines: list[str]) -> None:
        if self._channel is None:
            return
        try:
            self._channel.sendto("\n".join(lines).encode(), self._path)
        except OSError as error:  # systemd may be restarting, or its socket may be full
            if not self._failed:
                log.warning("service.systemd_not_notified", error=error.strerror)
            self._failed = True
        else:
            self._failed = False
