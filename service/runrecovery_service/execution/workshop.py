"""What every turn works with, and what is common to launching, following and ending one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

import structlog

from runrecovery_service.agents.output import OutputFiles
from runrecovery_service.agents.session_checks import LOOK_S
from runrecovery_service.agents.trust_keeper import TrustKeeper
from runrecovery_service.clock import Clock
from runrecovery_service.domain.errors import Fenced, error_facts, is_outage
from runrecovery_service.domain.run import Run
from runrecovery_service.engines.catalog import Catalog
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.process.cgroup import CgroupParent
from runrecovery_service.storage.adapter import Storage
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.processes import Lease

log = structlog.get_logger()

R = TypeVar("R")

RETRY_FIRST_S, RETRY_MOST_S = 0.2, 5.0


@dataclass(slots=True)
class TreeDeadline:
    """Until when the process trees may live, as CLOCK_BOOTTIME: every renewal of the service's
    lease moves it. A shim that hears of no later time ends its tree."""

    deadline_ns: int
    _beat: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_ahead(self) -> bool:
        """False once the service has stood still for so long that its trees are dead."""
        return boot_time_ns() < self.deadline_ns

    def beat(self, deadline_ns: int) -> None:
        """Move the deadline."""
        self.deadline_ns = deadline_ns
        self._beat.set()

    async def wait_until_ahead(self) -> None:
        """Return at once, or with the next beat: nothing is launched into a lease that is over."""
        while not self.is_ahead:
            self._beat.clear()
            await self._beat.wait()


@dataclass(frozen=True, slots=True, kw_only=True)
class Workshop:
    """What every session works with.

    Attributes:
        look_s: how long a session's files may take to answer.
        soft_open_files: agents' soft limit on open files; None: the service's own.
    """

    storage: Storage
    owner: Owner
    catalog: Catalog
    output: OutputFiles
    trust: TrustKeeper
    threads: Executor
    environ: Mapping[str, str]
    tree_deadline: TreeDeadline
    cgroups: CgroupParent | None
    cancel_grace_s: float
    exit_grace_s: float
    clock: Clock
    look_s: float = LOOK_S
    soft_open_files: int | None = None

    def remove_cgroup(self, lease: Lease) -> bool:
        """Remove the cgroup that a launch had, if any; False when it could not be."""
        if lease.cgroup is None or self.cgroups is None:
            return True
        return self.cgroups.remove(lease.cgroup)

    async def in_thread(self, do: Callable[..., R], *args: object) -> R:
        """Do something that blocks."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, do, *args)


@dataclass(frozen=True, slots=True)
class TurnLog:
    """The log of one turn: every line names it."""

    run: Run

    def info(self, event: str, **facts: object) -> None:
        """Log a line."""
        log.info(event, **self._turn, **facts)

    def warning(self, event: str, **facts: object) -> None:
        """Log a line that wants to be looked at."""
        log.warning(event, **self._turn, **facts)

    @property
    def _turn(self) -> dict[str, object]:
        return {"run_id": self.run.run_id, "attempt": self.run.attempt, "turn": self.run.turn}

    async def retry_until_done(self, do: Callable[[], Awaitable[R]]) -> R:
        """Do it until it is done: what a process did is not forgotten over a full disk, a database
        that is away, or a defect. Meanwhile the run keeps its slot, and the log says why."""
        pause_s = RETRY_FIRST_S
        while True:
            try:
                return await do()
            except Fenced:
                raise
            except Exception as error:  # noqa: BLE001 - giving up would leave a run half told
                known = is_outage(error)
                self.warning("execution.write_retried", **error_facts(error), exc_info=not known)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, RETRY_MOST_S)
