"""Stops new runs and launches while the disk is almost full, so that running turns can end."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import field
from pathlib import Path
from typing import Final

import structlog

from runrecovery_service import daemon_threads
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.periodic import PeriodicTask
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.stop_signal import StopSignal

log = structlog.get_logger()

CHECK_INTERVAL_S: Final = 2.0
ANSWER_S: Final = 5.0
"""How long the file system may take to answer. After a timeout, the previous answer still
counts."""
ENOUGH: Final = 1.25
"""The multiple of the floor that must be free before launches resume. Without this margin, free
space that varies around the floor would stop and start launches again and again."""


def free_bytes(place: Path) -> int:
    """Return the bytes that the service's user can still write on the disk of a directory."""
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


@dataclass(slots=True, kw_only=True, eq=False)
class DiskFloor:
    """Checks the free space until it is stopped. Below the floor nothing is launched or created.

    Attributes:
        places: directories that the service writes into.
        min_free_bytes: the free space, in bytes, below which a directory's disk counts as low.
    """

    places: Sequence[Path]
    min_free_bytes: int
    gate: Gate
    dispatcher: Dispatcher
    stop_signal: StopSignal
    free_bytes: Callable[[Path], int] = free_bytes
    is_low: bool = field(default=False, init=False)
    _loop: PeriodicTask = field(init=False)

    def __post_init__(self) -> None:
        self._loop = PeriodicTask(
            name="disk-floor",
            step=self.check,
            interval_s=CHECK_INTERVAL_S,
            failure_event="service.disk_not_seen",
            stop_signal=self.stop_signal,
            first_wait_s=0.0,
        )

    def start(self) -> None:
        """Start the checks."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop the checks."""
        await self._loop.cancel()

    async def check(self) -> None:
        """Check all directories once, and pass a changed result to gate and dispatcher.

        Raises:
            TimeoutError: the file system did not answer within `ANSWER_S`.
        """
        try:
            free = await daemon_threads.run_within(ANSWER_S, self._free)
        except TimeoutError as error:
            raise TimeoutError("the file system did not answer in time") from error
        place = min(free, key=lambda place: free[place])
        enough = self.min_free_bytes * (ENOUGH if self.is_low else 1.0)
        if self.is_low is (free[place] < enough):
            return
        self.is_low = not self.is_low
        self.gate.set_disk_low(low=self.is_low)
        self.dispatcher.hold(held=self.is_low)
        facts = {"place": str(place), "free_bytes": free[place]}
        if self.is_low:
            log.warning("service.disk_low", min_free_bytes=self.min_free_bytes, **facts)
        else:
            log.info("service.disk_has_room", **facts)

    def _free(self) -> dict[Path, int]:
        return {place: self.free_bytes(place) for place in self.places}
