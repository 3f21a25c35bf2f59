"""The clock for the deadlines of process trees. Heartbeats move these deadlines."""

from __future__ import annotations

import time


def boot_time_ns() -> int:
    """Return CLOCK_BOOTTIME, which also runs while the machine sleeps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
