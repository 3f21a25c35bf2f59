"""The clocks, in one place. Everything else takes the time as an argument."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Final

from runrecovery_service.domain.deadline import Due, SteadyTime

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_TIME_NAMESPACE: Final = Path("/proc/self/ns/time")


def utc_now() -> datetime:
    """Return the time now by the wall clock, aware, in UTC."""
    return datetime.now(UTC)


def steady_now() -> SteadyTime:
    """Return the time now by the clock that nobody sets: it runs from the boot of the machine,
    also while that sleeps, and through restarts of the service."""
    return SteadyTime(clock=_steady_clock(), us=time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000)


def due_in(seconds: float) -> Due:
    """Return the deadline that is `seconds` away."""
    span = timedelta(seconds=seconds)
    steady = steady_now()
    return Due(at=utc_now() + span, clock=steady.clock, us=steady.us + span // _MICROSECOND)


async def set_within(seconds: float, event: asyncio.Event) -> bool:
    """Wait for an event, not for longer than that; return whether it came."""
    try:
        async with asyncio.timeout(seconds):
            return await event.wait()
    except TimeoutError:
        return False


_MICROSECOND: Final = timedelta(microseconds=1)


@cache
def _steady_clock() -> str:
    """Name the clock: the boot that it runs from, and the time namespace that may shift it."""
    boot_id = _BOOT_ID.read_text("ascii").strip()
    try:
        return f"{boot_id}/{_TIME_NAMESPACE.stat().st_ino}"
    except OSError:  # a kernel without time namespaces
        return boot_id
