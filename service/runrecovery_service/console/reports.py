"""Reports of restarts, and the state of the service, as the pages show them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Final

from runrecovery.v1 import recovery_pb2, recovery_service_pb2

from runrecovery_service.console.bars import BarPart, bar
from runrecovery_service.console.moments import Moment, duration_text, moment, to_datetime
from runrecovery_service.console.words import (
    CONTAINMENT,
    REPORT_STATES,
    SERVICE_STATES,
    TRIGGERS,
    Word,
    count,
    recovery_word,
)
from runrecovery_service.lazy_dataclass import dataclass

_PHASES: Final = {
    "orphans": "kill orphans",
    "sessions": "check sessions",
    "converge": "decide",
    "bindings": "release what ended runs had",
    "trust": "remove trust entries",
    "deadlines": "convert deadlines",
    "containment": "wait for the probe",
}
PHASE_TONES: Final = ("p1", "p2", "p3", "p4", "p5", "p6", "p7")


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of a restart. `tone` is its colour in the bar."""

    name: str
    took: str
    tone: str


@dataclass(frozen=True, slots=True)
class RuleCount:
    """How many runs one rule decided, and the length of its bar as a share of the longest bar."""

    rule: str
    outcome: Word
    runs: int
    width: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportRow:
    """A report in the list."""

    reconciliation_id: str
    trigger: str
    instance: str
    recovered_instance: str
    epoch: int
    state: Word
    started_at: Moment | None
    took: str
    decided: int
    orphans: int
    warnings: int
    safe_mode: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportView:
    """A whole report.

    Attributes:
        scanned: how many of the `total` runs were examined.
        orphans: sentences about processes that outlived the service; none for a count of 0.
        released: counts of what ended runs no longer have, as text; none for a count of 0.
    """

    row: ReportRow
    error: str
    phases: tuple[Phase, ...]
    bar: tuple[BarPart, ...]
    rules: tuple[RuleCount, ...]
    scanned: int
    total: int
    unchanged: int
    quarantined: int
    orphans: tuple[str, ...]
    released: tuple[str, ...]
    warnings: tuple[str, ...]
    containment: Word | None
    containment_detail: str
    trust_removals: tuple[TrustRow, ...]
    finished_at: Moment | None


@dataclass(frozen=True, slots=True)
class TrustRow:
    """A trust entry that no run needs any more."""

    run_id: str
    file: str
    folder: str
    outcome: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServiceView:
    """The state of the service. `progress`: that of its recovery, or None if none is under way."""

    state: Word
    instance: str
    epoch: int
    is_serving: bool
    progress: ReportView | None
    unended: tuple[str, ...]


def report_row(report: recovery_pb2.Reconciliation) -> ReportRow:
    """Return the row of a report."""
    started, finished = to_datetime(report.started_at), to_datetime(report.finished_at)
    return ReportRow(
        reconciliation_id=report.reconciliation_id,
        trigger=TRIGGERS.get(report.trigger, "Recovery"),
        instance=report.instance,
        recovered_instance=report.recovered_instance,
        epoch=report.epoch,
        state=REPORT_STATES.get(report.state, Word("unknown", "warn")),
        started_at=moment(report.started_at),
        took=_took(started, finished),
        decided=sum(decision.count for decision in report.decisions),
        orphans=report.orphans.ended,
        warnings=len(report.warnings),
        safe_mode=report.safe_mode,
    )


def _took(started: datetime | None, finished: datetime | None) -> str:
    return duration_text(finished - started) if started and finished else ""


def report_view(report: recovery_pb2.Reconciliation) -> ReportView:
    """Return a whole report."""
    tones = [PHASE_TONES[at % len(PHASE_TONES)] for at in range(len(report.phases))]
    phases = tuple(
        Phase(_PHASES.get(phase.name, phase.name), duration_text(phase.duration), tone)
        for phase, tone in zip(report.phases, tones, strict=True)
    )
    seconds = [phase.duration.ToTimedelta().total_seconds() for phase in report.phases]
    has_probe = report.HasField("containment")
    return ReportView(
        row=report_row(report),
        error=report.error,
        phases=phases,
        bar=bar(
            [
                (second, phase.tone, f"{phase.name}: {phase.took}")
                for second, phase in zip(seconds, phases, strict=True)
            ]
        ),
        rules=rule_counts(report.decisions),
        scanned=report.runs_scanned,
        total=report.runs_total,
        unchanged=report.runs_unchanged,
        quarantined=report.quarantined,
        orphans=_orphans(report.orphans),
        released=_released(report.bindings),
        warnings=tuple(report.warnings),
        containment=CONTAINMENT.get(report.containment.level) if has_probe else None,
        containment_detail=report.containment.detail,
        trust_removals=tuple(
            TrustRow(each.run_id, each.file, each.folder, each.outcome)
            for each in report.trust_removals
        ),
        finished_at=moment(report.finished_at),
    )


def rule_counts(decisions: Sequence[recovery_pb2.DecisionCount]) -> tuple[RuleCount, ...]:
    """Return the number of runs for each rule, and its share of the largest of these numbers."""
    most = max((decision.count for decision in decisions), default=0)
    return tuple(
        RuleCount(
            rule=decision.rule,
            outcome=recovery_word(decision.recovery_state),
            runs=decision.count,
            width=max(1, 100 * decision.count // most) if decision.count else 0,
        )
        for decision in decisions
    )


def _orphans(orphans: recovery_pb2.OrphanCounts) -> tuple[str, ...]:
    found = count(orphans.found, "process", "processes")
    sentences = (
        (orphans.found, f"{found} outlived the service: {orphans.ended:,} ended."),
        (orphans.refused, f"{orphans.refused:,} could not be ended: see the warnings."),
        (
            orphans.already_gone,
            f"{count(orphans.already_gone, 'launch', 'launches')} had no living process any more.",
        ),
    )
    return tuple(text for number, text in sentences if number)


def _released(bindings: recovery_pb2.BindingCounts) -> tuple[str, ...]:
    found = (
        (bindings.slots, count(bindings.slots, "slot")),
        (bindings.sessions, count(bindings.sessions, "session")),
        (bindings.pending_interactions, count(bindings.pending_interactions, "question")),
        (bindings.trust_entries, count(bindings.trust_entries, "trust entry", "trust entries")),
    )
    return tuple(text for number, text in found if number)


def service_view(status: recovery_service_pb2.GetRecoveryStatusResponse) -> ServiceView:
    """Return the state of the service as a page shows it."""
    report = status.reconciliation
    is_under_way = (
        status.HasField("reconciliation")
        and report.state == recovery_pb2.RECONCILIATION_STATE_RUNNING
    )
    return ServiceView(
        state=SERVICE_STATES.get(status.state, Word("unknown", "warn")),
        instance=status.instance,
        epoch=status.epoch,
        is_serving=status.state == recovery_pb2.SERVICE_STATE_SERVING,
        progress=report_view(report) if is_under_way else None,
        unended=tuple(launch.run_id for launch in status.unended_launches),
    )
