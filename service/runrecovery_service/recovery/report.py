"""Builds the report of one recovery, and writes it into the store while the recovery runs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import field, replace
from datetime import datetime
from itertools import starmap
from typing import TYPE_CHECKING

from runrecovery_service.clock import Clock
from runrecovery_service.domain.reconciliation import (
    BindingCounts,
    Cause,
    Containment,
    DecisionCount,
    OrphanCounts,
    Phase,
    Reconciliation,
    ReconciliationState,
    TrustRemoval,
)
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.recovery.report_warnings import run_quarantined
from runrecovery_service.storage import reports
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.recovery_apply import Tally
from runrecovery_service.storage.reports import RULE_STATES

if TYPE_CHECKING:  # not imported where traces are off
    from runrecovery_service.recovery.recovery_spans import RecoverySpans


@dataclass(slots=True, kw_only=True)
class ReportBuilder:
    """Collects the counts, phases and warnings of a recovery.

    Attributes:
        spans: the spans of the recovery and its phases; None: traces are off.
        key: the primary key of the report; 0 before `open`.
        tally: the counts of all committed batches.
    """

    owner: Owner
    reconciliation_id: str
    cause: Cause
    safe_mode: bool
    clock: Clock
    spans: RecoverySpans | None = None
    recovered_instance: str | None = None
    key: int = field(default=0, init=False)
    started_at: datetime = field(init=False)
    runs_total: int = field(default=0, init=False)
    tally: Tally = field(default_factory=Tally, init=False)
    orphans: OrphanCounts = field(default_factory=OrphanCounts, init=False)
    containment: Containment | None = field(default=None, init=False)
    trust_removals: tuple[TrustRemoval, ...] = field(default=(), init=False)
    phases: list[Phase] = field(default_factory=list, init=False)
    warnings: list[str] = field(default_factory=list, init=False)

    def open(self, db: Database) -> None:
        """Write a new report with state RUNNING."""
        self.started_at = self.clock.now()
        self.key = reports.open_report(
            db,
            self.owner,
            reconciliation_id=self.reconciliation_id,
            cause=self.cause,
            safe_mode=self.safe_mode,
            now=self.started_at,
            recovered_instance=self.recovered_instance,
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Record the duration of one phase of the recovery."""
        begun = time.monotonic()
        with nullcontext() if self.spans is None else self.spans.phase(name):
            yield
        self.phases.append(Phase(name=name, duration_s=round(time.monotonic() - begun, 6)))

    def write(self, db: Database, batch: Tally | None = None) -> None:
        """Write the report so far, including the counts of a batch that is about to commit."""
        reports.write_report(db, self.key, self._as_of(self.tally + (batch or Tally())))

    def add(self, committed: Tally) -> None:
        """Add the counts of a committed transaction."""
        self.tally += committed

    def record_removals(self, db: Database, removals: tuple[TrustRemoval, ...]) -> None:
        """Write trust removals into the report, in the transaction that deletes their rows.

        Once these rows are deleted, no later report could name the removals.
        """
        before = self.trust_removals
        self.trust_removals += removals
        try:
            self.write(db)
        except Exception:
            self.trust_removals = before
            raise

    def complete(self, db: Database) -> Reconciliation:
        """Close the report of a recovery that has decided on every run."""
        return self._close(db, ReconciliationState.COMPLETED, None)

    def fail(self, db: Database, error: str) -> Reconciliation:
        """Close the report of a failed recovery."""
        return self._close(db, ReconciliationState.FAILED, error)

    def _close(self, db: Database, state: ReconciliationState, error: str | None) -> Reconciliation:
        report = replace(
            self._as_of(self.tally), state=state, finished_at=self.clock.now(), error=error
        )
        reports.write_report(db, self.key, report)
        return report

    def _as_of(self, tally: Tally) -> Reconciliation:
        return Reconciliation(
            reconciliation_id=self.reconciliation_id,
            instance=self.owner.instance,
            epoch=self.owner.epoch,
            cause=self.cause,
            state=ReconciliationState.RUNNING,
            started_at=self.started_at,
            finished_at=None,
            phases=tuple(self.phases),
            decisions=tuple(
                DecisionCount(rule=rule, recovery_state=state, count=tally.decisions[rule])
                for rule, state in RULE_STATES.items()
                if rule in tally.decisions
            ),
            orphans=self.orphans,
            bindings=BindingCounts(
                sessions=tally.sessions,
                pending_interactions=tally.questions,
                slots=tally.slots,
                trust_entries=sum(one.changed_file for one in self.trust_removals),
            ),
            quarantined=tally.quarantined,
            warnings=(*self.warnings, *starmap(run_quarantined, tally.damaged)),
            runs_scanned=tally.scanned,
            runs_total=self.runs_total,
            runs_unchanged=tally.unchanged,
            safe_mode=self.safe_mode,
            containment=self.containment,
            error=None,
            trust_removals=self.trust_removals,
            recovered_instance=self.recovered_instance,
        )
