"""Wait for conditions, with a bound for failing tests."""

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
    """Return how long a test waits: longer on a machine with more work than processors."""
    return PATIENCE_S * min(8.0, max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)))


def until(condition: Callable[[], T], what: str, *, timeout_s: float | None = None) -> T:
    """Return the first true result of `condition`; fail if there is none in time."""
    bound_s = patience_s() if timeout_s is None else timeout_s
    ends = time.monotonic() + bound_s
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > ends:
            raise AssertionError(f"not within {bound_s:.0f} s: {what}")
        time.sleep(LOOK_S)


async def until_async(condition: Callable[[], Awaitable[object]], what: str) -> None:
    """Wait until `condition` returns true; fail if it does not in time."""
    bound_s = patience_s()
    ends = time.monotonic() + bound_s
    while not await condition():
        if time.monotonic() > ends:
            raise AssertionError(f"not within {bound_s:.0f} s: {what}")
        await asyncio.sleep(LOOK_S)
