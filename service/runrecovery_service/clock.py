"""The one place that reads clocks. All other code gets a `Clock`, or a time, as an argument."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Final

from runrecovery_service.domain.steady_time import Due, SteadyTime

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_TIME_NAMESPACE: Final = Path("/proc/self/ns/time")
_MICROSECOND: Final = timedelta(microseconds=1)


class Clock:
    """The time, read from the system. A test replaces it with `support.clock.FakeClock`."""

    def now(self) -> datetime:
        """Return the wall-clock time, aware, in UTC."""
        return datetime.now(UTC)

    def steady(self) -> SteadyTime:
        """Return the time of a clock that cannot be set.

        The clock starts at the boot of the machine. It also runs while the machine sleeps. Restarts
        of the service do not affect it.
        """
        boottime_us = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000
        return SteadyTime(clock=_steady_clock_name(), us=boottime_us)

    def due_in(self, seconds: float) -> Due:
        """Return the deadline in `seconds` from now, as a time of both clocks."""
        span = timedelta(seconds=seconds)
        steady = self.steady()
        return Due(at=self.now() + span, clock=steady.clock, us=steady.us + span // _MICROSECOND)


def loop_time_s() -> float:
    """Return the time of the running event loop, which measures pauses and time limits."""
    return asyncio.get_running_loop().time()


async def wait_within(event: asyncio.Event, seconds: float) -> bool:
    """Wait for an event for at most `seconds`, and return whether the event was set."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


@cache
def _steady_clock_name() -> str:
    """Return the clock's name: the boot id, and the time namespace, which can shift the clock."""
    boot_id = _BOOT_ID.read_text("ascii").strip()
    try:
        return f"{boot_id}/{_TIME_NAMESPACE.stat().st_ino}"
    except OSError:  # a kernel without time namespaces
        return boot_id
