"""Plays years of runs within minutes, and checks that retention keeps the store from growing.

    python bench/soak.py --runs 100000 --years 3
    python bench/soak.py --runs 20000 --years 0.6 --database postgresql://...

Creates, launches and ends runs by the use cases of the store, with files as agents leave them, on a
clock that the script moves. A sweep of retention follows every 500 runs. Among the
runs are some that must never go: one that waits, one that can be reopened for longer than the soak,
one with a process that is not proved dead, and one that is quarantined. Prints rows, sizes and
memory as they grow, or not, and fails when something grows in the second half, or when one of those
runs is gone.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import structlog
from runrecovery_service.domain.retention import RetentionPolicy
from runrecovery_service.domain.run import Run
from runrecovery_service.domain.turn import Asked, Succeeded
from runrecovery_service.retention.files import RunFiles
from runrecovery_service.retention.sweep import RetentionSweep
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import instances
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.launch_records import LaunchEnd
from runrecovery_service.storage.opening import open_database

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from storage.service_store import QUESTION, ServiceStore, boot, receipt
from support.clock import FakeClock

from bench.flatness import has_grown

ROUND: Final = 500
DAY_S: Final = 86_400.0
POLICY: Final = RetentionPolicy(
    ended_runs=30 * DAY_S,
    outputs=7 * DAY_S,
    workspaces=7 * DAY_S,
    events=14 * DAY_S,
    receipts=7 * DAY_S,
    reports=90 * DAY_S,
)
COLUMNS: Final = ("made", "rows", "database_kib", "folders", "rss_kib")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """The sizes at one moment."""

    made: int
    rows: int
    database_kib: int
    folders: int
    rss_kib: int


class Soak:
    """A store with its files and its retention."""

    def __init__(self, url: str, data: Path) -> None:
        self.data, self.url = data, url
        db = open_database(url, data)
        owner = instances.claim(db, boot(), now=ServiceStore.now)
        self.store = ServiceStore(db=db, owner=owner)
        self.storage = Storage(db)
        self.sweep = RetentionSweep(
            policy=POLICY,
            storage=self.storage,
            owner=owner,
            clock=FakeClock(wall=self.store.now),
            files=RunFiles(data / "runs"),
            stop_signal=StopSignal(),
            pause=lambda _: asyncio.sleep(0),
        )

    def kept_for_ever(self) -> list[Run]:
        """Make the runs that must never go."""
        store = self.store
        waiting, reopenable = store.waiting(), store.waiting()
        store.set(reopenable, session_verdict="INVALID")
        store.recover()
        self.sweep.owner = store.owner
        store.set(reopenable, reopen_due_us=2**60)
        alive = store.end(
            store.running(),
            Succeeded(output={}),
            ended=LaunchEnd(exit_code=None, processes_ended=0, gone=False),
        )
        damaged = store.end(store.running(), Succeeded(output={}))
        store.set(damaged, recovery_state="QUARANTINED")
        return [waiting, reopenable, alive, damaged]

    def do_round(self, number: int, span: timedelta) -> None:
        """Create and end runs, and let time pass."""
        for index in range(ROUND):
            with self.store.db.transaction():
                run = self.store.running(with_receipt=receipt(f"{number}-{index}"))
                if index % 10:
                    self.store.end(run, Succeeded(output={"text": "x" * 200}))
                else:
                    asked = self.store.end(run, Asked(QUESTION))
                    self.store.cancel(asked)
            workspace = self.data / "runs" / str(run.run.key) / "1" / "workspace"
            workspace.mkdir(parents=True)
            (workspace / "notes").write_bytes(b"x" * 500)
            (workspace.parent / "stdout.log").write_bytes(b"x" * 1000)
            self.store.advance(span.total_seconds() / ROUND)
        self.store.db.take_changed_runs()  # as the service does after each write
        if not number % 20:
            self.store.recover()
            self.sweep.owner = self.store.owner

    async def retain(self) -> None:
        """Sweep once."""
        self.sweep.clock = FakeClock(wall=self.store.now)
        await self.sweep.sweep()

    def sizes(self, made: int) -> Sizes:
        """Measure."""
        tables = (
            "run", "interaction", "run_event", "run_label", "recovery_event", "process_lease",
            "request_receipt", "reconciliation",
        )  # fmt: skip
        rows = sum(self.store.rows(f"SELECT count(*) FROM {table}")[0][0] for table in tables)
        files = list(self.data.glob("runrecovery.db*"))
        size = sum(file.stat().st_size for file in files)
        if self.url:
            size = self.store.rows("SELECT pg_database_size(current_database())")[0][0]
        status = Path("/proc/self/status").read_text()
        (rss,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))
        return Sizes(
            made=made,
            rows=rows,
            database_kib=size // 1024,
            folders=sum(1 for _ in (self.data / "runs").iterdir()),
            rss_kib=int(rss),
        )


async def soak(url: str, data: Path, runs: int, years: float) -> list[Sizes]:
    """Return the sizes after each twentieth of the runs."""
    made = Soak(url, data)
    kept = made.kept_for_ever()
    rounds = max(20, runs // ROUND)
    span = timedelta(days=365 * years) / rounds
    found: list[Sizes] = []
    print(*(f"{name:>12}" for name in COLUMNS))
    for number in range(1, rounds + 1):
        made.do_round(number, span)
        await made.retain()
        if not number % (rounds // 20):
            found.append(made.sizes(number * ROUND))
            numbers = (getattr(found[-1], name) for name in COLUMNS)
            print(*(f"{number:>12,}" for number in numbers), flush=True)
    for run in kept:
        assert made.store.get(run).run_id == run.run_id
    removed = {kind.value: count for kind, count in made.sweep.totals.removed.items()}
    print(f"removed: {removed}; {sum(made.sweep.totals.bytes_freed.values()):,} bytes of files")
    made.storage.close()
    made.store.db.close()
    return found


def main() -> None:
    """Run the soak of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=20_000)
    parser.add_argument("--years", type=float, default=3.0)
    parser.add_argument("--database", default="", help="PostgreSQL; default: a SQLite file")
    asked = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        found = asyncio.run(soak(asked.database, Path(folder), asked.runs, asked.years))
    print(f"{time.monotonic() - begun:.0f} s")
    names = [n for n in COLUMNS[1:] if has_grown([getattr(one, n) for one in found])]
    if names:
        sys.exit(f"grew: {', '.join(names)}")


if __name__ == "__main__":
    main()
