"""Keeps this service the owner of its runs, or stops it: lease, tree deadline, self-fencing.

A renewal of the lease does not notice every failure of the store. Trials of the statements and a
watch on the files find the others.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import structlog

from runrecovery_service import daemon_threads
from runrecovery_service.clock import Clock
from runrecovery_service.domain.errors import Exhausted, Fenced, NotNow, error_facts
from runrecovery_service.domain.start_errors import LeaseLost, StartRefused
from runrecovery_service.engines.catalog import Catalog
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.execution.running_turns import RunningTurns
from runrecovery_service.locks import ServiceLocks
from runrecovery_service.periodic import PeriodicTask
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.renewal_note import RenewalNote
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import instances, trial
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.commit_history import CommitHistory, LogPosition
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner

if TYPE_CHECKING:  # not imported with SQLite
    from runrecovery_service.storage.peer_notices import PeerNotices

log = structlog.get_logger()

RENEWALS_PER_LEASE: Final = 5
"""How many renewals, and how many trials of the statements, are made in `lease_ttl_s`."""
SELF_FENCE_SHARE: Final = 2 / 3
"""A PostgreSQL instance stops when it could not renew for this share of `lease_ttl_s`. On SQLite
the file lock keeps others out, and a full disk is no reason to stop."""
RENEWAL_TRY_SHARE: Final = 0.3
"""One try to renew the lease may take this share of `lease_ttl_s`."""
TREES_BEFORE_LEASE_S: Final = 1.0
"""If the lease is not renewed, process trees end this long before the lease does. An instance that
takes over then finds no process alive."""
LEASES_PER_WRITE_TRIAL: Final = 2
"""On PostgreSQL a write is tried once in this many times `lease_ttl_s`: each write uses up keys."""
FAILURES_IN_A_ROW: Final = 2
"""Health says NOT_SERVING after this many failed trials in a row."""
FILE_CHECK_S: Final = 1.0
"""How soon a removed lock or SQLite file is noticed without a write."""
SHARED_POLL_S: Final = 1.0
"""Seconds between two polls for changes of other instances."""
NOTICE_PAUSE_S: Final = 0.05
"""Hints that arise within this time are sent together."""
LISTEN_AGAIN_S: Final = 5.0
"""The pause before a lost connection for hints is replaced. Meanwhile polls find all changes."""
FILE_CHECK_TIMEOUT_S: Final = 5.0
"""A file system that does not answer a check for this long is logged."""


def tree_deadline_ns(lease_ttl_s: float, renewed_ns: int) -> int:
    """Return the time at which process trees must end unless the lease is renewed again.

    Both times are nanoseconds of CLOCK_BOOTTIME, which also runs while the machine sleeps.

    Args:
        renewed_ns: when the last successful renewal began.
    """
    return renewed_ns + int((lease_ttl_s - TREES_BEFORE_LEASE_S) * 1e9)


@dataclass(slots=True)
class StorageHealthReporter:
    """Sets the health of the service by whether all parts of the storage answer."""

    gate: Gate
    _unanswered: set[str] = field(default_factory=set)

    def note(self, part: str, *, answers: bool) -> None:
        """Record whether one part answers. Health is SERVING only if all parts answer."""
        if answers:
            self._unanswered.discard(part)
        else:
            self._unanswered.add(part)
        self.gate.set_storage_answers(answers=not self._unanswered)


@dataclass(slots=True, kw_only=True, eq=False)
class LeaseRenewal:
    """Renews the lease for ever, and fences this service when it may no longer be the owner.

    Attributes:
        catalog: the configured engines. Each renewal writes their names into the instance's row.
        note: keeps each acknowledged renewal, for the next start; None on SQLite.
        commits: the position up to which the database has acknowledged commits to this start.
        unrenewed: set when the lease could not be renewed for `SELF_FENCE_SHARE` of `lease_ttl_s`.
    """

    lease_ttl_s: float
    storage: Storage
    owner: Owner
    catalog: Catalog
    turns: RunningTurns
    health: StorageHealthReporter
    stop: StopSignal
    note: RenewalNote | None
    commits: CommitHistory = field(init=False)
    unrenewed: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop, init=False)
    _renewed_s: float = field(init=False)
    _last_try_s: float = field(init=False)
    _acknowledged_us: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.commits = CommitHistory(self.owner.instance, self.lease_ttl_s)
        self._renewed_s = self._last_try_s = boot_time_ns() / 1e9

    @property
    def interval_s(self) -> float:
        """Seconds between two renewals while they succeed."""
        return self.lease_ttl_s / RENEWALS_PER_LEASE

    @property
    def left_s(self) -> float:
        """Seconds until the lease ends. Negative if it has ended."""
        return self._renewed_s + self.lease_ttl_s - boot_time_ns() / 1e9

    def tasks(self) -> list[PeriodicTask]:
        """Return the loop of renewals and, on SQLite, the loop that lets process trees live."""
        renewal = PeriodicTask(
            name="lease-renewal",
            step=self.renew,
            interval_s=self.interval_s,
            failure_event="service.lease_not_renewed",
            stop_signal=self.stop,
            fatal=(Fenced, LeaseLost),
            retried=(),  # `renew` handles every error of the store
        )
        if self.storage.is_shared:
            return [renewal]
        # On SQLite a full disk makes renewals fail or hang. This must not end process trees.
        trees = PeriodicTask(
            name="tree-deadline",
            step=self._let_trees_live,
            interval_s=self.interval_s,
            failure_event="service.defect",
            stop_signal=self.stop,
            retried=(),
        )
        return [renewal, trees]

    def demand_current(self, db: Database) -> LogPosition | None:
        """Check the epoch at the beginning of a transaction; stop the service if it is superseded.

        Without this check, only the next renewal would notice a new epoch or lost commits. Any
        thread may call this.

        Returns:
            The end of the write-ahead log; None if the database does not report positions.

        Raises:
            Fenced: a newer epoch of this instance has started.
            CommitsLost: the database lacks commits that it had acknowledged.
        """
        before = self.commits.acknowledged
        try:
            position = instances.demand_current(db, self.owner)
            if position is not None:
                self.commits.demand_kept(db, before, position)
        except Fenced as error:
            self._loop.call_soon_threadsafe(self.stop.fail, error)
            raise
        return position

    async def renew(self) -> float | None:
        """Try once to renew the lease, and return the pause until the next try; None: `interval_s`.

        Raises:
            Fenced: a newer epoch of this instance has started.
            CommitsLost: the database lacks commits that it had acknowledged.
            LeaseLost: the lease could not be renewed for too long, so that others may take it.
        """
        begun_ns = boot_time_ns()
        begun_s = begun_ns / 1e9
        if begun_s - self._last_try_s > self.lease_ttl_s - TREES_BEFORE_LEASE_S:
            log.warning("service.stood_still", seconds=round(begun_s - self._last_try_s, 1))
        self._last_try_s = begun_s
        pause_s = None
        try:
            async with asyncio.timeout(self._try_limit_s(begun_s)):
                until_us = await self.storage.renew(
                    instances.renew,
                    self.owner,
                    ttl_s=self.lease_ttl_s,
                    acknowledged_us=self._acknowledged_us,
                    engines=self.catalog.names,
                )
        except Fenced:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the error, the lease is not renewed
            log.warning("service.lease_not_renewed", **error_facts(error))
            self.health.note("lease", answers=False)
            pause_s = self.interval_s / 3
        else:
            self._note_renewed(begun_ns)
            if self.storage.is_shared:
                self._acknowledged_us = until_us
            if self.note is not None:
                self.note.keep(until_us)
        self._demand_recent_renewal()
        return pause_s

    def _try_limit_s(self, begun_s: float) -> float:
        # A connection can hang. The limit leaves time for a try on another connection.
        most_s = self.lease_ttl_s * RENEWAL_TRY_SHARE
        if not self.storage.is_shared:  # SQLite has no self-fencing, so a slow disk may recover
            return most_s
        left_s = self._renewed_s + self.lease_ttl_s * SELF_FENCE_SHARE - begun_s
        return min(max(0.1, left_s), most_s)

    def _note_renewed(self, begun_ns: int) -> None:
        self._renewed_s = begun_ns / 1e9
        if self.storage.is_shared:
            self.turns.heartbeat(tree_deadline_ns(self.lease_ttl_s, begun_ns))
        self.health.note("lease", answers=True)
        self.unrenewed.clear()

    def _demand_recent_renewal(self) -> None:
        self_fence_s = self.lease_ttl_s * SELF_FENCE_SHARE
        if boot_time_ns() / 1e9 - self._renewed_s <= self_fence_s:
            return
        self.unrenewed.set()
        if self.storage.is_shared:
            self.storage.abandon()  # otherwise calls that wait for an answer would never return
            raise LeaseLost(self.owner.instance, self_fence_s)

    async def _let_trees_live(self) -> None:
        self.turns.heartbeat(tree_deadline_ns(self.lease_ttl_s, boot_time_ns()))


@dataclass(slots=True, kw_only=True, eq=False)
class StatementTrials:
    """Regularly runs the most important statements of the service, once the recovery has ended.

    A renewed lease proves little: other rows may be damaged or locked although the row of the lease
    is not.
    """

    lease_ttl_s: float
    storage: Storage
    owner: Owner
    clock: Clock
    dispatcher: Dispatcher
    gate: Gate
    health: StorageHealthReporter
    stop: StopSignal
    _trials: int = field(default=0, init=False)
    _failures: int = field(default=0, init=False)

    def task(self) -> PeriodicTask:
        """Return the loop of the trials."""
        return PeriodicTask(
            name="statement-trials",
            step=self.run_trial,
            interval_s=self.lease_ttl_s / RENEWALS_PER_LEASE,
            failure_event="service.defect",
            stop_signal=self.stop,
            retried=(),  # `_failed_statement` handles every error of the store
        )

    async def run_trial(self) -> None:
        """Run the statements once, and set health by the result."""
        if not self.gate.recovered or self.stop.is_set():
            return
        trials_per_write = (
            RENEWALS_PER_LEASE * LEASES_PER_WRITE_TRIAL if self.storage.is_shared else 1
        )
        # After a failure every trial writes: a read alone would not notice that writes still fail.
        writes = bool(self._failures) or self._trials % trials_per_write == 0
        failure = await self._failed_statement(writes=writes)
        self._trials += 1
        self._failures = 0 if failure is None else self._failures + 1
        self.dispatcher.check_queue()  # so that `failing_s` is up to date at the next trial
        if failure is not None:
            log.warning("service.statements_failed", **failure, times=self._failures)
        self.health.note("statements", answers=self._failures < FAILURES_IN_A_ROW)

    async def _failed_statement(self, *, writes: bool) -> dict[str, str] | None:
        """Run the statements; return the log fields of a failure, or None if all succeeded."""
        try:
            await self._try_reads()
            if writes:
                await self._try_write()
        except Exception as error:  # noqa: BLE001 - any error here would also hit the service's own statements
            return error_facts(error)
        failing_s = self.lease_ttl_s / RENEWALS_PER_LEASE
        return {"error": "take_next"} if self.dispatcher.failing_s >= failing_s else None

    async def _try_reads(self) -> None:
        async with asyncio.timeout(self.lease_ttl_s):
            await self.storage.run_trial(trial.read_newest_run)
            if self.storage.is_shared:
                await self.storage.run_trial(trial.demand_rights)

    async def _try_write(self) -> None:
        is_shared = self.storage.is_shared
        # On PostgreSQL a connection can hang. SQLite's one writer thread has its own limits.
        async with asyncio.timeout(self.lease_ttl_s if is_shared else None):
            await (self.storage.run_trial if is_shared else self.storage.write_own)(
                trial.try_create_and_take,
                owner=self.owner,
                due_in=self.clock.due_in,
                steady=self.clock.steady(),
                now=self.clock.now(),
            )


def file_watch(demand_in_place: Callable[[], None], stop: StopSignal) -> PeriodicTask:
    """Return the loop that stops the service once a lock or a file of the store is lost.

    Each check runs in its own thread: a file system that hangs (NFS, FUSE) must not block the event
    loop. Only one check runs at a time. A check without an answer does not stop the service.
    """

    async def check() -> None:
        try:
            check = asyncio.wrap_future(daemon_threads.start(demand_in_place))
        except RuntimeError as error:  # the system refuses a thread
            log.warning("service.files_not_seen", error=str(error))
            return
        answered, _ = await asyncio.wait({check}, timeout=FILE_CHECK_TIMEOUT_S)
        if not answered:
            log.warning("service.files_not_seen", error="no answer")
        try:
            await check
        except OSError as error:  # renewals fail with it too, and set health to NOT_SERVING
            log.warning("service.files_not_seen", error=error.strerror)

    return PeriodicTask(
        name="file-watch",
        step=check,
        interval_s=FILE_CHECK_S,
        failure_event="service.defect",
        stop_signal=stop,
        fatal=(Fenced, StartRefused),
        retried=(),
    )


def shared_poll(storage: Storage, stop: StopSignal) -> PeriodicTask:
    """Return the loop that polls a shared store for changes by other instances."""
    return PeriodicTask(
        name="shared-poll",
        step=storage.poll_shared,
        interval_s=SHARED_POLL_S,
        failure_event="storage.changes_not_seen",
        stop_signal=stop,
        retried=(NotNow, Exhausted),
    )


def notice_loops(notices: PeerNotices, stop: StopSignal) -> list[PeriodicTask]:
    """Return the loops that send hints to other instances, and receive hints from them."""
    return [
        PeriodicTask(
            name="peer-notices",
            step=notices.send,
            interval_s=NOTICE_PAUSE_S,
            failure_event="storage.notices_not_sent",
            stop_signal=stop,
            retried=(NotNow, Exhausted),
        ),
        PeriodicTask(
            name="peer-listener",
            step=notices.listen,
            interval_s=LISTEN_AGAIN_S,
            failure_event="storage.notices_not_heard",
            stop_signal=stop,
            waits_first=False,
            retried=(NotNow, Exhausted),
        ),
    ]


@dataclass(slots=True, kw_only=True, eq=False)
class Ownership:
    """Everything that keeps this service the owner of its runs, until `stop_tasks`."""

    lease: LeaseRenewal
    trials: StatementTrials
    storage: Storage
    owner: Owner
    locks: ServiceLocks
    stop: StopSignal
    _tasks: list[asyncio.Task[None]] = field(default_factory=list, init=False)

    def start(self) -> None:
        """Start all loops. A defect in any of them stops the service."""
        notices = self.storage.notices
        loops = [
            *self.lease.tasks(),
            self.trials.task(),
            file_watch(self._demand_in_place, self.stop),
            *([shared_poll(self.storage, self.stop)] if self.storage.is_shared else []),
            *([] if notices is None else notice_loops(notices, self.stop)),
        ]
        self._tasks = [loop.start() for loop in loops]
        for task in self._tasks:
            task.add_done_callback(self.stop.task_ended)

    async def stop_tasks(self) -> None:
        """Stop all loops, so that the lease is no longer renewed."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def resign(self) -> None:
        """Release the lease, so that the next start need not wait until it ends."""
        stopped_us = await self.storage.write(instances.resign, self.owner)
        if self.lease.note is not None and stopped_us is not None:
            await self.lease.note.keep_stop(stopped_us)

    def _demand_in_place(self) -> None:
        self.storage.demand_in_place()
        self.locks.demand_in_place()
