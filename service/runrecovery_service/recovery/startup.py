"""The order of a restart. Each step may be cut off anywhere and is done again by the next start.

A planned stop does the same steps for its own epoch, so that its next start finds them done.

0. What another instance name left in a SQLite store is adopted: everything below then covers it.
1. Orphans are ended before any state changes: one of them may still write to a run that is about
   to fail. 2. Session handles are checked where their engine can tell. 3. Every run of an
earlier epoch is converged, in batches. 4. What ended runs still hold is cleared. 5. Deadlines are
brought onto the clock that runs now. 6. The report is committed, with what the start's probe of its
containment proved. Only then may the gate open. After 4., files of agent CLIs lose the entries
that runs no longer need; nothing that fails there keeps the service from starting.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import structlog

from runrecovery_service.clock import Clock
from runrecovery_service.domain.errors import RecoveryInterrupted, StorageBusy, error_facts
from runrecovery_service.domain.reconciliation import (
    Cause,
    Containment,
    OrphanCounts,
    Reconciliation,
    TrustClearing,
    TrustRemoval,
)
from runrecovery_service.domain.session_check import SessionCheck
from runrecovery_service.process.ending import Ending
from runrecovery_service.recovery.report import ReportBook
from runrecovery_service.recovery.sessions import CHECK_S, Asker, Workspace, changed_findings
from runrecovery_service.storage import adoption, converge, deadlines, processes, recovery
from runrecovery_service.storage.adoption import Adopted
from runrecovery_service.storage.converge import Batch, Scope
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.faults import DRIVER_ERRORS, translate
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.processes import Ended, Lease

log = structlog.get_logger()

SMALLEST_BATCH: Final = 500
TRUST_S: Final = 10.0
"""For what goes out of files of agent CLIs; the rest is taken out while the service runs."""
DECISIONS_LOGGED: Final = 1000
"""Per recovery, runs whose decision gets a log line of its own; the history has all."""

Sweep = Callable[[Sequence[Lease]], Mapping[int, Ending]]
"""Ends everything that is alive of these launches; the answer is by lease key."""


Told = Callable[[Database, tuple[TrustRemoval, ...]], object]
ClearTrust = Callable[[Database, Told, Callable[[], bool]], TrustClearing]
"""Takes out of the files of agent CLIs what no living run needs, tells of it in the transaction
that puts it on record, and leaves the rest when asked. Called outside of transactions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How a recovery is bounded: rows and seconds of one batch, unfinished starts before safe
    mode (0: never) and the seconds in which they count, seconds in which a run that lost its
    session can be set back."""

    batch_rows: int
    batch_s: float
    safe_mode_after: int
    safe_mode_window_s: float
    reopen_window_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """One start's, or planned stop's, recovery and what it works with.

    Attributes:
        cause: which of the two it is.
        check_s: seconds that a bulk of sessions may take.
        containment: waits for the probe's result; None: nothing is probed at a stop.
    """

    owner: Owner
    cause: Cause
    containment: Callable[[], Containment] | None
    limits: Limits
    sweep: Sweep
    clear_trust: ClearTrust
    session_checks: Mapping[str, SessionCheck]
    workspace: Workspace
    clock: Clock
    stopping: Callable[[], bool]
    check_s: float = CHECK_S

    @property
    def before(self) -> int:
        """The epoch below which everything is examined."""
        return self.owner.epoch + (1 if self.cause is Cause.SHUTDOWN else 0)

    def run(self, db: Database, begun: Callable[[str], None]) -> Reconciliation:
        """Recover, and return the completed report. Blocking.

        Args:
            begun: told the reconciliation_id as soon as the report can be read.

        Raises:
            RecoveryInterrupted: the service is to stop.
            RunRecoveryError, peewee errors: the report is FAILED; trying again is safe.
        """
        book = ReportBook(
            owner=self.owner,
            reconciliation_id=str(uuid.uuid4()),
            cause=self.cause,
            safe_mode=self._is_safe_mode(db),
            clock=self.clock,
        )
        book.open(db)
        begun(book.reconciliation_id)
        log.info(
            "recovery.started",
            **_identity(book),
            cause=book.cause.value,
            safe_mode=book.safe_mode,
        )
        try:
            if self.cause is Cause.STARTUP:
                self._adopt(db, book)
            with book.phase("orphans"):
                self._end_orphans(db, book)
            scope = Scope(
                owner=self.owner,
                before=self.before,
                reconciliation_key=book.key,
                reopen=self.clock.due_in(self.limits.reopen_window_s),
                now=self.clock.now(),
            )
            with book.phase("sessions"):
                self._check_sessions(db, book, scope)
            with book.phase("converge"):
                self._converge(db, book, scope)
            with book.phase("bindings"):
                book.tally += converge.clear_stale_bindings(db, self.owner)
            with book.phase("trust"):
                self._clear_trust(db, book)
            if self.cause is Cause.STARTUP:
                with book.phase("deadlines"):
                    self._rearm(db, book)
            if self.containment is not None:
                with book.phase("containment"):
                    book.containment = self.containment()
            report = book.complete(db)
        except Exception as error:
            self._fail(db, book, error)
            raise
        _log_completed(book, report)
        return report

    def _is_safe_mode(self, db: Database) -> bool:
        limits = self.limits
        if not limits.safe_mode_after or self.cause is Cause.SHUTDOWN:
            return False
        since = self.clock.now() - timedelta(seconds=limits.safe_mode_window_s)
        unfinished = recovery.unfinished_since(db, self.owner.instance, since)
        return unfinished >= limits.safe_mode_after

    def _fail(self, db: Database, book: ReportBook, error: Exception) -> None:
        interrupted = isinstance(error, RecoveryInterrupted)
        reason = recovery.INTERRUPTED if interrupted else type(error).__name__
        log.error("recovery.failed", **_identity(book), error=reason)
        try:
            book.fail(db, reason)
        except Exception:  # noqa: BLE001 - the store may be what failed; the next start closes it
            log.warning("recovery.report_not_closed", **_identity(book))

    # -- adoption ------------------------------------------------------------------------------

    def _adopt(self, db: Database, book: ReportBook) -> None:
        def told(db: Database, adopted: Sequence[Adopted]) -> None:
            book.warnings.extend(
                f"instance {one.instance!r} had this database before: its unfinished runs (at least"
                f" {one.runs}) and launches (at least {one.launches}) are adopted"
                for one in adopted
            )
            book.write(db)

        for one in adoption.adopt(db, self.owner, told=told, stopping=self.stopping):
            log.warning(
                "recovery.adopted",
                **_identity(book),
                previous_instance=one.instance,
                runs=one.runs,
                launches=one.launches,
            )

    # -- orphans -------------------------------------------------------------------------------

    def _end_orphans(self, db: Database, book: ReportBook) -> None:
        leases = processes.unclosed(db, self.owner, before=self.before)
        if not leases:
            return
        endings = self.sweep(leases)
        ended = [(lease, _ended(endings[lease.key])) for lease in leases]
        processes.close_all(db, ended, now=self.clock.now(), reconciliation_key=book.key)
        for lease in leases:
            for refusal in endings[lease.key].refused:
                log.warning("recovery.orphan_refused", **_identity(book), run_id=lease.run_id)
                book.warnings.append(f"run {lease.run_id}: {refusal}")
        book.orphans = OrphanCounts(
            found=sum(ending.found for ending in endings.values()),
            ended=sum(ending.ended for ending in endings.values()),
            already_gone=sum(ending.gone and not ending.found for ending in endings.values()),
            refused=sum(len(ending.refused) for ending in endings.values()),
        )
        book.write(db)

    # -- sessions ------------------------------------------------------------------------------

    def _check_sessions(self, db: Database, book: ReportBook, scope: Scope) -> None:
        asker = Asker(
            checks=self.session_checks,
            workspace=self.workspace,
            stopping=self.stopping,
            check_s=self.check_s,
        )
        for found in changed_findings(db, scope, asker):
            if self.stopping():
                raise RecoveryInterrupted
            converge.record_findings(db, scope, found)
        for engine in asker.silent:
            book.warnings.append(
                f"engine {engine}: its sessions could not all be looked at within"
                f" {self.check_s:g} s each time; the others count as not answered"
            )

    # -- trust ---------------------------------------------------------------------------------

    def _clear_trust(self, db: Database, book: ReportBook) -> None:
        until = time.monotonic() + TRUST_S

        def enough() -> bool:
            return self.stopping() or time.monotonic() >= until

        try:
            done = self.clear_trust(db, book.took_out, enough)
        except Exception as error:  # noqa: BLE001 - no file of a CLI may keep the service down
            log.warning("trust.not_cleared", **_identity(book), **error_facts(error))
            done = TrustClearing(failures=(type(error).__name__,))
        book.warnings.extend(f"trust entries stay: {reason}" for reason in done.warnings)

    # -- deadlines -----------------------------------------------------------------------------

    def _rearm(self, db: Database, book: ReportBook) -> None:
        """Go by the clock that runs now: the machine may have been booted, or be another one."""
        count = deadlines.rearm(db, self.owner, now=self.clock.now(), steady=self.clock.steady())
        if count:
            log.info("recovery.deadlines_rearmed", **_identity(book), runs=count)

    # -- convergence ---------------------------------------------------------------------------

    def _converge(self, db: Database, book: ReportBook, scope: Scope) -> None:
        book.runs_total = converge.total(db, scope)
        book.write(db)
        rows, logged, after = self.limits.batch_rows, 0, 0
        while batch := converge.next_batch(db, scope, after=after, rows=rows):
            if self.stopping():
                raise RecoveryInterrupted
            begun = time.monotonic()
            try:
                book.tally += converge.converge(db, scope, batch, report=book.write)
            except DRIVER_ERRORS as error:
                if rows <= SMALLEST_BATCH or not isinstance(translate(error), StorageBusy):
                    raise
                rows //= 2  # it took longer than the database allows a statement
                continue
            rows = next_batch_rows(
                rows,
                time.monotonic() - begun,
                most=self.limits.batch_rows,
                batch_s=self.limits.batch_s,
            )
            logged += self._log_decisions(db, book, batch, DECISIONS_LOGGED - logged)
            log.info(
                "recovery.progress",
                **_identity(book),
                runs_scanned=book.tally.scanned,
                runs_total=book.runs_total,
            )
            after = batch.last

    def _log_decisions(self, db: Database, book: ReportBook, batch: Batch, room: int) -> int:
        decided = converge.decided_in(db, book.key, batch, limit=max(room, 0))
        for run_id, rule, status_before, status_after in decided:
            log.info(
                "recovery.run_decided",
                **_identity(book),
                run_id=run_id,
                rule=rule,
                status_before=status_before,
                status_after=status_after,
            )
        return len(decided)


def _ended(ending: Ending) -> Ended:
    return Ended(
        exit_code=None,
        processes_ended=ending.ended,
        gone=ending.gone,
        orphans=ending.orphans,
    )


def next_batch_rows(rows: int, elapsed_s: float, *, most: int, batch_s: float) -> int:
    """Return the size of the next batch: smaller after a slow one, larger after a quick one."""
    if elapsed_s > batch_s:
        return max(min(SMALLEST_BATCH, most), rows // 2)
    if elapsed_s < batch_s / 4:
        return min(most, rows * 2)
    return rows


def _identity(book: ReportBook) -> dict[str, object]:
    return {
        "reconciliation_id": book.reconciliation_id,
        "instance": book.owner.instance,
        "epoch": book.owner.epoch,
    }


def _log_completed(book: ReportBook, report: Reconciliation) -> None:
    log.info(
        "recovery.completed",
        **_identity(book),
        cause=book.cause.value,
        decisions={count.rule: count.count for count in report.decisions},
        runs_scanned=report.runs_scanned,
        runs_unchanged=report.runs_unchanged,
        quarantined=report.quarantined,
        orphans_ended=report.orphans.ended,
        orphans_refused=report.orphans.refused,
        seconds=round(sum(phase.duration_s for phase in report.phases), 3),
    )
    if report.safe_mode:
        log.warning("recovery.safe_mode", **_identity(book))
    for warning in report.warnings:
        log.warning("recovery.warning", **_identity(book), warning=warning)
