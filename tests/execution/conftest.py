"""A dispatcher with a store and real agent processes, on uvloop as in production."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest_asyncio
from runrecovery_service.agents.blocking_store import LoopStore
from runrecovery_service.agents.output import OutputFiles
from runrecovery_service.agents.session_checks import SessionChecker
from runrecovery_service.agents.trust_keeper import TrustKeeper
from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.clock import Clock
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.run import NewRun, Profile, RestartPolicy, Run, RunStatus
from runrecovery_service.engines.catalog import Catalog, Engine
from runrecovery_service.execution.deadlines import Deadlines
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.execution.launcher import Launcher
from runrecovery_service.execution.lease_deadline import TreeDeadline
from runrecovery_service.execution.run_queue import RunQueue
from runrecovery_service.execution.running_turns import RunningTurns
from runrecovery_service.execution.straggler_sweep import StragglerSweep
from runrecovery_service.execution.supervisor_factory import SupervisorFactory, TurnRecordsFactory
from runrecovery_service.metric_counters import Meters
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.process.host import Host
from runrecovery_service.process.watermark import watermark_bits
from runrecovery_service.steady_thread_pool import SteadyThreadPool
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import instances, interactions, runs
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import InstanceStart, Owner
from runrecovery_service.storage.launch_records import LaunchSite
from runrecovery_service.storage.opening import open_database
from support.engines import demo_command
from support.processes import ProcessIdentity, living_process, processes_with_watermark
from support.waiting import until_async

QUICK = 'read task; echo \'{"type":"result","output":{"done":true}}\''
DEAF = 'read task; echo \'{"type":"ask","kind":"open_text","prompt":"What?"}\'; exec sleep 60'
HOLDS = "read task; exec sleep 600"
# A run with two process trees: a child with an empty environment and a session of its own, and its
# parent.
FAMILY = """
import os, sys, time
sys.stdin.readline()
if not os.fork():
    os.setsid()
    os.execve("/bin/sleep", ["sleep", "600"], {})
print("{\\"type\\": \\"progress\\", \\"message\\": \\"stands\\"}", flush=True)
time.sleep(600)
"""
ASKS_AND_LISTENS = (
    'read task; echo \'{"type":"ask","kind":"open_text","prompt":"What?"}\';'
    ' read reply; echo \'{"type":"result","output":{"done":true}}\''
)
WORKS_AND_FAILS = "i=0; while [ $i -lt 30000 ]; do i=$((i+1)); done; exit 7"
ENGINES: Mapping[str, tuple[Profile, tuple[str, ...]]] = {
    "resumable": (Profile.RESUMABLE, demo_command("resumable")),
    "sticky": (Profile.STICKY_PROCESS, demo_command("sticky")),
    "quick": (Profile.RESUMABLE, ("/bin/sh", "-c", QUICK)),
    "deaf": (Profile.STICKY_PROCESS, ("/bin/sh", "-c", DEAF)),
    "holds": (Profile.RESUMABLE, ("/bin/sh", "-c", HOLDS)),
    "family": (Profile.RESUMABLE, (sys.executable, "-I", "-S", "-c", FAMILY)),
    "asks": (Profile.STICKY_PROCESS, ("/bin/sh", "-c", ASKS_AND_LISTENS)),
    "works": (Profile.RESUMABLE, ("/bin/sh", "-c", WORKS_AND_FAILS)),
}
FAR_S = 600.0
"""Longer than any test takes."""


def in_ns(seconds: float) -> int:
    """Return the tree deadline that is `seconds` from now."""
    return boot_time_ns() + int(seconds * 1e9)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLaunch:
    """A launch as it is stored."""

    key: int
    state: str
    cookie: str
    watermark: int
    pid: int | None
    start_ticks: int | None
    exit_code: int | None
    user_us: int | None
    system_us: int | None
    max_rss_kib: int | None
    processes_ended: int

    @property
    def shim(self) -> ProcessIdentity:
        """The recorded shim."""
        assert self.pid is not None
        assert self.start_ticks is not None
        return ProcessIdentity(self.pid, self.start_ticks)

    @property
    def token(self) -> str:
        """The cookie that its processes have in their environment."""
        return f"{self.key:x}.{self.cookie}"

    def tree(self) -> list[int]:
        """Return the living processes with its watermark, without the shim."""
        return [pid for pid in processes_with_watermark(self.watermark) if pid != self.pid]

    @property
    def is_guarded(self) -> bool:
        """Whether its shim lives."""
        return self.pid is not None and living_process(self.pid) == self.shim


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait until `holds` returns True; fail after a time limit."""
    await until_async(holds, "it holds")


@dataclass(slots=True, kw_only=True, eq=False)
class Execution:
    """A running dispatcher, and the calls of its clients."""

    storage: Storage
    owner: Owner
    catalog: Catalog
    launcher: Launcher
    output: OutputFiles
    turns: RunningTurns
    dispatcher: Dispatcher
    straggler_sweep: StragglerSweep
    stop: StopSignal

    @property
    def is_fenced(self) -> bool:
        """Whether the service has to stop because a newer epoch owns its runs."""
        return isinstance(self.stop.failure, Fenced)

    def heartbeat(self, seconds: float) -> None:
        """Move the tree deadline to `seconds` from now."""
        self.turns.heartbeat(in_ns(seconds))

    async def launch(self, run_id: str, *, turn: int = 1, attempt: int = 1) -> StoredLaunch:
        """Return a launch as it is stored."""
        names = ", ".join(f"l.{name}" for name in StoredLaunch.__slots__ if name != "key")
        sql = (
            f"SELECT l.id, {names} FROM process_lease l JOIN run r ON r.id = l.run"  # noqa: S608
            " WHERE r.run_id = ? AND l.attempt = ? AND l.turn = ?"
        )
        row = await self.storage.read(lambda db: db.fetch_one(sql, (run_id, attempt, turn)))
        assert row is not None
        return StoredLaunch(**dict(zip(StoredLaunch.__slots__, row, strict=True)))

    async def set_launch_state(self, state: str) -> None:
        """Change the state of every launch behind the service's back."""
        await self.storage.write(
            lambda db: db.execute("UPDATE process_lease SET state = ?", (state,)).rowcount
        )

    async def until_tree(self, run_id: str, size: int) -> StoredLaunch:
        """Return a run's first launch once `size` processes have its watermark."""

        found: list[StoredLaunch] = []

        async def stands() -> bool:
            found.append(await self.launch(run_id))
            return found[-1].state == "RUNNING" and len(found[-1].tree()) >= size

        await self.until_status(run_id, RunStatus.RUNNING, RunStatus.WAITING_USER)
        await until(stands)
        return found[-1]

    async def create(
        self,
        engine: str,
        given: dict[str, Any] | None = None,
        *,
        policy: RestartPolicy = RestartPolicy.FAIL,
        **changes: Any,
    ) -> str:
        """Create a run, and return its id."""
        run_id = f"run-{engine}-{os.urandom(4).hex()}"
        new = NewRun(
            run_id=run_id,
            engine=engine,
            labels={},
            profile=self.catalog.get(engine).profile,
            restart_policy=policy,
            max_attempts=3,
            input=given or {},
        )
        await self.storage.write(
            runs.create,
            replace(new, **changes),
            owner=self.owner,
            max_queued=10_000,
            receipt=None,
            now=Clock().now(),
        )
        return run_id

    async def cancel(self, run_id: str) -> None:
        """Cancel a run."""
        await self.storage.write(
            runs.cancel, run_id, owner=self.owner, etag=None, receipt=None, now=Clock().now()
        )

    async def reply(self, run_id: str, answer: Any) -> None:
        """Answer the open question."""
        run = await self.get(run_id)
        await self.storage.write(
            interactions.reply,
            run_id,
            run.interaction_count,
            answer,
            owner=self.owner,
            etag=None,
            receipt=None,
            now=Clock().now(),
        )

    async def get(self, run_id: str) -> Run:
        """Read a run."""
        return await self.storage.read_row(runs.get, run_id)

    async def until(self, run_id: str, reached: Callable[[Run], bool]) -> Run:
        """Return the run once `reached` holds for it."""
        found: list[Run] = []

        async def is_so() -> bool:
            found.append(await self.get(run_id))
            return reached(found[-1])

        await until(is_so)
        return found[-1]

    async def until_status(self, run_id: str, *statuses: RunStatus) -> Run:
        """Return the run once it has one of these statuses."""
        return await self.until(run_id, lambda run: run.status in statuses)

    async def until_free(self, slots: int) -> None:
        """Return once at least `slots` slots are free."""

        async def is_so() -> bool:
            return self.dispatcher.capacity - self.dispatcher.slots_in_use >= slots

        await until(is_so)

    async def until_ended(self, run_id: str) -> Run:
        """Return the run once it is terminal."""
        return await self.until(run_id, lambda run: run.status is None or run.status.is_terminal)


NewExecution = Callable[..., Awaitable[Execution]]


def claimed(db: Database, here: Host, data_dir: Path) -> Owner:
    """Claim an epoch of the instance `test`."""
    boot = InstanceStart(
        instance="test",
        boot_token="boot",  # noqa: S106 - no secret: it names a start
        host_id=here.host_id,
        data_dir=str(data_dir),
        pid=1,
    )
    return instances.claim(db, boot, now=Clock().now())


def catalog_of(session_timeout_s: float, more: Sequence[Engine]) -> Catalog:
    """Return the catalog of `ENGINES` and of further engines."""
    engines = [
        Engine(
            name=name,
            command=command,
            profile=profile,
            env_allow=("PATH",),
            max_concurrent=None,
            session_file=None,
            session_timeout_s=session_timeout_s,
        )
        for name, (profile, command) in ENGINES.items()
    ]
    return Catalog([*engines, *more])


def launcher_of(
    workspaces: Workspaces,
    trust: TrustKeeper,
    threads: SteadyThreadPool,
    trees_live_s: float,
) -> Launcher:
    """Return a launcher without cgroups."""
    return Launcher(
        workspaces=workspaces,
        trust=trust,
        threads=threads,
        tree_deadline=TreeDeadline(in_ns(trees_live_s)),
        cgroups=None,
        environ=dict(os.environ),
        cancel_grace_s=0.5,
    )


def queue_of(storage: Storage, owner: Owner, here: Host, catalog: Catalog) -> RunQueue:
    """Return the queue of an instance on this host."""
    site = LaunchSite(
        host_id=here.host_id,
        boot_id=here.boot_id,
        pid_namespace=here.pid_namespace,
        watermark_bits=watermark_bits(),
    )
    return RunQueue(storage=storage, owner=owner, clock=Clock(), site=site, catalog=catalog)


@asynccontextmanager
async def running(execution: Execution) -> AsyncIterator[None]:
    """Run the dispatcher and the deadlines inside the block."""
    deadlines = Deadlines(
        storage=execution.storage,
        owner=execution.owner,
        clock=Clock(),
        turns=execution.turns,
        stop_signal=execution.stop,
    )
    execution.dispatcher.start()
    deadlines.start()
    yield
    await deadlines.stop()
    await execution.straggler_sweep.stop()
    await execution.dispatcher.stop()


@asynccontextmanager
async def running_execution(
    path: Path,
    *,
    trees_live_s: float = FAR_S,
    session_timeout_s: float = FAR_S,
    more: Sequence[Engine] = (),
    session_check_s: float = FAR_S,
) -> AsyncIterator[Execution]:
    """Open a store below `path`, and run a dispatcher on it."""
    db, here, clock, stop = open_database("", path), Host.here(), Clock(), StopSignal()
    owner = claimed(db, here, path)
    db.close()
    storage = Storage(db)
    catalog, workspaces = catalog_of(session_timeout_s, more), Workspaces(path / "runs")
    store = LoopStore(storage, asyncio.get_running_loop())
    trust = TrustKeeper(host_id=here.host_id, owner=owner, store=store, clock=clock)
    output = OutputFiles(workspaces, max_bytes=1 << 20)
    with SteadyThreadPool(40, "process") as threads:
        launcher = launcher_of(workspaces, trust, threads, trees_live_s)
        turns = RunningTurns(tree_deadline=launcher.tree_deadline)
        supervisors = SupervisorFactory(
            records=TurnRecordsFactory(storage=storage, owner=owner, clock=clock, meters=Meters()),
            catalog=catalog,
            launcher=launcher,
            output=output,
            sessions=SessionChecker(workspaces=workspaces, timeout_s=session_check_s),
            exit_grace_s=1.0,
        )
        execution = Execution(
            storage=storage,
            owner=owner,
            catalog=catalog,
            launcher=launcher,
            output=output,
            turns=turns,
            dispatcher=Dispatcher(
                queue=queue_of(storage, owner, here, catalog),
                supervisors=supervisors,
                launcher=launcher,
                turns=turns,
                capacity=8,
                stop_signal=stop,
            ),
            straggler_sweep=StragglerSweep(
                storage=storage,
                owner=owner,
                clock=clock,
                turns=turns,
                launcher=launcher,
                stop_signal=stop,
            ),
            stop=stop,
        )
        async with running(execution):
            yield execution
        await asyncio.to_thread(storage.close)
    db.close()  # the loop's own connection


@pytest_asyncio.fixture
async def new_execution(tmp_path: Path) -> AsyncIterator[NewExecution]:
    """A function that starts executions with given times and engines; they stop with the test."""
    async with AsyncExitStack() as stack:
        yield lambda **named: stack.enter_async_context(running_execution(tmp_path, **named))


@pytest_asyncio.fixture
async def execution(new_execution: NewExecution) -> Execution:
    """An execution in which no deadline passes by itself."""
    return await new_execution()
