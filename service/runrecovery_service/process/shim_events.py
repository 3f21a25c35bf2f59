"""The events that a shim reports to the service, parsed from its lines (`wire.py`)."""

from __future__ import annotations

import os
from dataclasses import field
from typing import TypeAlias

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process import wire


@dataclass(frozen=True, slots=True)
class Gated:
    """The shim waits at the gate. `watermarked`: the shim has set the launch's watermark."""

    watermarked: bool


@dataclass(frozen=True, slots=True)
class Started:
    """The agent was started."""

    pid: int
    start_ticks: int


@dataclass(frozen=True, slots=True)
class NotStarted:
    """The system refused to start the agent. `errno` is 0 if the system gave none."""

    reason: str
    errno: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Exited:
    """The agent's own process has ended. Other processes of its tree may be alive.

    Attributes:
        code: its exit code, negative for the signal that killed it.
        user_us, system_us: processor time of the process and of the children that it waited for.
        max_rss_kib: the most memory that one of these processes used at one time.
    """

    code: int
    user_us: int
    system_us: int
    max_rss_kib: int


@dataclass(frozen=True, slots=True)
class EndsItself:
    """The shim kills the whole tree. `why` is `wire.SERVICE_GONE` or `wire.LEASE_OVER`."""

    why: str


@dataclass(frozen=True, slots=True)
class Empty:
    """The kernel reports that the shim has no children left."""


ShimEvent: TypeAlias = Gated | Started | NotStarted | Exited | EndsItself | Empty


def parse_event(line: str) -> ShimEvent:
    """Return the event that a line reports.

    Raises:
        ValueError: the line is not an event.
    """
    match line.split(" "):
        case [wire.GATED, watermarked]:
            return Gated(watermarked=watermarked == "1")
        case [wire.STARTED, pid, ticks]:
            return Started(int(pid), int(ticks))
        case [wire.REFUSED, number, *step]:
            why = os.strerror(int(number)) if number != "0" else "refused"
            return NotStarted(f"{why}: {' '.join(step)}", int(number))
        case [wire.EXITED, code, user_us, system_us, rss]:
            return Exited(int(code), int(user_us), int(system_us), int(rss))
        case [wire.ENDING, why]:
            return EndsItself(why)
        case [wire.EMPTY]:
            return Empty()
    raise ValueError(f"not an event of a shim: {line[:80]!r}")
