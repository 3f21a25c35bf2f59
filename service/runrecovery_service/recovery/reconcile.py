"""The steps of a recovery: at a start, at a planned stop for its own epoch, and in a takeover.

A start does all steps. A planned stop does steps 1 to 5 and 7, so that the next start has nothing
to decide. A takeover does steps 1 to 3 and 7 for the runs of a dead instance, while this service
serves. After a crash in any step, the next start repeats the step.

0. Adopt the runs and launches of other instance names in a SQLite store, for the steps below.
1. Kill orphans. This comes first, because an orphan may still write to a run that will fail.
   Complete the kept output of the killed turns.
2. Check the sessions of engines that have a session check.
3. Find results and questions of turns that had ended before their end could be recorded. Count the
   model calls of killed turns. Decide on every run of an earlier epoch, in batches.
4. Clear sessions and open questions of ended runs.
5. Remove trust entries that no run needs. A failure of this step does not prevent a start.
6. Convert deadlines to the steady clock of this boot.
7. Commit the report, with the result of the containment probe. Only then does the service answer
   calls that read or change runs.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Final, Protocol

import structlog

from runrecovery_service.clock import Clock
from runrecovery_service.domain.errors import StorageBusy, error_facts
from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.reconciliation import (
    Cause,
    OrphanCounts,
    Reconciliation,
    TrustClearing,
    TrustRemoval,
)
from runrecovery_service.domain.recovery_matrix import NOTHING, Fact
from runrecovery_service.domain.start_errors import RecoveryInterrupted
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.recovery import report_warnings
from runrecovery_service.recovery.batch_size import SMALLEST_BATCH, next_batch_rows
from runrecovery_service.recovery.bulk_session_check import BulkSessionCheck, changed_findings
from runrecovery_service.recovery.find_end import FindEnd, find_no_end
from runrecovery_service.recovery.killed_usage import KilledUsage, with_counted
from runrecovery_service.recovery.last_output import CompletesOutput, complete_outputs
from runrecovery_service.recovery.recovery_log import identity, log_completed, log_decisions
from runrecovery_service.recovery.report import ReportBuilder
from runrecovery_service.recovery.safe_mode import needs_safe_mode
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import (
    adoption,
    found_ends,
    launch_records,
    passed_deadlines,
    recovery_apply,
    reports,
    session_checks,
    stale_bindings,
    webhook_outbox,
)
from runrecovery_service.storage.adoption import Adopted
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.driver_errors import DRIVER_ERRORS, to_domain_error
from runrecovery_service.storage.found_ends import OpenTurn
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchEnd, LaunchRecord
from runrecovery_service.storage.recovery_scope import ApplyScope
from runrecovery_service.storage.sql_dialects import DatabaseKind

if TYPE_CHECKING:  # not imported where traces are off
    from runrecovery_service.spans import Tracer

log = structlog.get_logger()

TRUST_S: Final = 10.0
"""Time limit for removing trust entries from the files of agent CLIs, in seconds. A sweep removes
the entries that are left while the service runs."""
DECISIONS_LOGGED: Final = 1000
"""The most decisions of one recovery that are logged. The history has all decisions."""

RecordRemovals = Callable[[Database, tuple[TrustRemoval, ...]], object]
"""Records removals of trust entries, in the transaction that deletes their rows."""


class EndsLaunches(Protocol):
    """Kills the processes of launches."""

    def end(self, launches: Sequence[LaunchRecord]) -> Mapping[int, Ending]:
        """Kill every process of these launches, and return the result for each launch key."""
        ...


class TrustCleaner(Protocol):
    """Removes trust entries that no run needs from the files of agent CLIs."""

    def remove_stale_on(
        self, db: Database, record: RecordRemovals, is_over: Callable[[], bool]
    ) -> TrustClearing:
        """Remove entries until all are removed, or `is_over` returns True between two edits.

        Call this outside of transactions.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryLimits:
    """The limits of a recovery.

    Attributes:
        batch_rows: the most runs on which one transaction decides.
        batch_s: the target duration of one of these transactions, in seconds.
        safe_mode_after, safe_mode_window_s: as in `needs_safe_mode`.
        reopen_window_s: how many seconds a run that lost its session can be reopened.
    """

    batch_rows: int
    batch_s: float
    safe_mode_after: int
    safe_mode_window_s: float
    reopen_window_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Leftovers:
    """Handles everything that earlier turns have left on this machine.

    Attributes:
        launches: kills processes.
        sessions: checks sessions.
        trust: removes trust entries.
        find_end: finds the ends of turns in their kept output.
        usage: counts the model calls of killed turns; None: they are not counted.
        outputs: completes the kept output; None: the output stays as it is.
    """

    launches: EndsLaunches
    sessions: BulkSessionCheck
    trust: TrustCleaner
    find_end: FindEnd = find_no_end
    usage: KilledUsage | None = None
    outputs: CompletesOutput | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadInstance:
    """The instance whose runs a takeover decides on.

    Attributes:
        owner: the instance, with the epoch of the takeover.
        demand_current: the first check of each deciding transaction. Raises if the instance has
            started again.
        is_here: returns whether a launch was made on this host during this boot.
        elsewhere: the facts of runs whose next turn resumes a session, if the sessions of the
            instance cannot be read here; otherwise no facts.
    """

    owner: Owner
    demand_current: Callable[[Database], object]
    is_here: Callable[[LaunchRecord], bool]
    elsewhere: Fact


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """The recovery of one start, of one planned stop, or of one takeover.

    Attributes:
        cause: the start, the planned stop or the takeover.
        stop: interrupts the recovery.
        tracer: starts the spans of the recovery; None: traces are off.
        dead: the instance that is taken over; None: no takeover.
    """

    owner: Owner
    cause: Cause
    clock: Clock
    limits: RecoveryLimits
    stop: StopSignal
    leftovers: Leftovers
    tracer: Tracer | None = None
    dead: DeadInstance | None = None

    @property
    def recovered(self) -> Owner:
        """The instance on whose runs the recovery decides."""
        return self.owner if self.dead is None else self.dead.owner

    @property
    def before_epoch(self) -> int:
        """The epoch below which the recovery decides on runs and kills processes."""
        return self.recovered.epoch + (1 if self.cause is Cause.SHUTDOWN else 0)

    def run(self, db: Database, status: RecoveryStatus) -> Reconciliation:
        """Recover, and return the completed report. This blocks.

        Args:
            status: its `report_id` is set as soon as the report is stored.

        Raises:
            RecoveryInterrupted: a stop was requested.
            RunRecoveryError, peewee errors: the recovery failed, and its report is FAILED. A retry
                is safe.
        """
        report = ReportBuilder(
            owner=self.owner,
            reconciliation_id=str(uuid.uuid4()),
            cause=self.cause,
            safe_mode=self._is_safe_mode(db),
            clock=self.clock,
            recovered_instance=None if self.dead is None else self.dead.owner.instance,
        )
        report.open(db)
        if status.lost_commits is not None:
            report.warnings.append(report_warnings.commits_lost(status.lost_commits))
        if self.tracer is not None:
            from runrecovery_service.recovery.recovery_spans import begin_spans  # noqa: PLC0415 - see above

            report.spans = begin_spans(
                self.tracer,
                self.owner,
                cause=self.cause,
                reconciliation_id=report.reconciliation_id,
            )
        status.report_id = report.reconciliation_id
        log.info(
            "recovery.started",
            **identity(report),
            cause=report.cause.value,
            safe_mode=report.safe_mode,
        )
        try:
            with self._guarded(db):
                self._reconcile(db, report)
                if status.probe is not None:
                    with report.phase("containment"):
                        report.containment = status.probe.result()
                completed = report.complete(db)
        except Exception as error:
            self._fail(db, report, error)
            raise
        status.report = completed
        if report.spans is not None:
            report.spans.completed(completed)
        log_completed(report, completed)
        return completed

    def _reconcile(self, db: Database, report: ReportBuilder) -> None:
        """Do the steps of the module's docstring, in their order."""
        is_start = self.cause is Cause.STARTUP
        if is_start:
            self._adopt(db, report)
            self._collect_deliveries(db)
        with report.phase("orphans"):
            self._end_orphans(db, report)
        scope = self._scope(report)
        are_files_here = not scope.elsewhere  # the files of sessions and of kept output
        with report.phase("sessions"):
            if are_files_here:
                self._check_sessions(db, report, scope)
        with report.phase("converge"):
            turns = found_ends.open_turns(db, scope) if are_files_here else []
            found = self._find_ends(turns)
            counted = (
                self.leftovers.usage.count(turns, found, self.stop) if self.leftovers.usage else {}
            )
            found = with_counted(found, counted)
            others = {key: used for key, used in counted.items() if key not in found}
            self._decide_runs(db, report, replace(scope, found=found, counted=others))
        with report.phase("bindings"):
            report.tally += stale_bindings.clear_stale_bindings(db, self.recovered)
        if self.dead is not None:
            return  # sweeps remove trust entries, and each batch converts its deadlines
        with report.phase("trust"):
            self._clear_trust(db, report)
        if is_start:
            with report.phase("deadlines"):
                self._rearm_deadlines(db, report)

    def _guarded(self, db: Database) -> AbstractContextManager[object]:
        if self.dead is None:
            return nullcontext()
        return db.guarded_by(self.dead.demand_current)

    @property
    def _elsewhere(self) -> Fact:
        return NOTHING if self.dead is None else self.dead.elsewhere

    def _scope(self, report: ReportBuilder) -> ApplyScope:
        return ApplyScope(
            owner=self.owner,
            before=self.before_epoch,
            taken_from=None if self.dead is None else self.dead.owner,
            reconciliation_key=report.key,
            reopen=self.clock.due_in(self.limits.reopen_window_s),
            now=self.clock.now(),
            steady=self.clock.steady(),
            elsewhere=self._elsewhere,
        )

    def _is_safe_mode(self, db: Database) -> bool:
        return self.cause is Cause.STARTUP and needs_safe_mode(
            db,
            self.owner,
            after=self.limits.safe_mode_after,
            window_s=self.limits.safe_mode_window_s,
            now=self.clock.now(),
        )

    def _fail(self, db: Database, report: ReportBuilder, error: Exception) -> None:
        interrupted = isinstance(error, RecoveryInterrupted)
        reason = reports.INTERRUPTED if interrupted else type(error).__name__
        log.error("recovery.failed", **identity(report), error=reason)
        if report.spans is not None:
            report.spans.failed(reason)
        try:
            report.fail(db, reason)
        except Exception:  # noqa: BLE001 - the store may have failed; the next start closes the report
            log.warning("recovery.report_not_closed", **identity(report))

    # -- adoption ------------------------------------------------------------------------------

    def _adopt(self, db: Database, report: ReportBuilder) -> None:
        def record(db: Database, adopted: Sequence[Adopted]) -> None:
            report.warnings.extend(map(report_warnings.adopted, adopted))
            report.write(db)

        for previous in adoption.adopt(db, self.owner, record=record, stopping=self.stop.is_set):
            log.warning(
                "recovery.adopted",
                **identity(report),
                previous_instance=previous.instance,
                runs=previous.runs,
                launches=previous.launches,
            )

    def _collect_deliveries(self, db: Database) -> None:
        """Take deliveries back from successors, and delete those that no webhook is configured for.

        Adopted deliveries are deleted too.
        """
        if db.dialect.kind is DatabaseKind.POSTGRESQL:
            webhook_outbox.take_back(db, self.owner, stopping=self.stop.is_set)
        forgotten = webhook_outbox.forget_removed(db, self.owner, stopping=self.stop.is_set)
        for name, deliveries in forgotten.items():
            log.warning("webhook.forgotten", webhook=name, deliveries=deliveries)

    # -- orphans -------------------------------------------------------------------------------

    def _end_orphans(self, db: Database, report: ReportBuilder) -> None:
        launches = launch_records.unclosed_launches(db, self.recovered, before=self.before_epoch)
        if self.dead is not None:
            unclosed, launches = launches, list(filter(self.dead.is_here, launches))
            if away := len(unclosed) - len(launches):
                report.warnings.append(report_warnings.launches_elsewhere(away))
        if not launches:
            return
        endings = self.leftovers.launches.end(launches)
        # Complete the output before the launches are closed: after a crash the next start repeats
        # it.
        if self.leftovers.outputs is not None and not self._elsewhere:
            gone = [each for each in launches if endings[each.key].gone]
            complete_outputs(db, self.leftovers.outputs, gone, self.stop)
        ended = [(launch, _ended(endings[launch.key])) for launch in launches]
        launch_records.close_all(db, ended, now=self.clock.now(), reconciliation_key=report.key)
        if self.dead is not None:
            launch_records.take_unended(db, launches, self.owner)
        for launch in launches:
            for reason in endings[launch.key].refused:
                log.warning("recovery.orphan_refused", **identity(report), run_id=launch.run_id)
                report.warnings.append(report_warnings.orphan_refused(launch.run_id, reason))
        report.orphans = OrphanCounts(
            found=sum(ending.found for ending in endings.values()),
            ended=sum(ending.ended for ending in endings.values()),
            already_gone=sum(ending.gone and not ending.found for ending in endings.values()),
            refused=sum(len(ending.refused) for ending in endings.values()),
        )
        report.write(db)

    # -- sessions ------------------------------------------------------------------------------

    def _check_sessions(self, db: Database, report: ReportBuilder, scope: ApplyScope) -> None:
        # With an empty `hanging`, so that each try of a recovery calls every check again.
        bulk = replace(self.leftovers.sessions, hanging={}, stop=self.stop)
        for findings in changed_findings(db, scope, bulk):
            if self.stop.is_set():
                raise RecoveryInterrupted
            session_checks.record_findings(db, scope, findings)
        report.warnings.extend(
            report_warnings.sessions_not_answered(engine, bulk.check_s) for engine in bulk.hanging
        )

    # -- results and questions in the kept output ----------------------------------------------

    def _find_ends(self, turns: Sequence[OpenTurn]) -> dict[int, FoundEnd]:
        """Return by run key the ends of turns that the service could not record."""
        found: dict[int, FoundEnd] = {}
        for turn in turns:
            if self.stop.is_set():
                raise RecoveryInterrupted
            end = self.leftovers.find_end(turn)
            if end is not None:
                found[turn.run_key] = end
        return found

    # -- trust ---------------------------------------------------------------------------------

    def _clear_trust(self, db: Database, report: ReportBuilder) -> None:
        deadline = time.monotonic() + TRUST_S

        def is_over() -> bool:
            return self.stop.is_set() or time.monotonic() >= deadline

        try:
            clearing = self.leftovers.trust.remove_stale_on(db, report.record_removals, is_over)
        except Exception as error:  # noqa: BLE001 - no agent CLI's file may prevent a start
            log.warning("trust.not_cleared", **identity(report), **error_facts(error))
            clearing = TrustClearing(failures=(type(error).__name__,))
        report.warnings.extend(map(report_warnings.trust_entry_kept, clearing.warnings))

    # -- deadlines -----------------------------------------------------------------------------

    def _rearm_deadlines(self, db: Database, report: ReportBuilder) -> None:
        """Convert deadlines to the present clock. They can be of another machine or boot."""
        count = passed_deadlines.move_to_clock(
            db, self.owner, now=self.clock.now(), steady=self.clock.steady()
        )
        if count:
            log.info("recovery.deadlines_rearmed", **identity(report), runs=count)

    # -- decisions -----------------------------------------------------------------------------

    def _decide_runs(self, db: Database, report: ReportBuilder, scope: ApplyScope) -> None:
        """Decide on the runs in batches, in the order of their keys.

        If the rows of a batch are locked for too long, the other batches are decided nevertheless.
        The error is raised at the end, and a later try decides on the batch.
        """
        busy: Exception | None = None
        report.runs_total = recovery_apply.count_runs(db, scope)
        report.write(db)
        rows, logged, after = self.limits.batch_rows, 0, 0
        while batch := recovery_apply.next_batch(db, scope, after=after, rows=rows):
            if self.stop.is_set():
                raise RecoveryInterrupted
            begun = time.monotonic()
            try:
                tally = recovery_apply.apply_batch(
                    db, scope, batch, report=report.write, on_commit=report.add
                )
            except DRIVER_ERRORS as error:
                if not isinstance(to_domain_error(error), StorageBusy):
                    raise
                if rows > SMALLEST_BATCH:
                    rows //= 2  # the batch took longer than the statement timeout of the database
                    continue
                if db.dialect.kind is DatabaseKind.SQLITE:  # one lock covers all rows
                    raise
                busy, after = busy or error, batch.last
                continue
            rows = next_batch_rows(
                rows,
                time.monotonic() - begun,
                most=self.limits.batch_rows,
                batch_s=self.limits.batch_s,
            )
            if report.spans is not None and tally.slots:
                report.spans.report_cut_turns(db, report.key, batch)
            logged += log_decisions(db, report, batch, limit=max(DECISIONS_LOGGED - logged, 0))
            log.info(
                "recovery.progress",
                **identity(report),
                runs_scanned=report.tally.scanned,
                runs_total=report.runs_total,
            )
            after = batch.last
        if busy is not None:
            raise busy


def _ended(ending: Ending) -> LaunchEnd:
    return LaunchEnd(
        exit_code=None,
        processes_ended=ending.ended,
        gone=ending.gone,
        orphans=ending.orphans,
    )
