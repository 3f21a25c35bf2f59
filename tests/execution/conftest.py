"""The dispatcher on uvloop, as in production, with a store and processes of its own."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest_asyncio
from runrecovery_service import clock
from runrecovery_service.domain.run import NewRun, Profile, RestartPolicy, Run, RunStatus
from runrecovery_service.engines.catalog import Catalog, Engine
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.execution.output import OutputFiles
from runrecovery_service.execution.session import Workshop
from runrecovery_service.process.evidence import Host
from runrecovery_service.storage import instances, interactions, runs
from runrecovery_service.storage.adapter import Storage
from runrecovery_service.storage.database import open_database
from runrecovery_service.storage.instances import Boot, Owner
from runrecovery_service.storage.processes import Place

DEMO = (sys.executable, "-m", "runrecovery_service.engines.demo_agent", "--profile")
QUICK = 'read task; echo \'{"type":"result","output":{"done":true}}\''
DEAF = 'read task; echo \'{"type":"ask","kind":"open_text","prompt":"What?"}\'; exec sleep 60'
ENGINES = {
    "resumable": (Profile.RESUMABLE, (*DEMO, "resumable")),
    "sticky": (Profile.STICKY_PROCESS, (*DEMO, "sticky")),
    "quick": (Profile.RESUMABLE, ("/bin/sh", "-c", QUICK)),
    "deaf": (Profile.STICKY_PROCESS, ("/bin/sh", "-c", DEAF)),
}


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Return once it holds; fail when it does not within a minute."""
    async with asyncio.timeout(60):
        while not await holds():  # noqa: ASYNC110 - what is waited for is in the store
            await asyncio.sleep(0.01)


@dataclass(slots=True, kw_only=True, eq=False)
class Floor:
    """A running dispatcher, and what a caller of it does."""

    storage: Storage
    owner: Owner
    dispatcher: Dispatcher
    fenced: list[bool] = field(default_factory=list)

    async def create(self, engine: str, given: dict[str, Any] | None = None) -> str:
        """Create a run, tell the dispatcher, and return its id."""
        run_id = f"run-{engine}-{os.urandom(4).hex()}"
        new = NewRun(
            run_id=run_id,
            engine=engine,
            labels={},
            profile=ENGINES[engine][0],
            restart_policy=RestartPolicy.FAIL,
            max_attempts=3,
            input=given or {},
        )
        run = await self.storage.write(
            runs.create,
            new,
            owner=self.owner,
            max_queued=10_000,
            receipt=None,
            now=clock.utc_now(),
        )
        self.dispatcher.changed(run)
        return run_id

    async def cancel(self, run_id: str) -> None:
        """Cancel a run and tell the dispatcher."""
        run = await self.storage.write(
            runs.cancel, run_id, owner=self.owner, etag=None, receipt=None, now=clock.utc_now()
        )
        self.dispatcher.changed(run)

    async def reply(self, run_id: str, answer: Any) -> None:
        """Answer the open question and tell the dispatcher."""
        run = await self.get(run_id)
        run = await self.storage.write(
            interactions.reply,
            run_id,
            run.interaction_count,
            answer,
            owner=self.owner,
            etag=None,
            receipt=None,
            now=clock.utc_now(),
        )
        self.dispatcher.changed(run)

    async def get(self, run_id: str) -> Run:
        """Read a run."""
        return await self.storage.point(runs.get, run_id)

    async def until(self, run_id: str, reached: Callable[[Run], bool]) -> Run:
        """Return the run once it is so."""
        found: list[Run] = []

        async def is_so() -> bool:
            found.append(await self.get(run_id))
            return reached(found[-1])

        await until(is_so)
        return found[-1]

    async def until_status(self, run_id: str, *statuses: RunStatus) -> Run:
        """Return the run once it has one of these."""
        return await self.until(run_id, lambda run: run.status in statuses)

    async def until_free(self, slots: int) -> None:
        """Return once so many slots are free."""

        async def is_so() -> bool:
            return self.dispatcher.capacity - self.dispatcher.slots_in_use >= slots

        await until(is_so)

    async def until_ended(self, run_id: str) -> Run:
        """Return the run once it is terminal."""
        return await self.until(run_id, lambda run: run.status is None or run.status.is_terminal)


@pytest_asyncio.fixture
async def floor(tmp_path: Path) -> AsyncIterator[Floor]:
    db = open_database("", tmp_path)
    here = Host.here()
    boot = Boot(
        instance="test",
        boot_token="boot",  # noqa: S106 - no secret: it names a start
        host_id=here.host_id,
        data_dir=str(tmp_path),
        pid=1,
    )
    owner = instances.claim(db, boot, now=clock.utc_now())
    db.close()
    storage = Storage(db)
    with ThreadPoolExecutor(40) as threads:
        shop = Workshop(
            storage=storage,
            owner=owner,
            catalog=Catalog(
                Engine(
                    name=name,
                    command=command,
                    profile=profile,
                    env_allow=("PATH",),
                    max_concurrent=None,
                    session_file=None,
                )
                for name, (profile, command) in ENGINES.items()
            ),
            output=OutputFiles(tmp_path, max_bytes=1 << 20),
            threads=threads,
            environ=dict(os.environ),
            cancel_grace_s=0.5,
            exit_grace_s=1.0,
            now=clock.utc_now,
        )
        fenced: list[bool] = []
        dispatcher = Dispatcher(
            shop=shop,
            place=Place(
                host_id=here.host_id, boot_id=here.boot_id, pid_namespace=here.pid_namespace
            ),
            capacity=8,
            fenced=lambda: fenced.append(True),
        )
        dispatcher.start()
        yield Floor(storage=storage, owner=owner, dispatcher=dispatcher, fenced=fenced)
        await dispatcher.stop()
        await asyncio.to_thread(storage.close)
