"""Wait for conditions, with a bound for failing tests."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

PATIENCE_S: Final = 15.0
LEAST_PAUSE_S: Final = 0.005
MOST_PAUSE_S: Final = 0.1
LOOKS_SHARE: Final = 4
"""A pause is this many times as long as the look before it: what is waited for needs the processor
too."""
MOST_PAUSE_AFTER_LONG_LOOK_S: Final = 0.2
WAITED_SHARE: Final = 5
"""A pause is this part of the time waited so far: looks are few, and none comes a quarter late."""

T = TypeVar("T")


def patience_s() -> float:
    """Return how long a test waits: longer on a machine with more work than processors."""
    return PATIENCE_S * min(8.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def until(condition: Callable[[], T], what: str, *, timeout_s: float | None = None) -> T:
    """Return the first true result of `condition`; fail if there is none in time."""
    bound_s = patience_s() if timeout_s is None else timeout_s
    started = time.monotonic()
    while True:
        began = time.monotonic()
        answer = condition()
        if answer:
            return answer
        if began > started + bound_s:
            raise AssertionError(f"not within {bound_s:.0f} s: {what}")
        time.sleep(_pause_s(started, began))


async def until_async(condition: Callable[[], Awaitable[object]], what: str) -> None:
    """Wait until `condition` returns true; fail if it does not in time."""
    bound_s = patience_s()
    started = time.monotonic()
    while True:
        began = time.monotonic()
        if await condition():
            return
        if began > started + bound_s:
            raise AssertionError(f"not within {bound_s:.0f} s: {what}")
        await asyncio.sleep(_pause_s(started, began))


def _pause_s(started: float, began: float) -> float:
    """Return the pause after a look that began at `began`."""
    look_s, waited_s = time.monotonic() - began, began - started
    for_look_s = min(MOST_PAUSE_AFTER_LONG_LOOK_S, LOOKS_SHARE * look_s)
    return max(LEAST_PAUSE_S, for_look_s, min(MOST_PAUSE_S, waited_s / WAITED_SHARE))
