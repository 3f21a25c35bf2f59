"""One start of the service in a simulation, built by the factories of a real start.

Left out: the server for callers, signals, the sweep of trust entries, and the containment probe.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

from runrecovery_service import app
from runrecovery_service.config.settings import EngineSettings, Settings
from runrecovery_service.domain.reconciliation import Containment, ContainmentLevel
from runrecovery_service.domain.run import Profile
from runrecovery_service.lifecycle import Service
from runrecovery_service.listeners import Listeners
from runrecovery_service.locks import ServiceLocks
from runrecovery_service.machine import Machine
from runrecovery_service.machine_limits import plan_open_files
from runrecovery_service.setup.execution import (
    build_background_work,
    build_dispatcher,
    build_launcher,
)
from runrecovery_service.setup.recovery import build_recovery, build_takeovers
from runrecovery_service.setup.shared_parts import SharedParts
from runrecovery_service.signal_handlers import Control
from runrecovery_service.storage.commit_history import LogPosition
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.opening import open_database
from simulation.agents import Agents
from simulation.threads import LoopPool, LoopThreads
from simulation.world import World, WorldClock

LEASE_TTL_S: Final = 15.0
SWEEPS: Final = ("stragglers", "takeover")


def settings_of(data_dir: Path, *, capacity: int, finish_s: float) -> Settings:
    """Return the configuration of a simulated service."""
    engines = {
        name: EngineSettings(
            command=("agent", name), profile=profile, session_file="{workspace}/{value}"
        )
        for name, profile in (
            ("resumable", Profile.RESUMABLE),
            ("sticky", Profile.STICKY_PROCESS),
        )
    }
    return Settings(
        data_dir=data_dir,
        instance="simulated",
        max_concurrent=capacity,
        min_free_bytes=0,
        max_attempts=3,
        reopen_window_s=3600.0,
        cancel_grace_s=0.5,
        exit_grace_s=2.0,
        stop_grace_s=0.5,
        finish_s=finish_s,
        recovery_batch_rows=2,
        recovery_tries=3,
        safe_mode_after=0,
        lease_ttl_s=LEASE_TTL_S,
        engines=engines,
    )


class _Silent:
    """Stands for the listeners and the signals: nobody connects, no signal comes."""

    async def bind(self, **_: object) -> None:
        """Do nothing."""

    async def stop_calls(self, **_: object) -> None:
        """Do nothing."""

    async def stop_probes(self) -> None:
        """Do nothing."""

    async def stop_metrics(self) -> None:
        """Do nothing."""

    def start(self) -> None:
        """Do nothing."""

    async def stop_reloads(self) -> None:
        """Do nothing."""

    async def stop(self) -> None:
        """Do nothing."""


class Incarnation:
    """A running service. `begin` starts it; it ends by a stop, by an error or by a crash."""

    def __init__(self, world: World, agents: Agents, settings: Settings) -> None:
        self._world, self._agents = world, agents
        world.is_alive = True
        self._threads = LoopThreads(world)
        self.locks = ServiceLocks.acquire(settings)
        self.db = open_database(settings.database, self.locks.data_dir, locks=self.locks.locks)
        self.has_served = False
        self.parts, self.service = world.loop.run_until_complete(self._build(settings))
        self.task = world.loop.create_task(self.service.run())

    async def _build(self, settings: Settings) -> tuple[SharedParts, Service]:
        world = self._world
        probe: Future[Containment] = Future()
        probe.set_result(Containment(level=ContainmentLevel.WATERMARK, detail="simulated"))
        machine = Machine(
            clock=WorldClock(world),
            now_ns=world.now_ns,
            host=world.host,
            processes=self._agents,
            storage_threads=self._threads,
            pool=lambda *_: LoopPool(world),
        )
        open_files = plan_open_files(settings)
        parts = SharedParts(settings, self.locks, self.db, probe, open_files, (), machine)
        launcher = build_launcher(parts)
        dispatcher = build_dispatcher(parts, launcher)
        recovery = build_recovery(parts)
        ownership = app._ownership(parts, dispatcher)
        lease = ownership.lease

        def begin(db: Database) -> tuple[LogPosition | None]:
            world.begin_transaction()
            return (lease.demand_current(db),)

        def committed(position: tuple[LogPosition | None]) -> None:
            if position[0] is not None:
                lease.commits.note(position[0])
            world.pass_point("commit")
            self._threads.after_commit()

        self.db.guard(begin, acknowledged=committed)
        work = build_background_work(
            parts, launcher, dispatcher, None, build_takeovers(parts, dispatcher, recovery)
        )
        silent = _Silent()
        service = Service(
            settings=settings,
            stop=parts.stop,
            gate=parts.gate,
            control=cast("Control", silent),
            listeners=cast("Listeners", silent),
            ownership=ownership,
            recovery_runner=recovery,
            work=replace(work, sweeps=[one for one in work.sweeps if one.name in SWEEPS]),
        )
        return parts, service

    @property
    def is_serving(self) -> bool:
        """Whether callers are answered."""
        return self._world.is_alive and self.parts.gate.recovered and not self.parts.gate.draining

    @property
    def has_ended(self) -> bool:
        """Whether the service has ended by itself."""
        return self.task.done()

    def bury(self) -> None:
        """Remove everything that a crash or an end leaves in this process."""
        world = self._world
        world.is_alive = False
        self._threads.end()
        for future in list(world.loop.blocking_calls):
            future.cancel()
        for _ in range(200):
            left = [task for task in world.loop.tasks if not task.done()]
            if not left:
                break
            for task in left:
                task.cancel()
            world.loop.run_once()
        else:
            raise AssertionError(f"tasks are left: {left}")
        for task in (self.task,):
            if not task.cancelled():
                task.exception()
        self._agents.lose_service()
        self.db.close()
        self.locks.__exit__()
