"""Measures how long a restart takes to recover many runs, against the simplest SQL for the task.

    python bench/recovery.py --runs 10000 100000 --rounds 3 --database sqlite

The ways, each on a fresh copy of one seeded store, in a process of its own, in turns:

floor    Plain SQL on the same tables and indexes, batches of 20,000 by integer key: one CASE for
         the statuses, the history by INSERT ... SELECT, the questions closed. It checks nothing:
         no damaged rows, no cancels, no replies, no owners, no epochs, no idempotence, no report.
stand-in A peer's published shape rebuilt: an object-relational save per run, 1,000 to a commit,
         on a smaller sample and scaled to the number of runs. It is not that peer.
ours     `Recovery.run` as the service calls it, with no process left to end.
takeover The same for the runs of a dead peer. PostgreSQL only.

Processor time is that of the process, and of its backend in PostgreSQL. It is steadier than the
time that passes, which includes waits for the disk and for other programs.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import structlog
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from runrecovery_service.clock import Clock
from runrecovery_service.domain.reconciliation import Cause, TrustClearing
from runrecovery_service.domain.recovery_matrix import NOTHING
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.recovery.bulk_session_check import BulkSessionCheck
from runrecovery_service.recovery.reconcile import (
    DeadInstance,
    Leftovers,
    Recovery,
    RecoveryLimits,
)
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import tables, takeover
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.dead_instances import TakeoverRules
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchRecord
from runrecovery_service.storage.opening import open_database

from bench.postgres import ScratchPostgres, scratch_postgres
from bench.seed import DEFAULT_MIX, Seeding, claim, fill

BATCH: Final = 20_000
STAND_IN_SAMPLE: Final = 5_000
INSTANCE: Final = "default"

_LIVE: Final = "status IN ('QUEUED', 'RUNNING', 'WAITING_USER')"
_KEPT: Final = "status = 'WAITING_USER' AND profile = 'RESUMABLE' AND session_value IS NOT NULL"
_CODE: Final = (
    "CASE WHEN status <> 'WAITING_USER' THEN 'ORCHESTRATOR_RESTART_INTERRUPTED'"
    " WHEN profile = 'STICKY_PROCESS' THEN 'INTERACTION_PROCESS_LOST'"
    " WHEN session_value IS NULL THEN 'SESSION_RESUME_FAILED' END"
)
_RULE: Final = (
    "CASE WHEN status = 'QUEUED' THEN 'queued_interrupted'"
    " WHEN status = 'RUNNING' THEN 'running_interrupted'"
    " WHEN profile = 'STICKY_PROCESS' THEN 'sticky_process_lost'"
    " WHEN session_value IS NULL THEN 'session_handle_lost'"
    " ELSE 'resumable_waiting_preserved' END"
)
_STATE: Final = f"CASE WHEN {_KEPT} THEN 'RECOVERED_WAITING' ELSE 'FAILED_RECONCILED' END"
_REMEMBER: Final = (
    "INSERT INTO recovery_event (run, no, reconciliation, rule, facts, status_before,"
    " status_after, error_code, recovery_state, recovered_at, processes_ended)"
    f" SELECT id, recovery_count + 1, 1, {_RULE}, 0, status,"
    f" CASE WHEN {_KEPT} THEN status ELSE 'FAILED' END, {_CODE}, {_STATE}, {{now}}, 0"
    f" FROM run WHERE id BETWEEN ? AND ? AND {_LIVE}"
)
_CLOSE: Final = (
    "UPDATE interaction SET state = 'CLOSED' WHERE run BETWEEN ? AND ? AND state = 'OPEN'"
    f" AND run NOT IN (SELECT id FROM run WHERE id BETWEEN ? AND ? AND {_KEPT})"
)
_APPLY: Final = (
    f"UPDATE run SET status = CASE WHEN {_KEPT} THEN status ELSE 'FAILED' END,"
    f" error_code = {_CODE},"
    f" session_type = CASE WHEN {_KEPT} THEN session_type END,"
    f" session_value = CASE WHEN {_KEPT} THEN session_value END,"
    f" ended_at = CASE WHEN {_KEPT} THEN ended_at ELSE {{now}} END,"
    f" updated_at = CASE WHEN {_KEPT} THEN updated_at ELSE {{now}} END,"
    f" version = CASE WHEN {_KEPT} THEN version ELSE version + 1 END,"
    f" recovered_version = CASE WHEN {_KEPT} THEN version ELSE version + 1 END,"
    f" recovery_state = {_STATE}, recovered_at = {{now}}, recovery_reason = {_RULE},"
    " recovery_count = recovery_count + 1, reconciliation = 1, owner_epoch = owner_epoch + 1"
    f" WHERE id BETWEEN ? AND ? AND {_LIVE}"
)
FLOOR: Final = (_REMEMBER, _CLOSE, _APPLY)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One measurement: seconds in all, of the processors, of the longest transaction; MiB."""

    seconds: float
    cpu_s: float
    longest_s: float
    grown_mib: float


class TimedDatabase(Database):
    """A database that records the duration of its longest transaction, in seconds."""

    longest_s = 0.0

    @contextmanager
    def transaction(self) -> Iterator[None]:
        begun = time.perf_counter()
        with super().transaction():
            yield
        self.longest_s = max(self.longest_s, time.perf_counter() - begun)


# -- the three ways ----------------------------------------------------------------------------


def floor(db: Database, _data_dir: Path) -> None:
    """Plain SQL, in batches of BATCH keys."""
    row = db.fetch_one("SELECT max(id) FROM run")
    now = int(time.time() * 1e6)
    for first in range(1, (row[0] if row else 0) + 1, BATCH):
        reach = (first, first + BATCH - 1)
        with db.transaction():
            for sql in FLOOR:
                db.execute(sql.format(now=now), reach * (sql.count("?") // 2))


def stand_in(db: Database, _data_dir: Path) -> None:
    """Load each run as an object, decide in Python, save it, and add a row to the history."""
    with db.peewee.bind_ctx([tables.Run, tables.RecoveryEvent]):
        after, now = 0, int(time.time() * 1e6)
        while keys := db.fetch_all(
            f"SELECT id FROM run WHERE {_LIVE} AND id > ? ORDER BY id LIMIT 1000", (after,)
        ):
            with db.transaction():
                for (key,) in keys:
                    _save_one(tables.Run.get_by_id(key), now)
            after = keys[-1][0]


def _save_one(run: tables.Run, now: int) -> None:
    before, kept = run.status, run.status == "WAITING_USER" and bool(run.session_value)
    if not kept:
        run.status, run.error_code, run.ended_at = "FAILED", "INTERRUPTED", now
    run.recovery_state = "RECOVERED_WAITING" if kept else "FAILED_RECONCILED"
    run.recovery_count += 1
    run.save()
    tables.RecoveryEvent.create(
        run=run.id, no=run.recovery_count, reconciliation=1, rule="stand_in", facts=0,
        status_before=before, status_after=run.status, recovery_state=run.recovery_state,
        recovered_at=now, processes_ended=0,
    )  # fmt: skip


class Nothing:
    """Replaces the parts of a recovery that end launches and remove trust entries."""

    def end(self, launches: Sequence[LaunchRecord]) -> dict[int, Ending]:
        """See `EndsLaunches`."""
        return {}

    def remove_stale_on(self, *_: object) -> TrustClearing:
        """See `TrustCleaner`."""
        return TrustClearing()


def ours(db: Database, data_dir: Path) -> None:
    """The service's own recovery; its log goes to /dev/null."""
    owner = claim(db, instance=INSTANCE, data_dir=data_dir)
    _recover(db, data_dir, owner, Cause.STARTUP)


def take_over(db: Database, data_dir: Path) -> None:
    """The takeover of the instance by a peer, as `TakeoverLoop` does it."""
    peer = claim(db, instance="peer", data_dir=data_dir)
    rules = TakeoverRules(owner=peer, shares_workspaces=True, lease_ttl_s=0.0, host_return_s=1.0)
    taken = takeover.begin(db, rules, INSTANCE)
    if taken is None:
        raise RuntimeError("there is nothing to take over")
    dead = DeadInstance(
        owner=taken.dead,
        demand_current=taken.demand_current,
        is_here=lambda _: True,
        elsewhere=NOTHING,
    )
    _recover(db, data_dir, peer, Cause.TAKEOVER, dead)
    takeover.finish(db, taken, peer)


def _recover(
    db: Database, data_dir: Path, owner: Owner, cause: Cause, dead: DeadInstance | None = None
) -> None:
    with Path(os.devnull).open("w") as nowhere:
        structlog.configure(
            processors=[structlog.processors.JSONRenderer()],
            logger_factory=structlog.PrintLoggerFactory(file=nowhere),
        )
        Recovery(
            owner=owner,
            cause=cause,
            clock=Clock(),
            limits=RecoveryLimits(
                batch_rows=BATCH,
                batch_s=1.0,
                safe_mode_after=0,
                safe_mode_window_s=0,
                reopen_window_s=3600,
            ),
            stop=StopSignal(),
            leftovers=Leftovers(
                sessions=BulkSessionCheck(checks={}, workspace=lambda key, attempt: data_dir),
                launches=Nothing(),
                trust=Nothing(),
            ),
            dead=dead,
        ).run(db, RecoveryStatus())


WAYS: Final[dict[str, Callable[[Database, Path], None]]] = {
    "floor": floor,
    "stand-in": stand_in,
    "ours": ours,
    "takeover": take_over,
}


def measure(way: str, url: str, data_dir: Path) -> Measured:
    """Run one way on a store, in this process."""
    opened = open_database(url, data_dir)
    db = TimedDatabase(opened.peewee, opened.dialect, opened.name)
    row = db.fetch_one("SELECT pg_backend_pid()") if url else None
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    begun, cpu_before = time.perf_counter(), _cpu_s(row)
    WAYS[way](db, data_dir)
    seconds, cpu_s = time.perf_counter() - begun, _cpu_s(row) - cpu_before
    before_kib = pages * resource.getpagesize() // 1024
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib
    db.close()
    return Measured(
        seconds=seconds, cpu_s=cpu_s, longest_s=db.longest_s, grown_mib=grown_kib / 1024
    )


def _cpu_s(backend: tuple[int] | None) -> float:
    """Return the processor time of this process and of its backend in PostgreSQL."""
    used = time.process_time()
    if backend is not None:
        fields = Path(f"/proc/{backend[0]}/stat").read_text().rpartition(")")[2].split()
        used += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return used


# -- stores ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Stores:
    """Seeded stores and fresh copies of them."""

    top: Path
    server: ScratchPostgres | None
    made: int = field(default=0, init=False)

    def seeded(self, name: str, runs: int) -> str:
        """Make a store with this many live runs and return its name."""
        (self.top / name).mkdir()
        url = self.server.create(name) if self.server else ""
        db = open_database(url, self.top / name)
        owner = claim(db, instance=INSTANCE, data_dir=self.top)
        fill(db, owner, Seeding(runs=runs, mix=DEFAULT_MIX), now=datetime.now(UTC))
        if self.server:
            db.peewee.connection().autocommit = True
            db.peewee.cursor().execute("VACUUM ANALYZE")
        db.close()
        return name

    def measure(self, way: str, seeded: str) -> Measured:
        """Run one way on a fresh copy, in a process of its own."""
        self.made += 1
        name = f"copy{self.made}"
        shutil.copytree(self.top / seeded, self.top / name)
        url = self.server.create(name, template=seeded) if self.server else ""
        answer = subprocess.run(
            [sys.executable, __file__, "--measure", way, "--url", url, "--dir", self.top / name],
            check=True,
            stdout=subprocess.PIPE,
        ).stdout
        shutil.rmtree(self.top / name)
        if self.server:
            self.server.drop(name)
        return Measured(**json.loads(answer))


@contextmanager
def stores(database: str) -> Iterator[Stores]:
    """Make a folder for stores, which is removed afterwards."""
    with ExitStack() as stack:
        top = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="runrecovery-bench-")))
        start = scratch_postgres("max_wal_size=4GB")
        server = stack.enter_context(start) if database == "postgresql" else None
        yield Stores(top, server)


# -- the table ---------------------------------------------------------------------------------


def compare(stores: Stores, *, runs: int, rounds: int) -> dict[str, list[Measured]]:
    """Measure the ways in turns, the stand-in once and on its sample."""
    full = stores.seeded(f"full{runs}", runs)
    sample = stores.seeded(f"sample{runs}", min(runs, STAND_IN_SAMPLE))
    ways = ("floor", "ours", *(("takeover",) if stores.server else ()))
    measured: dict[str, list[Measured]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, results in measured.items():
            results.append(stores.measure(way, full))
    return measured | {"stand-in": [stores.measure("stand-in", sample)]}


def show(measured: dict[int, dict[str, list[Measured]]], *, database: str) -> None:
    """Print the table. Ratios are the median of the rounds' ratios to the floor."""
    table = Table(title=f"Recovery, {database}")
    for heading in (
        "runs", "way", "CPU µs per run", "to floor", "µs per run", "to floor",
        "longest transaction, s", "memory grown, MiB",
    ):  # fmt: skip
        table.add_column(heading, justify="left" if heading == "way" else "right")
    for runs, ways in measured.items():
        for way, results in ways.items():
            rows = min(runs, STAND_IN_SAMPLE) if way == "stand-in" else runs
            pairs = list(zip(results, ways["floor"], strict=False))  # the stand-in has one round
            table.add_row(
                f"{runs:,}",
                way,
                f"{1e6 * statistics.median(m.cpu_s for m in results) / rows:.1f}",
                f"{statistics.median(m.cpu_s / f.cpu_s for m, f in pairs) * runs / rows:.2f}",
                f"{1e6 * statistics.median(m.seconds for m in results) / rows:.1f}",
                f"{statistics.median(m.seconds / f.seconds for m, f in pairs) * runs / rows:.2f}",
                f"{max(m.longest_s for m in results):.3f}",
                f"{max(m.grown_mib for m in results):.1f}",
            )
    Console(width=110).print(table)


def main() -> None:
    """Compare, or (as the process that compares starts it) measure one way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, nargs="+", default=[100_000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--database", choices=("sqlite", "postgresql"), default="sqlite")
    for inner in ("--measure", "--url", "--dir"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    args = parser.parse_args()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
    )
    if args.measure:
        print(json.dumps(asdict(measure(args.measure, args.url, Path(args.dir)))))
        return
    with stores(args.database) as places:
        measured = {runs: compare(places, runs=runs, rounds=args.rounds) for runs in args.runs}
    show(measured, database=args.database)


if __name__ == "__main__":
    main()
