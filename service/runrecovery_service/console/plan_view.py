"""The cost of a restart now, as its page shows it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from runrecovery.v1 import recovery_service_pb2 as pb

from runrecovery_service.console.bars import BarPart, bar
from runrecovery_service.console.moments import duration_text
from runrecovery_service.console.reports import RuleCount, rule_counts
from runrecovery_service.console.words import Word, count, outcome_word, recovery_word, status_word
from runrecovery_service.lazy_dataclass import dataclass

_LOSES_WORK: Final = {
    pb.PLANNED_OUTCOME_RESTARTED,
    pb.PLANNED_OUTCOME_FAILED,
    pb.PLANNED_OUTCOME_QUARANTINED,
}


@dataclass(frozen=True, slots=True)
class PlanGroup:
    """Runs with the same outcome of a restart. `running`: how long their processes have run."""

    outcome: Word
    runs: int
    tokens: int
    running: str
    loses_work: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanView:
    """The totals of a plan.

    Attributes:
        headline: the cost in one sentence.
        lost: runs that would fail, start over or be quarantined.
    """

    headline: str
    tone: str
    total: int
    lost: int
    launches: int
    unchanged: int
    groups: tuple[PlanGroup, ...]
    bar: tuple[BarPart, ...]
    rules: tuple[RuleCount, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedRow:
    """The decision that a restart would make now about one run."""

    run_id: str
    engine: str
    before: Word
    after: Word
    outcome: Word
    rule: str
    error_code: str
    unchanged: bool


def plan_view(plan: pb.RecoveryPlan) -> PlanView:
    """Return the totals of a plan."""
    groups = tuple(_group(group) for group in plan.groups)
    lost = [group for group in plan.groups if group.outcome in _LOSES_WORK]
    runs = sum(group.runs for group in lost)
    return PlanView(
        headline=_headline(plan, lost),
        tone="good" if not runs else "bad",
        total=plan.runs_total,
        lost=runs,
        launches=plan.launches,
        unchanged=plan.runs_unchanged,
        groups=groups,
        bar=bar(
            [
                (group.runs, group.outcome.tone, f"{group.outcome.text}: {group.runs:,}")
                for group in groups
            ]
        ),
        rules=rule_counts(plan.decisions),
    )


def _headline(plan: pb.RecoveryPlan, lost: Sequence[pb.PlannedGroup]) -> str:
    if not plan.runs_total:
        return "A restart now would cost nothing: no run is unfinished."
    runs = sum(group.runs for group in lost)
    if not runs:
        kept = count(plan.runs_total, "unfinished run")
        return f"A restart now would lose no work: {kept} would go on."
    parts = []
    if tokens := sum(group.tokens for group in lost):
        parts.append(count(tokens, "token"))
    if any(group.running_time.ToTimedelta() for group in lost):
        parts.append(f"{_running(lost)} of process time")
    at_stake = f": {' and '.join(parts)}" if parts else ""
    whose = "its" if runs == 1 else "their"
    return f"A restart now would cost {count(runs, 'run')} {whose} work{at_stake}."


def _running(groups: Sequence[pb.PlannedGroup]) -> str:
    first, *others = [group.running_time.ToTimedelta() for group in groups]
    return duration_text(sum(others, first))


def _group(group: pb.PlannedGroup) -> PlanGroup:
    running = group.running_time.ToTimedelta()
    return PlanGroup(
        outcome=outcome_word(group.outcome),
        runs=group.runs,
        tokens=group.tokens,
        running=duration_text(running) if running else "",
        loses_work=group.outcome in _LOSES_WORK,
    )


def planned_row(decision: pb.PlannedDecision) -> PlannedRow:
    """Return the row of a run."""
    return PlannedRow(
        run_id=decision.run_id,
        engine=decision.engine,
        before=status_word(decision.status_before),
        after=status_word(decision.status_after),
        outcome=recovery_word(decision.recovery_state),
        rule=decision.recovery_reason,
        error_code=decision.error_code,
        unchanged=decision.unchanged,
    )
