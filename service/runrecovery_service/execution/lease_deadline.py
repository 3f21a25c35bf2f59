"""The time at which the process trees of this service must end, unless the lease is renewed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import field

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.boot_clock import boot_time_ns


@dataclass(slots=True)
class TreeDeadline:
    """The time, by CLOCK_BOOTTIME, at which process trees end themselves.

    Each renewal of the service's lease moves the time. A shim that gets no later time ends its
    tree.

    Attributes:
        now_ns: returns CLOCK_BOOTTIME.
    """

    deadline_ns: int
    now_ns: Callable[[], int] = boot_time_ns
    _moved: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_ahead(self) -> bool:
        """Whether the deadline is in the future.

        If it is not, the service was suspended, and its process trees have ended.
        """
        return self.now_ns() < self.deadline_ns

    def move_to(self, deadline_ns: int) -> None:
        """Set a later deadline."""
        self.deadline_ns = deadline_ns
        self._moved.set()

    async def wait_until_ahead(self) -> None:
        """Wait until the deadline is in the future. A tree that is launched later ends at once."""
        while not self.is_ahead:
            self._moved.clear()
            await self._moved.wait()
