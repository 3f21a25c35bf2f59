"""The plan of a restart: the decisions that it would make now, by `decide`. Changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Final

from runrecovery_service.domain.reconciliation import DecisionCount
from runrecovery_service.domain.recovery_matrix import (
    MATRIX,
    QUARANTINE_RULE,
    RESUMED_RULE,
    Fact,
    decide,
)
from runrecovery_service.domain.run import ErrorCode, Profile, RecoveryState, RunStatus
from runrecovery_service.lazy_dataclass import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """The facts about a run that a restart would base its decision on.

    Attributes:
        status: None when the stored status is unknown.
        damaged: whether a part of the run's record cannot be read.
        last_rule: the rule of the latest decision; None: there is no decision, or the run has
            changed since.
    """

    status: RunStatus | None
    profile: Profile | None
    facts: Fact
    damaged: bool
    last_rule: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """A decision that a restart would make. `unchanged`: whether it repeats the latest decision."""

    rule: str
    becomes: RunStatus | None
    error: ErrorCode | None
    state: RecoveryState
    unchanged: bool


class Outcome(StrEnum):
    """The effect of a restart on a run, for people who decide about a deploy."""

    KEPT_WAITING = "KEPT_WAITING"
    REPLY_DELIVERED = "REPLY_DELIVERED"
    RESUMED = "RESUMED"
    RESTARTED = "RESTARTED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"
    QUARANTINED = "QUARANTINED"
    SUCCEEDED = "SUCCEEDED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A number of runs, and the work that they have done.

    Attributes:
        tokens: the tokens that all turns of the runs have used, as far as agents reported them.
        running_us: how long the present processes of the runs have been running, in microseconds.
    """

    runs: int = 0
    tokens: int = 0
    running_us: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            runs=self.runs + other.runs,
            tokens=self.tokens + other.tokens,
            running_us=self.running_us + other.running_us,
        )

    def __sub__(self, other: Work) -> Work:
        return Work(
            runs=self.runs - other.runs,
            tokens=self.tokens - other.tokens,
            running_us=self.running_us - other.running_us,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedDecision:
    """A run and the decision that a restart would make for it."""

    run_id: str
    engine: str
    status: RunStatus | None
    decision: Decision


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryPlan:
    """The numbers that the report of the restart would have, and the work of each outcome."""

    decisions: tuple[DecisionCount, ...]
    runs_total: int
    runs_unchanged: int
    quarantined: int
    launches: int
    groups: tuple[tuple[Outcome, Work], ...]


def preview_decision(run: Situation) -> Decision:
    """Return the decision that a restart would make for a run."""
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


def outcome_of(decision: Decision) -> Outcome:
    """Return the outcome of a decision for a run."""
    if decision.state is not RecoveryState.RECOVERED_QUEUED:
        return _OUTCOMES[decision.state]
    if decision.rule == RESUMED_RULE:
        return Outcome.RESUMED
    return Outcome.REPLY_DELIVERED if decision.rule in _KEEPING else Outcome.RESTARTED


_KEEPING: Final = frozenset(rule.name for rule in MATRIX if rule.keeps)
_OUTCOMES: Final = {
    RecoveryState.RECOVERED_WAITING: Outcome.KEPT_WAITING,
    RecoveryState.FAILED_RECONCILED: Outcome.FAILED,
    RecoveryState.CANCELED_RECONCILED: Outcome.CANCELED,
    RecoveryState.QUARANTINED: Outcome.QUARANTINED,
    RecoveryState.SUCCEEDED_RECONCILED: Outcome.SUCCEEDED,
}


def sum_decisions(decisions: Iterable[tuple[Decision, Work]], *, launches: int) -> RecoveryPlan:
    """Return the plan that sums up decisions, each given with the work of its runs."""
    states = {rule.name: rule.state for rule in MATRIX}
    counts: dict[str, int] = dict.fromkeys((*states, QUARANTINE_RULE), 0)
    groups = dict.fromkeys(Outcome, Work())
    unchanged = 0
    for decision, work in decisions:
        groups[outcome_of(decision)] += work
        if decision.unchanged:
            unchanged += work.runs
        else:
            counts[decision.rule] += work.runs
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
        groups=tuple((outcome, work) for outcome, work in groups.items() if work.runs),
    )
