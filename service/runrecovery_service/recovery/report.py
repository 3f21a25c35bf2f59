"""The report of a restart while it is being made."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime

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
from runrecovery_service.storage import recovery
from runrecovery_service.storage.converge import Tally
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.recovery import RULE_STATES


@dataclass(slots=True, kw_only=True)
class ReportBook:
    """Collects what a recovery does."""

    owner: Owner
    reconciliation_id: str
    cause: Cause
    safe_mode: bool
    clock: Clock
    key: int = 0
    started_at: datetime = field(init=False)
    runs_total: int = 0
    tally: Tally = field(default_factory=Tally)
    orphans: OrphanCounts = field(default_factory=OrphanCounts)
    containment: Containment | None = None
    trust_removals: tuple[TrustRemoval, ...] = ()
    phases: list[Phase] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def open(self, db: Database) -> None:
        """Begin the report in the store."""
        self.started_at = self.clock.now()
        self.key = recovery.begin(
            db,
            self.owner,
            reconciliation_id=self.reconciliation_id,
            cause=self.cause,
            safe_mode=self.safe_mode,
            now=self.started_at,
        )

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time one part of the recovery."""
        begun = time.monotonic()
        yield
        self.phases.append(Phase(name=name, duration_s=round(time.monotonic() - begun, 6)))

    def write(self, db: Database, batch: Tally | None = None) -> None:
        """Write the report as it is, with a batch that is about to commit."""
        recovery.write_report(db, self.key, self._as_of(self.tally + (batch or Tally())))

    def took_out(self, db: Database, removals: tuple[TrustRemoval, ...]) -> None:
        """Write, in the transaction that puts it on record, what went out of files of CLIs: a
        later report does not know of it any more."""
        before = self.trust_removals
        self.trust_removals += removals
        try:
            self.write(db)
        except Exception:
            self.trust_removals = before
            raise

    def complete(self, db: Database) -> Reconciliation:
        """Close the report: every run has its decision."""
        return self._close(db, ReconciliationState.COMPLETED, None)

    def fail(self, db: Database, error: str) -> Reconciliation:
        """Close the report of a recovery that could not finish."""
        return self._close(db, ReconciliationState.FAILED, error)

    def _close(self, db: Database, state: ReconciliationState, error: str | None) -> Reconciliation:
        report = replace(
            self._as_of(self.tally), state=state, finished_at=self.clock.now(), error=error
        )
        recovery.write_report(db, self.key, report)
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
            warnings=(*self.warnings, *tally.damaged),
            runs_scanned=tally.scanned,
            runs_total=self.runs_total,
            runs_unchanged=tally.unchanged,
            safe_mode=self.safe_mode,
            containment=self.containment,
            error=None,
            trust_removals=self.trust_removals,
        )
