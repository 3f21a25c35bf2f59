"""Answers the refused calls of a caller at a bounded rate.

A refused call costs at least 0.1 ms of processor time. A caller that is refused at once can call
again at once, and so slow down every other caller. So refusals beyond a rate wait, which slows down
a caller that calls without a pause.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Final

from runrecovery_service.clock import wait_within

REFUSALS_PER_S: Final = 100.0
"""How many refusals of one caller are answered in a second. All unknown callers count as one. A
hundred refusals take some 3% of a processor."""
MAX_WAITING: Final = 500
"""The most waiting refusals of one caller: less than half of a connection's streams by default."""
MAX_WAIT_S: Final = 1.0
"""The longest wait. A refusal that can be retried names the same time in its RetryInfo."""

ROUNDING_S: Final = 1e-6
"""The tolerance for sums of intervals. Without it, thirds of a second would make a burst one event
shorter."""


class Rate:
    """Spaces events evenly: at most `per_s` in each second. The caller gives the time.

    Args:
        burst: how many events may come at once after a quiet time.
    """

    def __init__(self, per_s: float, *, burst: int = 1) -> None:
        self._interval_s = 1 / per_s
        self._lead_s = (burst - 1) * self._interval_s
        self._next_s = -float("inf")

    def take(self, now_s: float, *, within_s: float = 0.0) -> float | None:
        """Return the seconds until the next event may happen, and count the event.

        If that is more than `within_s` seconds, return None and count nothing, so that an event
        that does not happen delays no later one.
        """
        wait_s = self.wait_s(now_s)
        if wait_s > within_s:
            return None
        self._next_s = max(self._next_s, now_s - self._lead_s) + self._interval_s
        return wait_s

    def wait_s(self, now_s: float) -> float:
        """Return the seconds until the next event may happen. Count nothing."""
        wait_s = self._next_s - now_s
        return wait_s if wait_s > ROUNDING_S else 0.0


class RefusalPace:
    """Delays refusals. Use it on the event loop.

    The first refusal after a quiet time is answered at once: an error of a person or a test is seen
    immediately, and only repeated ones cost others anything.

    A waiting refusal keeps its request in memory, and occupies a stream of its connection. Behind a
    proxy, other callers share the streams of this connection. So the number of waiting refusals is
    bounded. Further refusals are answered at once: they cost processor time, but no memory.

    Args:
        max_waiting: the most refusals of one caller that wait at one time. Of all callers: twice as
            many.
        per_s: refusals of one caller that are answered in a second.
        max_wait_s: the longest wait. If more than `per_s * max_wait_s` refusals of one caller
            wait, each of them waits that long.
    """

    def __init__(
        self,
        *,
        max_waiting: int = MAX_WAITING,
        per_s: float = REFUSALS_PER_S,
        max_wait_s: float = MAX_WAIT_S,
    ) -> None:
        self._per_s = per_s
        self._max_wait_s = max_wait_s
        self._max_waiting = max_waiting
        self._rates: dict[str, Rate] = {}
        self._waiting: Counter[str] = Counter()
        self._ended = asyncio.Event()

    @property
    def waiting(self) -> int:
        """How many refusals wait now."""
        return self._waiting.total()

    async def wait(self, caller: str) -> None:
        """Wait until a refusal of this caller is to be answered, for at most `max_wait_s`.

        Args:
            caller: the name of the caller; empty for all unknown callers.
        """
        if not self._has_room(caller):
            return
        now_s = asyncio.get_running_loop().time()
        rate = self._rates.setdefault(caller, Rate(self._per_s))
        wait_s = rate.take(now_s, within_s=self._max_wait_s)
        if wait_s == 0:
            return
        self._waiting[caller] += 1
        try:
            await wait_within(self._ended, self._max_wait_s if wait_s is None else wait_s)
        finally:  # also when the caller has cancelled the call, or its deadline is over
            self._waiting[caller] -= 1

    def end(self) -> None:
        """Answer the waiting refusals now, and every later one at once: the server stops."""
        self._ended.set()

    def _has_room(self, caller: str) -> bool:
        return self._waiting[caller] < self._max_waiting and self.waiting < 2 * self._max_waiting
