"""Deadlines that a stepped wall clock cannot reach early.

A deadline is kept twice: as the time of the wall clock, to show, and by a clock that runs steadily
since the machine's boot, to go by. Only where that clock is not the one that runs now (another
boot, another machine) does the wall clock have to tell how much time is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class SteadyTime:
    """A time by the clock named `clock`, in microseconds. Times of two clocks say nothing of each
    other."""

    clock: str
    us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A deadline: `at` by the wall clock, and `us` by the steady clock named `clock`."""

    at: datetime
    clock: str
    us: int


class DueKind(StrEnum):
    """What ends at a deadline."""

    WAIT = "WAIT"
    """The wait for an answer to the open question."""
    RUN = "RUN"
    """The time that the whole run may take."""
    REOPEN = "REOPEN"
    """The window in which a failed run can be set back."""
