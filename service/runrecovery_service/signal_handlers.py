"""Acts on signals: a stop, an exit at the second stop signal, a reload. Reports to systemd."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import field
from typing import Final

import structlog

from runrecovery_service import early_signals
from runrecovery_service.background_stream import drain_stderr
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process import prctl
from runrecovery_service.reload import Reloader
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.systemd import SystemdNotifier

log = structlog.get_logger()

TWICE_REPORTED_S: Final = 0.05
"""For so long after its start, the event loop can report a signal that `early_signals` had kept."""
HANG_UP_SETTLES_S: Final = 0.5
"""Time after SIGHUP within which a terminal that was closed is gone."""


def prepare_process() -> None:
    """Protect this process from its agents, and handle its signals from now on."""
    if sys.platform == "linux":
        prctl.hide()  # agents of the same user must not open the service's ends of shim pipes
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent may have blocked signals
    early_signals.exit_at_once(serves=True)


@dataclass(slots=True)
class Signals:
    """The signal handlers of a running service."""

    stop: StopSignal
    request_reload: Callable[[], bool]
    _stops_requested: int = 0
    _were_held: set[int] = field(default_factory=set)
    _had_terminal: bool = field(default_factory=early_signals.had_terminal)

    def handle(self) -> None:
        """Install the handlers, and handle the signals that came before."""
        loop = asyncio.get_running_loop()
        for number in early_signals.STOP_SIGNALS:
            loop.add_signal_handler(number, self._receive_stop, number)
        for number in early_signals.HARMLESS_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                loop.add_signal_handler(number, self._receive_harmless, number)
        for kept in early_signals.take_held():
            stops = kept in early_signals.STOP_SIGNALS
            (self._request_stop if stops else self._receive_harmless)(kept)
            self._were_held.add(kept)
        loop.call_later(TWICE_REPORTED_S, self._were_held.clear)

    def _receive_stop(self, number: int) -> None:
        """Handle a stop signal, unless `early_signals` had kept the signal.

        For a moment at the start, a signal reaches both the handlers of the event loop and those of
        `early_signals`. It must count once.
        """
        if number in self._were_held:
            self._were_held.discard(number)
        else:
            self._request_stop(number)

    def _request_stop(self, number: int) -> None:
        self._stops_requested += 1
        times = self._stops_requested
        log.info("service.stop_asked", signal=signal.Signals(number).name, times=times)
        if times > 1:
            drain_stderr()
            os._exit(128 + number)  # at once: the next start recovers all unfinished runs
        self.stop.request()

    def _receive_harmless(self, number: int) -> None:
        """Reload at SIGHUP, unless the terminal was closed. Ignore the other harmless signals."""
        if number != signal.SIGHUP:
            log.info("service.signal_ignored", signal=signal.Signals(number).name)
        elif self._had_terminal:
            asyncio.get_running_loop().call_later(HANG_UP_SETTLES_S, self._stop_if_hung_up)
        else:
            self._reload()

    def _reload(self) -> None:
        if not self.request_reload():
            log.info("service.signal_ignored", signal=signal.SIGHUP.name)

    def _stop_if_hung_up(self) -> None:
        """Stop if the terminal was closed: no user can press Ctrl-C any more. Else reload."""
        if early_signals.has_terminal():
            self._reload()
        elif not self.stop.is_set():
            # SIGHUP is not counted: only a second stop signal may end the process at once.
            times = self._stops_requested
            log.info("service.stop_asked", signal=signal.SIGHUP.name, times=times)
            self.stop.request()


@dataclass(slots=True, kw_only=True, eq=False)
class Control:
    """Carries out signals and reloads, and informs systemd, while the service runs."""

    stop_signal: StopSignal
    reloader: Reloader
    systemd: SystemdNotifier

    def start(self) -> None:
        """Carry out signals and reloads from now on, also signals that `early_signals` had kept."""
        Signals(self.stop_signal, self.reloader.request).handle()
        self.systemd.start()
        self.reloader.start()

    async def stop_reloads(self) -> None:
        """Carry out no more reloads."""
        await self.reloader.stop()

    async def stop(self) -> None:
        """Send no more messages to systemd. Call this last: systemd watches the stop, too."""
        await self.systemd.stop()
