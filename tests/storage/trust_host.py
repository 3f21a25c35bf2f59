"""A host with an agent CLI, and runs whose trust entries are in the file of the CLI."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runrecovery_service.agents.blocking_store import ConnectionStore
from runrecovery_service.agents.trust_keeper import TrustKeeper
from runrecovery_service.domain.reconciliation import TrustClearing
from runrecovery_service.domain.run import Run
from runrecovery_service.storage.database import Database
from runrecovery_service.trust import files
from runrecovery_service.trust.entry import Outcome, Removal
from storage.service_store import ServiceStore

ORIGINAL = b'# mine\nmodel = "m"\r\n\n[projects."/mine"]\ntrust_level = "untrusted"'


@dataclass
class CliHost:
    """A host with the configuration file of an agent CLI, and the workspaces of a service."""

    path: Path
    store: ServiceStore
    host_id: str = "host"

    @property
    def file(self) -> Path:
        """The CLI's configuration file."""
        return self.path / "config.toml"

    @property
    def env(self) -> Mapping[str, str]:
        """The environment by which the CLI finds its file."""
        return {"CODEX_HOME": str(self.path)}

    def keeper(self, db: Database | None = None) -> TrustKeeper:
        """Return a keeper of trust entries for the current epoch."""
        store = self.store
        return TrustKeeper(
            host_id=self.host_id,
            owner=store.owner,
            store=ConnectionStore(db or store.db),
            clock=store.ticking_clock,
        )

    def workspace(self, run: Run) -> Path:
        """Return the workspace of a run's attempt; it need not exist."""
        return self.path / "runs" / str(run.key) / f"workspace-{run.attempt}"

    def add_entry(self, run: Run, db: Database | None = None) -> None:
        """Record and add the entry for a run's workspace, as its launch does."""
        self.keeper(db).add(self.store.get(run), "codex", self.workspace(run), self.env)

    def trusted_run(self) -> Run:
        """Return a running run with its entry."""
        run = self.store.running().run
        self.add_entry(run)
        return run

    def fail(self, run: Run) -> None:
        """End a run behind the service's back."""
        self.store.set(run, status="FAILED")

    def trusted_waiting_run(self) -> Run:
        """Return a waiting run with its entry."""
        run = self.store.waiting()
        self.add_entry(run)
        return run

    def trusts(self, run: Run) -> bool:
        """Return whether the file has the entry of a run."""
        entry = f'"{self.workspace(run)}"'.encode()
        return self.file.exists() and entry in self.file.read_bytes()

    def recorded(self) -> list[tuple[int, str]]:
        """Return run and folder of each recorded entry that is not known to be removed."""
        sql = "SELECT run, folder FROM trust_entry WHERE removed_at IS NULL"
        return [(key, folder) for key, folder in self.store.rows(sql)]


def outcomes(done: TrustClearing) -> list[tuple[str, str]]:
    return [(one.run_id, one.outcome) for one in done.removals]


def token_of(host: CliHost) -> str:
    """Return the token that identifies the place of the file; create it if there is none."""
    found: list[str | None] = []
    files.edit(host.file, lambda text: Removal(text=text, outcome=Outcome.GONE), begin=found.append)
    assert found[0] is not None
    return found[0]


def unmount(host: CliHost, name: str = "away") -> Path:
    """Move the folder of the file away, as an unmount would."""
    return host.path.rename(host.path.with_name(name))


def mount(host: CliHost, name: str = "away") -> None:
    """Move the folder back, as a mount would."""
    if host.path.exists():
        shutil.rmtree(host.path)
    host.path.with_name(name).rename(host.path)


def mount_another(host: CliHost) -> None:
    """Mount another file system in the place of the file, which the service has used before."""
    host.file.write_bytes(b'model = "other"\n')
    token_of(host)
