"""The log events of a recovery."""

from __future__ import annotations

import structlog

from runrecovery_service.domain.reconciliation import Reconciliation
from runrecovery_service.recovery.report import ReportBuilder
from runrecovery_service.storage import decisions
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.recovery_apply import Batch

log = structlog.get_logger()


def identity(report: ReportBuilder) -> dict[str, object]:
    """Return the keys that every event of a recovery has."""
    facts: dict[str, object] = {
        "reconciliation_id": report.reconciliation_id,
        "instance": report.owner.instance,
        "epoch": report.owner.epoch,
    }
    if report.recovered_instance is not None:
        facts["recovered_instance"] = report.recovered_instance
    return facts


def log_decisions(db: Database, report: ReportBuilder, batch: Batch, *, limit: int) -> int:
    """Log at most `limit` decisions of a batch, and return how many were logged."""
    decided = decisions.decisions_of_batch(db, report.key, batch, limit=limit)
    for run_id, rule, status_before, status_after in decided:
        log.info(
            "recovery.run_decided",
            **identity(report),
            run_id=run_id,
            rule=rule,
            status_before=status_before,
            status_after=status_after,
        )
    return len(decided)


def log_completed(report: ReportBuilder, completed: Reconciliation) -> None:
    """Log the report of a completed recovery, and its warnings."""
    log.info(
        "recovery.completed",
        **identity(report),
        cause=report.cause.value,
        decisions={count.rule: count.count for count in completed.decisions},
        runs_scanned=completed.runs_scanned,
        runs_unchanged=completed.runs_unchanged,
        quarantined=completed.quarantined,
        orphans_ended=completed.orphans.ended,
        orphans_refused=completed.orphans.refused,
        seconds=round(sum(phase.duration_s for phase in completed.phases), 3),
    )
    if completed.safe_mode:
        log.warning("recovery.safe_mode", **identity(report))
    for warning in completed.warnings:
        log.warning("recovery.warning", **identity(report), warning=warning)
