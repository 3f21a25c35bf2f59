"""The home of a service that is killed again and again, and its clients."""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg
from campaign import scan
from campaign.judges import Rows
from campaign.kill_judges import SLOTS
from campaign.load import Journal
from campaign.witness import lock_run_and_note_start
from support.engines import EngineSpec, demo_command
from support.processes import ProcessIdentity, is_alive
from support.service import Home, ServiceProcess
from support.waiting import until

HERE: Final = Path(__file__).parent
SHIMS: Final = (
    "SELECT pid, start_ticks FROM process_lease WHERE pid IS NOT NULL"
    " AND epoch < (SELECT epoch FROM instance) ORDER BY id DESC LIMIT 40"
)
BACKENDS: Final = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    " AND pid <> pg_backend_pid()"
)


def engines(folder: Path) -> dict[str, EngineSpec]:
    """Return the engines of the demo agent, which leaves its notes in a folder."""
    *python, text, _, _ = demo_command("resumable")
    text = lock_run_and_note_start(folder) + text
    return {
        "resumable": EngineSpec(
            command=(*python, text, "--profile", "resumable"),
            more={
                "session_file": "{workspace}/session-{value}.json",
                "resumes_interrupted": True,
            },
        ),
        "sticky": EngineSpec(
            command=(*python, text, "--profile", "sticky"), profile="sticky_process"
        ),
    }


class KillHome(Home):
    """A home at a socket that stays the same over all starts.

    Attributes:
        notes: the folder of the agents' notes.
    """

    def __init__(self, path: Path, *, database: str = "", mutant: str = "") -> None:
        """Make the folders and the configuration.

        Args:
            database: of PostgreSQL; empty: SQLite.
            mutant: the broken service to run; empty: the real one.
        """
        path.mkdir()
        self._socket = f"runrecovery-{secrets.token_hex(8)}"  # a path can be too long for a socket
        self.notes = path / "notes"
        self.notes.mkdir()
        program = (sys.executable, str(HERE / "kill_mutants.py"), mutant)
        super().__init__(
            path,
            engines=engines(self.notes),
            prefix=program if mutant else (),
            database=database,
            max_concurrent=SLOTS,
            cancel_grace_s=0.2,
            orphan_grace_s=0.05,
            retry_hint_s=0.05,
            safe_mode_after=0,  # most starts in a row may be killed
        )

    @property
    def address(self) -> str:
        """The address of each of its services."""
        return f"unix-abstract:{self._socket}"

    def spawn(self, *arguments: str, stderr: int | None = None) -> ServiceProcess:
        """Start the service at its address, and wait for nothing."""
        return super().spawn("--listen", self.address, *arguments, stderr=stderr)

    @contextmanager
    def reader(self) -> Iterator[Rows]:
        """Yield a function that returns the rows of a query."""
        url = str(self.settings["database"])
        if not url:
            with self.store() as store:
                yield lambda sql: store.execute(sql).fetchall()
            return
        with psycopg.connect(url, autocommit=True) as server:
            yield lambda sql: server.execute(sql.encode()).fetchall()

    def until_silent(self) -> None:
        """Wait until the server has ended what a killed service had sent."""
        if self.settings["database"]:
            with self.reader() as rows:
                until(lambda: rows(BACKENDS) == [(0,)], "the killed service's backends are gone")

    def survivors(self, service: ServiceProcess, rows: Rows) -> Iterator[str]:
        """Yield the living agents, their children and shims that are older than a service."""
        own = scan.read_process(service.pid)
        assert own is not None
        for pid in self.agents():
            seen = scan.read_process(pid)
            if seen is not None and seen.start_ticks < own.start_ticks:
                yield f"pid {pid}: {seen.command!r}"
        for pid, start_ticks in rows(SHIMS):
            if is_alive(ProcessIdentity(pid, start_ticks)):
                yield f"pid {pid}: a shim"


class Load:
    """The process of the clients, and a copy of their journal."""

    def __init__(self, home: KillHome, seed: int, *options: str) -> None:
        self.journal = Journal()
        self._file = home.path / f"journal-{time.monotonic_ns()}"
        self._offset = 0
        words = ["--address", home.address, "--journal", str(self._file), "--seed", str(seed)]
        self._log = (home.path / "load.log").open("wb")
        self._popen = subprocess.Popen(
            [sys.executable, str(HERE / "kill_load.py"), *words, *options],
            stdin=subprocess.PIPE,
            stdout=self._log,
            stderr=self._log,
        )
        until(self._file.exists, "the clients have begun")

    def read(self) -> Journal:
        """Read the rest of the journal, and return all of it."""
        with self._file.open("rb") as file:
            file.seek(self._offset)
            *lines, _ = file.read().split(b"\n")
        self._offset += sum(len(line) + 1 for line in lines)
        for line in lines:
            self.journal.repeat(line)
        return self.journal

    def end_clients(self) -> None:
        """Let the clients end, and the watchers continue."""
        self._write()
        until(lambda: self.read().counts["finished"] == 1, "the clients have ended", timeout_s=90)

    def end_watchers(self) -> None:
        """Let the watchers end, and the process."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._popen.wait(90)
        self.read()

    def _write(self) -> None:
        assert self._popen.stdin is not None
        self._popen.stdin.write(b"\n")
        self._popen.stdin.flush()

    def close(self) -> None:
        """Kill the process, if it lives."""
        self._popen.kill()
        self._popen.wait()
        self._log.close()
        if self._popen.stdin is not None:
            self._popen.stdin.close()


def lost_run(rows: Rows) -> Any:
    """Return the run_id of a run that waits for a reply without a process; None: none does."""
    found = rows(
        "SELECT run_id FROM run WHERE status = 'WAITING_USER' AND profile = 'RESUMABLE'"
        " AND cancel_requested_at IS NULL AND recovery_count < 3 ORDER BY id LIMIT 1"
    )
    return found[0][0] if found else None
