"""A store with runs, their files, and sweeps over both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from runrecovery_service.domain.retention import RetentionPolicy
from runrecovery_service.domain.run import Run
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.retention.files import RunFiles
from runrecovery_service.retention.sweep import RetentionSweep
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import instances
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.opening import open_database
from storage.service_store import ServiceStore, boot
from support.clock import FakeClock

DAY_S = 86_400.0


@dataclass
class Machine:
    """A store, the files of its runs, and sweeps over both."""

    store: ServiceStore
    storage: Storage
    runs: Path
    pauses: list[float] = field(default_factory=list)

    def sweep(self, files: RunFiles | None = None, **policy: Any) -> RetentionSweep:
        """Create a sweep, as a start does."""

        async def pause(seconds: float) -> None:
            self.pauses.append(seconds)

        return RetentionSweep(
            policy=RetentionPolicy(**policy),
            storage=self.storage,
            owner=self.store.owner,
            clock=FakeClock(wall=self.store.now),
            files=files or RunFiles(self.runs),
            stop_signal=StopSignal(),
            pause=pause,
        )

    def ended(self, count: int = 1) -> list[Run]:
        """Create ended runs with files."""
        made = [self.store.end(self.store.running(), Succeeded(output={})) for _ in range(count)]
        for run in made:
            workspace = self.runs / str(run.key) / "1" / "workspace"
            workspace.mkdir(parents=True)
            (workspace / "file").write_bytes(b"x" * 100)
            (workspace.parent / "stdout.log").write_bytes(b"x" * 10)
        return made

    def age(self, seconds: float) -> None:
        """Let time pass, and add another run and launch, which are the newest."""
        self.store.waiting()
        self.store.advance(seconds)

    @property
    def folders(self) -> list[str]:
        """The names in `runs/`."""
        return sorted(path.name for path in self.runs.iterdir() if path.name != ".removed")

    @property
    def rows(self) -> list[str]:
        """The keys of ended runs, as text."""
        found = self.store.rows("SELECT id FROM run WHERE ended_at IS NOT NULL ORDER BY id")
        return sorted(str(key) for (key,) in found)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    db = open_database("", tmp_path)
    owner = instances.claim(db, boot(), now=ServiceStore.now)
    storage = Storage(db)
    runs = tmp_path / "runs"
    runs.mkdir()
    yield Machine(store=ServiceStore(db=db, owner=owner), storage=storage, runs=runs)
    storage.close()
