"""What a restart at this moment would decide: the same `decide`, and nothing changed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from runrecovery_service.domain.reconciliation import DecisionCount
from runrecovery_service.domain.recovery_matrix import MATRIX, QUARANTINE_RULE, Fact, decide
from runrecovery_service.domain.run import ErrorCode, Profile, RecoveryState, RunStatus


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What a restart would see of a run.

    Attributes:
        status: None when the stored word is unknown.
        damaged: something in its record cannot be read.
        standing: the rule that decided last, if the run has not changed since.
    """

    status: RunStatus | None
    profile: Profile | None
    facts: Fact
    damaged: bool
    standing: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What it would decide. `unchanged`: it has decided just so before, nothing would be new."""

    rule: str
    becomes: RunStatus | None
    error: ErrorCode | None
    state: RecoveryState
    unchanged: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDecision:
    """One run and what a restart would decide for it."""

    run_id: str
    engine: str
    status: RunStatus | None
    verdict: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """All of it in numbers, as the report of the restart would have them."""

    decisions: tuple[DecisionCount, ...]
    runs_total: int
    runs_unchanged: int
    quarantined: int
    launches: int


def preview_decision(seen: Situation) -> Decision:
    """Return what a restart would decide."""
    if seen.damaged or seen.status is None:
        return Decision(
            rule=QUARANTINE_RULE,
            becomes=seen.status,
            error=None,
            state=RecoveryState.QUARANTINED,
            unchanged=False,
        )
    rule = decide(seen.status, seen.profile, seen.facts)
    return Decision(
        rule=rule.name,
        becomes=rule.becomes,
        error=rule.error,
        state=rule.state,
        unchanged=seen.standing == rule.name,
    )


def sum_decisions(foreseen: Iterable[tuple[Decision, int]], *, launches: int) -> RecoveryPlan:
    """Return the plan of verdicts and how many runs each is for."""
    states = {rule.name: rule.state for rule in MATRIX}
    counts: dict[str, int] = dict.fromkeys((*states, QUARANTINE_RULE), 0)
    unchanged = 0
    for verdict, count in foreseen:
        if verdict.unchanged:
            unchanged += count
        else:
            counts[verdict.rule] += count
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
