"""Checks the wall clock before anything is removed by its time: a removal cannot be undone.

The time is confirmed if it is at most a day after the latest confirmed time. A time further ahead
is confirmed only after the service has run for an hour in which the clock was not set.
"""

from __future__ import annotations

from dataclasses import field
from datetime import datetime, timedelta
from typing import Final

import structlog

from runrecovery_service.clock import Clock
from runrecovery_service.domain.steady_time import SteadyTime
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import retention
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.instances import Owner

log = structlog.get_logger()

LEAP: Final = timedelta(days=1)
"""How far the time may be ahead of the latest confirmed time, as after a stop of the service."""
WAIT: Final = timedelta(hours=1)
"""How long the clock must run after a leap without being set. NTP corrects a clock in minutes."""
STEP: Final = timedelta(minutes=1)
"""How far wall clock and steady clock may diverge during `WAIT`."""
RECORD_EVERY: Final = timedelta(hours=1)


@dataclass(slots=True, kw_only=True, eq=False)
class TimeCheck:
    """Decides whether the time of the wall clock is confirmed."""

    storage: Storage
    owner: Owner
    clock: Clock
    _confirmed: datetime | None = field(default=None, init=False)
    _recorded: datetime | None = field(default=None, init=False)
    _leapt: tuple[datetime, SteadyTime] | None = field(default=None, init=False)

    async def is_confirmed(self) -> bool:
        """Return whether the present time is confirmed; log changes of the result."""
        now, steady = self.clock.now(), self.clock.steady()
        if self._confirmed is None:
            known = await self.storage.read(retention.confirmed_time, self.owner)
            self._confirmed = self._recorded = known or now
        if now - self._confirmed > LEAP and not self._has_run_on(now, steady):
            return False
        if self._leapt is not None:
            log.info("retention.resumed")
        self._confirmed, self._leapt = now, None
        if self._recorded is None or abs(now - self._recorded) >= RECORD_EVERY:
            await self.storage.write_own(retention.confirm_time, owner=self.owner, now=now)
            self._recorded = now
        return True

    def _has_run_on(self, now: datetime, steady: SteadyTime) -> bool:
        if self._leapt is not None:
            wall, begun = self._leapt
            waited = timedelta(microseconds=steady.us - begun.us)
            if abs(now - wall - waited) <= STEP:
                return waited >= WAIT
        log.warning("retention.paused", confirmed=str(self._confirmed), found=str(now))
        self._leapt = now, steady
        return False
