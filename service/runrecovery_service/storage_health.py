"""Checks that the storage works, and sets the health of the service by the results.

A renewed lease proves little: the row of the lease can be writable although other rows are damaged
or locked, or although the files of the store were removed. Two checks find these failures: trials
of the most important statements, and a watch on the files.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import field
from typing import Final

import structlog

from runrecovery_service import daemon_threads
from runrecovery_service.clock import Clock
from runrecovery_service.domain.errors import Fenced, error_facts
from runrecovery_service.domain.start_errors import StartRefused
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.periodic import PeriodicTask
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import trial
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.instances import Owner

log = structlog.get_logger()

TRIALS_PER_LEASE: Final = 5
"""How many trials of the statements are made in `lease_ttl_s`."""
LEASES_PER_WRITE_TRIAL: Final = 2
"""On PostgreSQL, how many times `lease_ttl_s` lie between two trials that write. A write uses up
keys."""
FAILURES_IN_A_ROW: Final = 2
"""How many trials must fail in a row before health says NOT_SERVING."""
FILE_CHECK_S: Final = 1.0
"""How soon a removed lock or SQLite file is noticed without a write."""
FILE_CHECK_TIMEOUT_S: Final = 5.0
"""How long the file system may take to answer a check before the delay is logged."""


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
class StatementTrials:
    """Regularly runs the most important statements of the service, once the recovery has ended."""

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
            interval_s=self.lease_ttl_s / TRIALS_PER_LEASE,
            failure_event="service.defect",
            stop_signal=self.stop,
            retried=(),  # `_failed_statement` handles every error of the store
        )

    async def run_trial(self) -> None:
        """Run the statements once, and set health by the result."""
        if not self.gate.recovered or self.stop.is_set():
            return
        trials_per_write = (
            TRIALS_PER_LEASE * LEASES_PER_WRITE_TRIAL if self.storage.is_shared else 1
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
        failing_s = self.lease_ttl_s / TRIALS_PER_LEASE
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


def file_watch(
    demand_in_place: Callable[[], None],
    stop: StopSignal,
    *,
    start: Callable[[Callable[[], None]], Future[None]] = daemon_threads.start,
) -> PeriodicTask:
    """Return the loop that stops the service once a lock or a file of the store is lost.

    Each check runs in its own thread: a file system that hangs (NFS, FUSE) must not block the event
    loop. Only one check runs at a time. A check without an answer does not stop the service.

    Args:
        start: starts a check in a thread, or raises RuntimeError.
    """

    async def check() -> None:
        try:
            check = asyncio.wrap_future(start(demand_in_place))
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
