"""Deadlines that a stepped wall clock cannot make early.

A deadline is stored twice: as a time of the wall clock, for display, and as a time of a steady
clock, which decides when the deadline passes. The steady clock counts from the machine's boot.
After another boot, or on another machine, only the wall clock shows how much time is left.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from enum import StrEnum

from runrecovery_service.lazy_dataclass import dataclass


@dataclass(frozen=True, slots=True)
class SteadyTime:
    """A time of the clock named `clock`, in microseconds. Never compare times of two clocks."""

    clock: str
    us: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """A deadline: its wall-clock time `at`, and its time `us` of the steady clock named `clock`."""

    at: datetime
    clock: str
    us: int


DueIn = Callable[[float], Due]
"""A function that returns the deadline after this many seconds from now."""


class DueKind(StrEnum):
    """The kind of a deadline: which time ends when the deadline passes."""

    WAIT = "WAIT"
    """The wait for a reply to the open question."""
    RUN = "RUN"
    """The longest time of the whole run."""
    REOPEN = "REOPEN"
    """The time in which a failed run can be reopened."""
    RESUME = "RESUME"
    """The pause before an interrupted turn is resumed."""
