"""The store of a service, with shortcuts to bring its runs into the states that tests need."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from runrecovery_service.clock import Clock
from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.domain.run import (
    InteractionKind,
    NewRun,
    Option,
    Profile,
    Question,
    RestartPolicy,
    Run,
    Session,
)
from runrecovery_service.domain.session_check import SessionFingerprint
from runrecovery_service.domain.steady_time import Due, SteadyTime
from runrecovery_service.domain.turn import Asked, TurnEnd
from runrecovery_service.domain.usage import TurnUsage
from runrecovery_service.storage import (
    instances,
    interactions,
    recovery_apply,
    reports,
    runs,
    turn_ends,
    turn_starts,
    turns,
)
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import InstanceStart, Owner
from runrecovery_service.storage.launch_records import LaunchEnd, LaunchSite
from runrecovery_service.storage.recovery_apply import Tally
from runrecovery_service.storage.recovery_scope import ApplyScope
from runrecovery_service.storage.requests import Receipt
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.turns import Turn

T = TypeVar("T")

SITE = LaunchSite(host_id="host", boot_id="boot", pid_namespace=1, watermark_bits=62)
GONE = LaunchEnd(exit_code=0, processes_ended=0, gone=True)
QUESTION = Question(
    kind=InteractionKind.CONFIRM,
    prompt="Shall I go on?",
    options=(Option(label="Yes", value=True), Option(label="No", value={"why": None})),
)
WAIT_S = 1200.0
REOPEN_S = 3600.0
TABLES = (
    "run", "run_event", "run_label", "removed_part", "interaction", "recovery_event",
    "reconciliation", "quarantine", "instance", "instance_epoch", "process_lease",
    "request_receipt", "engine_usage", "model_usage",
)  # fmt: skip

DECIDED = ("run", "interaction", "recovery_event", "quarantine")
UNSTABLE = {
    "recovered_at", "ended_at", "updated_at", "owner_epoch", "reconciliation", "quarantined_at",
    "reopenable_until", "reopen_due_us", "facts", "id",
}  # fmt: skip
"""Columns that may differ between two recoveries with the same decisions."""


def boot(instance: str = "default", **changes: Any) -> InstanceStart:
    """Return the identity of a start of the service on host `host`."""
    given: dict[str, Any] = {
        "boot_token": "t",
        "host_id": "host",
        "data_dir": "/d",
        "pid": 7,
        "lock_id": "boot/1:2",
    } | changes
    return InstanceStart(instance=instance, **given)


def receipt(
    request_id: str = "request",
    *,
    payload: bytes = b"p",
    method: str = "M",
    caller: str | None = None,
) -> Receipt:
    """Return the receipt of a request."""
    return Receipt(request_id=request_id, method=method, fingerprint=payload, caller=caller)


@dataclass
class _TickingClock(Clock):
    store: ServiceStore

    def now(self) -> datetime:
        return self.store.tick()

    def steady(self) -> SteadyTime:
        return self.store.steady

    def due_in(self, seconds: float) -> Due:
        return self.store.due_in(seconds)


@dataclass
class ServiceStore:
    """The open store of a service, its current epoch, and clocks that a test moves."""

    db: Database
    owner: Owner
    now: datetime = datetime(2026, 11, 24, 12, tzinfo=UTC)
    steady_us: int = 5_000_000_000
    clock: str = "boot-1"
    count: Iterable[int] = field(default_factory=lambda: itertools.count(1))

    # -- clocks and use cases--------------------------------------------------------------

    def tick(self) -> datetime:
        """Advance both clocks by a second."""
        self.advance(1)
        return self.now

    def advance(self, seconds: float) -> None:
        """Advance both clocks."""
        self.now += timedelta(seconds=seconds)
        self.steady_us += round(seconds * 1e6)

    def step_wall_clock(self, span: timedelta) -> None:
        """Set the wall clock, as an operator or NTP may do; the steady clock does not change."""
        self.now += span

    def reboot(self, seconds: float) -> None:
        """Boot the machine, which takes `seconds`: its steady clock begins anew."""
        self.now += timedelta(seconds=seconds)
        self.steady_us, self.clock = 7_000_000, f"{self.clock}+"

    @property
    def steady(self) -> SteadyTime:
        """The steady clock."""
        return SteadyTime(clock=self.clock, us=self.steady_us)

    @property
    def ticking_clock(self) -> Clock:
        """Both clocks as a `Clock` that ticks with each reading of the wall clock."""
        return _TickingClock(self)

    def due_in(self, seconds: float) -> Due:
        """Return the deadline in `seconds`."""
        return Due(
            at=self.now + timedelta(seconds=seconds),
            clock=self.clock,
            us=self.steady_us + round(seconds * 1e6),
        )

    def create(
        self,
        *,
        owner: Owner | None = None,
        max_queued: int = 10_000,
        with_receipt: Receipt | None = None,
        **changes: Any,
    ) -> Run:
        """Create a run."""
        new = NewRun(
            run_id=f"run-{next(iter(self.count)):04}",
            engine="demo",
            labels={"team": "blue"},
            profile=Profile.RESUMABLE,
            restart_policy=RestartPolicy.FAIL,
            max_attempts=1,
            input={"prompt": "hello"},
        )
        return runs.create(
            self.db,
            replace(new, **changes),
            owner=owner or self.owner,
            max_queued=max_queued,
            receipt=with_receipt,
            now=self.tick(),
        )

    def take(
        self, *, busy: tuple[str, ...] = (), owner: Owner | None = None, site: LaunchSite = SITE
    ) -> Turn | None:
        """Take the next run from the queue."""
        return turn_starts.take_next(
            self.db,
            owner=owner or self.owner,
            busy_engines=busy,
            site=site,
            due_in=self.due_in,
            steady=self.steady,
            now=self.tick(),
        )

    def running(self, **changes: Any) -> Turn:
        """Create a run and take it, so that its launch is recorded."""
        run = self.create(**changes)
        turn = self.take()
        assert turn is not None
        assert turn.run.key == run.key
        return turn

    def end(
        self,
        turn: Turn,
        how: TurnEnd,
        *,
        ended: LaunchEnd = GONE,
        fingerprint: SessionFingerprint | None = None,
        used: TurnUsage | None = None,
    ) -> Run:
        """End a turn."""
        return turn_ends.record_end(
            self.db,
            turn,
            owner=self.owner,
            end=how,
            ended=ended,
            due=None if turn.run.require_user_reply else self.due_in(WAIT_S),
            due_in=self.due_in,
            mark=fingerprint,
            used=used,
            now=self.tick(),
        )

    def keep_session(self, turn: Turn, handle: str = "secret") -> None:
        """Record a session."""
        session = Session(type="demo", handle=handle, turn=1)
        turns.record_session(self.db, turn, owner=self.owner, session=session, now=self.tick())

    def ask_and_stay(self, turn: Turn) -> Run:
        """Record the first question of a sticky process, which stays alive."""
        return turns.record_sticky_question(
            self.db,
            turn,
            owner=self.owner,
            number=1,
            question=QUESTION,
            due=self.due_in(WAIT_S),
            now=self.tick(),
        )

    def waiting(self, **changes: Any) -> Run:
        """Return a run that waits for its user; a sticky one with its process."""
        turn = self.running(**changes)
        if turn.run.profile is Profile.STICKY_PROCESS:
            return self.ask_and_stay(turn)
        self.keep_session(turn)
        return self.end(turn, Asked(QUESTION))

    def reply(self, run: Run, response: Any = "yes", *, no: int = 1, **named: Any) -> Run:
        """Answer a question."""
        given: dict[str, Any] = {"owner": self.owner, "etag": None, "receipt": None} | named
        return interactions.reply(self.db, run.run_id, no, response, now=self.tick(), **given)

    def cancel(self, run: Run, **named: Any) -> Run:
        """Cancel a run."""
        given: dict[str, Any] = {"owner": self.owner, "etag": None, "receipt": None} | named
        return runs.cancel(self.db, run.run_id, now=self.tick(), **given)

    def get(self, run: Run) -> Run:
        """Read a run again."""
        return runs.get(self.db, run.run_id)

    # -- a restart -------------------------------------------------------------------------

    def restart(self) -> Owner:
        """Take the next epoch, as the next start of the service does."""
        self.owner = instances.claim(self.db, boot(self.owner.instance), now=self.tick())
        return self.owner

    def restart_with(self, db: Database) -> None:
        """Take the next epoch over another view of the store."""
        self.owner = instances.claim(db, boot(self.owner.instance), now=self.tick())

    def open_report(self, cause: Cause = Cause.STARTUP) -> ApplyScope:
        """Open a report; return the scope of its recovery."""
        key = reports.open_report(
            self.db,
            self.owner,
            reconciliation_id=f"report-{next(iter(self.count))}",
            cause=cause,
            safe_mode=False,
            now=self.tick(),
        )
        return self.scope(key, cause)

    def scope(self, reconciliation_key: int = 0, cause: Cause = Cause.STARTUP) -> ApplyScope:
        """Return the scope of a recovery: earlier epochs, and for a planned stop its own too."""
        return ApplyScope(
            owner=self.owner,
            before=self.owner.epoch + (cause is Cause.SHUTDOWN),
            reconciliation_key=reconciliation_key,
            reopen=self.due_in(REOPEN_S),
            now=self.tick(),
            steady=self.steady,
        )

    def apply_recovery(
        self,
        *,
        rows: int = 1000,
        report: recovery_apply.WriteProgress | None = None,
        cause: Cause = Cause.STARTUP,
        found: Mapping[int, FoundEnd] | None = None,
        counted: Mapping[int, TurnUsage] | None = None,
    ) -> Tally:
        """Decide on every run in scope, in batches of `rows`."""
        scope, tally, after = self.open_report(cause), Tally(), 0
        scope = replace(scope, found=found or {}, counted=counted or {})
        while batch := recovery_apply.next_batch(self.db, scope, after=after, rows=rows):
            tally += recovery_apply.apply_batch(
                self.db, scope, batch, report=report or (lambda db, tally: None)
            )
            after = batch.last
        return tally

    def recover(self, **named: Any) -> Tally:
        """Restart, and decide on every run."""
        self.restart()
        return self.apply_recovery(**named)

    # -- the store as it is ------------------------------------------------------------------

    def set(self, run: Run, **columns: object) -> None:
        """Change columns of a run behind the service's back."""
        names = ", ".join(f"{name} = ?" for name in columns)
        with self.db.transaction():
            self.db.execute(f"UPDATE run SET {names} WHERE id = ?", (*columns.values(), run.key))  # noqa: S608

    def set_question(self, run: Run, **columns: object) -> None:
        """Change columns of a run's questions behind the service's back."""
        names = ", ".join(f"{name} = ?" for name in columns)
        with self.db.transaction():
            self.db.execute(
                f"UPDATE interaction SET {names} WHERE run = ?",  # noqa: S608
                (*columns.values(), run.key),
            )

    def column(self, run: Run, name: str) -> Any:
        """Return one stored column of a run."""
        row = self.db.fetch_one(f"SELECT {name} FROM run WHERE id = ?", (run.key,))  # noqa: S608
        assert row is not None
        return row[0]

    def rows(self, sql: str, *params: object) -> list[tuple[Any, ...]]:
        """Run a query."""
        return [tuple(row) for row in self.db.fetch_all(sql, params)]

    def dump(self, *tables: str) -> dict[str, list[dict[str, Any]]]:
        """Return the whole content of tables (all by default), in a stable order."""
        return {table: self._dump(table) for table in tables or TABLES}

    def decided(self) -> dict[str, list[str]]:
        """Return the decisions of recoveries, without times and epochs."""
        return {
            table: sorted(
                str({name: row[name] for name in row if name not in UNSTABLE}) for row in rows
            )
            for table, rows in self.dump(*DECIDED).items()
        }

    def _dump(self, table: str) -> list[dict[str, Any]]:
        cursor = self.db.execute(f"SELECT * FROM {table}")  # noqa: S608
        names = [column[0] for column in cursor.description]
        rows = [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]
        return sorted(rows, key=lambda row: [str(value) for value in row.values()])

    # -- concurrency -------------------------------------------------------------------------

    def all_at_once(self, uses: Iterable[Callable[[], T]], *, threads: int) -> list[T | Exception]:
        """Run use cases concurrently, and return their results and errors in order.

        On SQLite one thread runs them all, as in the service. On PostgreSQL each thread has a
        connection.
        """
        if self.db.dialect.kind is DatabaseKind.SQLITE:
            threads = 1

        def guarded(use: Callable[[], T]) -> T | Exception:
            try:
                return use()
            except Exception as error:  # noqa: BLE001 - returned to the test
                return error
            finally:
                self.db.close()

        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(guarded, uses))


# -- what a killed service leaves ----------------------------------------------------------------


def one_of_each(store: ServiceStore) -> list[Run]:
    """Create runs of many kinds, as a killed service leaves them."""
    made = [
        store.waiting(),
        store.waiting(),
        store.waiting(profile=Profile.STICKY_PROCESS),
        store.waiting(),
        store.waiting(),
        store.cancel(store.waiting()),
        store.running().run,
        store.running().run,
        store.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=2).run,
        store.create(),
        store.create(),
    ]
    store.reply(made[0])
    store.set(made[3], session_value=None)
    store.set_question(made[4], state="DELIVERED")
    store.cancel(made[6])
    return made


REASONS = [
    "accepted_reply_redriven", "resumable_waiting_preserved", "sticky_process_lost",
    "session_handle_lost", "pending_interaction_lost", None, "cancel_completed",
    "running_interrupted", "requeued", "queued_interrupted", "queued_interrupted",
]  # fmt: skip


def reasons(store: ServiceStore, made: Sequence[Run]) -> list[str | None]:
    recovered = [store.get(run).recovery for run in made]
    return [info.recovery_reason if info else None for info in recovered]


class Crash(Exception):
    """The service is killed here."""


class CrashingDatabase(Database):
    """A database whose service is killed at statement number `at`. Only committed changes stay."""

    def __init__(self, db: Database, at: int) -> None:
        super().__init__(db.peewee, db.dialect, db.name)
        self.left = at

    def execute(self, sql: str, params: Sequence[object] = ()) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Crash
        return super().execute(sql, params)
