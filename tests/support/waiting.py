"""How tests wait: for a condition, and not for longer than a failing test may take."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

PATIENCE_S: Final = 15.0
LOOK_S: Final = 0.005

T = TypeVar("T")


def patience_s() -> float:
    """Return for how long a test waits; longer where there is more work than processors."""
    return PATIENCE_S * min(8.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def until(condition: Callable[[], T], what: str, *, timeout_s: float | None = None) -> T:
    """Return the first true answer of `condition`; fail when there is none in time."""
    bound_s = patience_s() if timeout_s is None else timeout_s
    ends = time.monotonic() + bound_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > ends:
            raise AssertionError(f"it did not come to pass within {bound_s:.0f} s: {what}")
        time.sleep(LOOK_S)


async def until_async(condition: Callable[[], Awaitable[object]], what: str) -> None:
    """Return once `condition` answers true; fail when it does not in time."""
    bound_s = patience_s()
    ends = time.monotonic() + bound_s
    while not await condition():
        if time.monotonic() > ends:
            raise AssertionError(f"it did not come to pass within {bound_s:.0f} s: {what}")
        await asyncio.sleep(LOOK_S)
