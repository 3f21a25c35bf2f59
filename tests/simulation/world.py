"""The world of one history: time, chance, faults of the database, and the crash of the service."""

from __future__ import annotations

import sqlite3
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final

from runrecovery_service.clock import Clock
from runrecovery_service.domain.steady_time import SteadyTime
from runrecovery_service.process.host import Host
from runrecovery_service.storage.rows import to_us
from simulation.virtual_loop import VirtualLoop

BEGINNING: Final = datetime(2026, 11, 24, 12, tzinfo=UTC)
LATENCIES_S: Final = (0.0, 0.0, 0.001, 0.001, 0.004, 0.02, 0.3)
SLOW_S: Final = (0.3, 1.0, 2.5, 6.0)
FAULTS: Final = (
    ("disk I/O error", sqlite3.SQLITE_IOERR_WRITE),
    ("database is locked", sqlite3.SQLITE_BUSY),
    ("database or disk is full", sqlite3.SQLITE_FULL),
)


class Cut(BaseException):
    """The service has crashed at this point. No code of the service handles it."""


class Violation(AssertionError):
    """The service has broken a promise."""


@dataclass
class World:
    """Everything outside of the service. It survives the crashes of the service.

    Attributes:
        trace: what has happened, a line for each event.
        wall_offset: how far the wall clock is ahead of the passed time.
        boot: counts the boots of the machine.
        booted_s: the time of the present boot.
        is_alive: whether the service is running. After a crash, nothing that is left of the service
            has an effect.
        cut_in: how many more points the service passes before it crashes. None: it does not.
        faults_in, faults: the next `faults` transactions fail, after `faults_in` others.
        reached: counts the situations that have occurred.
        offsets_us: how far the steady clock has been ahead of the wall clock during this boot.
    """

    rng: Random
    trace: list[str] = field(default_factory=list)
    wall_offset: timedelta = timedelta(0)
    boot: int = 1
    booted_s: float = -5000.0
    is_alive: bool = False
    is_recovering: bool = False
    is_slow: bool = False
    is_calm: bool = False
    cut_in: int | None = None
    faults_in: int = 0
    faults: int = 0
    reached: Counter[str] = field(default_factory=Counter)
    defects: list[str] = field(default_factory=list)
    offsets_us: list[int] = field(default_factory=list)
    loop: VirtualLoop = field(init=False)

    def __post_init__(self) -> None:
        self.loop = VirtualLoop(self.latency_s)
        self.loop.set_exception_handler(self._on_loop_error)
        self._note_offset()

    def _on_loop_error(self, _: object, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if self.is_alive and not isinstance(error, Cut):
            self.defects.append(f"defect: {context['message']}: {error!r}")

    def note(self, text: str) -> None:
        """Append a line to the trace."""
        self.trace.append(f"{self.loop.time():10.4f} {text}")

    # -- time ----------------------------------------------------------------------------------

    def latency_s(self) -> float:
        """Return how long the next blocking call takes."""
        if not self.is_alive or self.is_calm:
            return 0.0
        return self.rng.choice(SLOW_S if self.is_slow else LATENCIES_S)

    def now(self) -> datetime:
        """Return the wall-clock time."""
        return BEGINNING + timedelta(seconds=self.loop.time()) + self.wall_offset

    def now_ns(self) -> int:
        """Return CLOCK_BOOTTIME."""
        return round((self.loop.time() - self.booted_s) * 1e9)

    def reboot(self, seconds: float) -> None:
        """Boot the machine, which takes so long."""
        self.loop.stand_still(seconds)
        self.boot, self.booted_s = self.boot + 1, self.loop.time() - 5.0
        self.offsets_us = []
        self._note_offset()

    def set_wall_clock(self, span: timedelta) -> None:
        """Step the wall clock, as an operator or NTP may do."""
        self.wall_offset += span
        self._note_offset()

    def _note_offset(self) -> None:
        self.offsets_us.append(self.now_ns() // 1000 - to_us(self.now()))

    def host(self) -> Host:
        """Return the identity of the machine and of its boot."""
        return Host(host_id="host", boot_id=f"boot-{self.boot}", pid_namespace=1)

    # -- the points at which the service can crash ---------------------------------------------

    def demand_alive(self) -> None:
        """Raise Cut if the service has crashed."""
        if not self.is_alive:
            raise Cut

    def pass_point(self, name: str) -> None:
        """Crash if it is time, or do nothing.

        Raises:
            Cut: the service has crashed.
        """
        self.demand_alive()
        if self.cut_in is None:
            return
        self.cut_in -= 1
        if self.cut_in < 0:
            self.crash(name)
            raise Cut(name)

    def crash(self, where: str) -> None:
        """End the service at once."""
        self.note(f"CRASH at {where}")
        self.reached[f"crash at {where}"] += 1
        if self.is_recovering:
            self.reached["crash in a recovery"] += 1
        self.is_alive, self.cut_in = False, None
        self.loop.stop()

    def begin_transaction(self) -> None:
        """Begin a transaction of the service, which may fail or never come about.

        Raises:
            Cut: the service has crashed.
            sqlite3.OperationalError: a fault of the database.
        """
        self.pass_point("begin")
        if not self.faults:
            return
        if self.faults_in:
            self.faults_in -= 1
            return
        self.faults -= 1
        text, code = self.rng.choice(FAULTS)
        self.note(f"fault: {text}")
        self.reached["fault"] += 1
        error = sqlite3.OperationalError(text)
        error.sqlite_errorcode = code
        raise error


class WorldClock(Clock):
    """The clock of the service."""

    def __init__(self, world: World) -> None:
        self._world = world

    def now(self) -> datetime:
        """See `Clock`."""
        return self._world.now()

    def steady(self) -> SteadyTime:
        """See `Clock`."""
        return SteadyTime(clock=f"boot-{self._world.boot}", us=self._world.now_ns() // 1000)
