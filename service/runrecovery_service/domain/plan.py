"""The plan of a restart: what it would decide now. It uses `decide` and changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runrecovery_service.domain.reconciliation import DecisionCount
from runrecovery_service.domain.recovery_matrix import MATRIX, QUARANTINE_RULE, Fact, decide
from runrecovery_service.domain.run import ErrorCode, Profile, RecoveryState, RunStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """The facts about a run that a restart would base its decision on.

    Attributes:
        status: None when the stored word is unknown.
        damaged: a part of the run's record cannot be read.
        last_rule: the rule of the latest decision, if the run has not changed since.
    """

    status: RunStatus | None
    profile: Profile | None
    facts: Fact
    damaged: bool
    last_rule: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a restart would decide. `unchanged`: its latest decision was the same."""

    rule: str
    becomes: RunStatus | None
    error: ErrorCode | None
    state: RecoveryState
    unchanged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDecision:
    """A run and what a restart would decide for it."""

    run_id: str
    engine: str
    status: RunStatus | None
    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """The numbers of a plan, as the restart's report would have them."""

    decisions: tuple[DecisionCount, ...]
    runs_total: int
    runs_unchanged: int
    quarantined: int
    launches: int


def preview_decision(run: Situation) -> Decision:
    """Return what a restart would decide for a run."""
    if run.damaged or run.status is None:
        return Decision(
            rule=QUARANTINE_RULE,
            becomes=run.status,
            error=None,
            state=RecoveryState.QUARANTINED,
            unchanged=False,
        )
    rule = decide(run.status, run.profile, run.facts)
    return Decision(
        rule=rule.name,
        becomes=rule.becomes,
        error=rule.error,
        state=rule.state,
        unchanged=run.last_rule == rule.name,
    )


def sum_decisions(decisions: Iterable[tuple[Decision, int]], *, launches: int) -> RecoveryPlan:
    """Return the plan for pairs of a decision and the number of its runs."""
    states = {rule.name: rule.state for rule in MATRIX}
    counts: dict[str, int] = dict.fromkeys((*states, QUARANTINE_RULE), 0)
    unchanged = 0
    for decision, count in decisions:
        if decision.unchanged:
            unchanged += count
        else:
            counts[decision.rule] += count
    return RecoveryPlan(
        decisions=tuple(
            DecisionCount(
                rule=rule,
                recovery_state=states.get(rule, RecoveryState.QUARANTINED),
                count=count,
            )
            for rule, count in counts.items()
            if count
        ),
        runs_total=sum(counts.values()) + unchanged,
        runs_unchanged=unchanged,
        quarantined=counts[QUARANTINE_RULE],
        launches=launches,
    )
