"""A clock that moves only when a test moves it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from runrecovery_service.clock import Clock
from runrecovery_service.domain.steady_time import SteadyTime


@dataclass
class FakeClock(Clock):
    """The wall clock and the steady clock of one machine.

    Attributes:
        tick_s: seconds by which each reading of the wall clock moves both clocks on.
    """

    wall: datetime = datetime(2026, 11, 24, 12, tzinfo=UTC)
    steady_us: int = 5_000_000_000
    name: str = "boot"
    tick_s: float = 0.0

    def advance(self, seconds: float) -> None:
        """Let time pass on both clocks."""
        self.wall += timedelta(seconds=seconds)
        self.steady_us += round(seconds * 1e6)

    def now(self) -> datetime:
        """Return the wall-clock time, then tick."""
        wall = self.wall
        self.advance(self.tick_s)
        return wall

    def steady(self) -> SteadyTime:
        """Return the steady time."""
        return SteadyTime(clock=self.name, us=self.steady_us)
