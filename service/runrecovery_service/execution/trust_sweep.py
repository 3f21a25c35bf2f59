"""Removes trust entries that no run needs any more, while the service runs.

A turn that ends its run removes the run's entry itself. The sweep removes the entries of runs that
ended without a process, of earlier attempts and of dead services, and entries whose removal has
failed.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import field
from time import monotonic
from typing import Final

import structlog

from runrecovery_service.agents.trust_keeper import LEFT, TrustKeeper
from runrecovery_service.execution.blocking import run_blocking
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.periodic import Backoff, PeriodicTask
from runrecovery_service.stop_signal import StopSignal

log = structlog.get_logger()

SWEEP_INTERVAL_S: Final = 2.0
"""Pause between sweeps. A sweep takes less than a millisecond if there is nothing to remove."""
LOCK_WAIT_S: Final = 1.0
"""How long a sweep waits for the lock of one file, before it leaves the file to the next sweep."""
PAUSE_FIRST_S, PAUSE_MOST_S = 4.0, 60.0
"""The first and the longest pause, in seconds, before an edit that failed is tried again."""


@dataclass(slots=True)
class _Delay:
    """Postpones the next edit of a file that could not be edited.

    Attributes:
        until: the time of the next edit, by the clock `TrustSweep.time`.
    """

    backoff: Backoff
    until: float


@dataclass(slots=True, kw_only=True, eq=False)
class TrustSweep:
    """Sweeps until it is stopped, also in safe mode, because it launches nothing."""

    keeper: TrustKeeper
    threads: Executor
    stop_signal: StopSignal
    time: Callable[[], float] = monotonic
    _loop: PeriodicTask = field(init=False)
    _delays: dict[str, _Delay] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._loop = PeriodicTask(
            name="trust-sweep",
            step=self.sweep,
            interval_s=SWEEP_INTERVAL_S,
            failure_event="trust.sweep_failed",
            stop_signal=self.stop_signal,
        )

    def start(self) -> None:
        """Start the sweeps."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop the sweeps, after the edit that is under way."""
        await self._loop.finish()

    async def sweep(self) -> None:
        """Do one sweep: remove the entries that no run needs any more."""
        found = await run_blocking(self.threads, self.keeper.stale_files)
        now = self.time()
        self._delays = {file: delay for file, delay in self._delays.items() if file in found}
        for file in found:
            delay = self._delays.get(file)
            if self._loop.is_stopping:
                return
            if delay is None or delay.until <= now:
                await self._clear(file)

    async def _clear(self, file: str) -> None:
        cleared = await run_blocking(
            self.threads,
            lambda: self.keeper.remove_stale_in(
                file, lock_wait_s=LOCK_WAIT_S, should_stop=lambda: self._loop.is_stopping
            ),
        )
        for reason in cleared.kept:
            if reason != LEFT:
                log.warning("trust.entry_kept", file=file, reason=reason)
        delay = self._delays.pop(file, None)
        if not cleared.failures:
            return
        if delay is None:  # logged once, not in every sweep
            for reason in cleared.failures:
                log.warning("trust.entry_kept", file=file, reason=reason)
            delay = _Delay(Backoff(PAUSE_FIRST_S, PAUSE_MOST_S), 0.0)
        delay.until = self.time() + delay.backoff.next_s()
        self._delays[file] = delay
