"""Why a decision was made: every fact that it saw and where that came from, in words. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Final

from runrecovery_service.domain.reconciliation import Orphan
from runrecovery_service.domain.recovery_matrix import (
    MATRIX,
    QUARANTINE_RULE,
    REOPEN_RULE,
    Fact,
)
from runrecovery_service.domain.run import Profile, RecoveryInfo, RestartPolicy
from runrecovery_service.domain.session_check import (
    INCONCLUSIVE,
    REASON_TEXTS,
    SessionFinding,
    SessionVerdict,
)

BECAUSE: Final[Mapping[str, str]] = MappingProxyType(
    {rule.name: rule.because for rule in MATRIX}
    | {
        QUARANTINE_RULE: "Its record cannot be read, so that no rule can speak of it; it was set"
        " aside unchanged.",
        REOPEN_RULE: "A recovery had failed it for want of its session; a caller set it back.",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOrphans:
    """Processes of one launch that outlived their service."""

    attempt: int
    turn: int
    orphans: tuple[Orphan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedDecision:
    """A decision and what it saw.

    Attributes:
        interaction_id: of the run's latest question; 0: it had asked none; None: an earlier version
            did not record it.
        session_turn: in which the handle was made; None: there was none, or it is not recorded.
        session_finding: what the engine's check said of the handle; None: it was not checked.
        restart_policy, max_attempts, canceled_at: as on the run's record.
    """

    info: RecoveryInfo
    facts: Fact
    profile: Profile | None
    attempt: int
    interaction_id: int | None
    session_turn: int | None
    session_finding: SessionFinding | None
    restart_policy: RestartPolicy
    max_attempts: int
    canceled_at: datetime | None
    launches: tuple[LaunchOrphans, ...]


@dataclass(frozen=True, slots=True)
class ExplainedFact:
    """One fact: whether it held, and what was looked at."""

    name: str
    held: bool
    source: str


def explain_rule(rule: str) -> str:
    """Return what a rule means, as a sentence; empty for a rule of another version."""
    return BECAUSE.get(rule, "")


def explain_facts(seen: RecordedDecision) -> tuple[ExplainedFact, ...]:
    """Return every fact that the rules look at; none where no rule did."""
    if seen.info.recovery_reason in {QUARANTINE_RULE, REOPEN_RULE}:
        return ()
    return tuple(
        ExplainedFact(fact.name or "", held := fact in seen.facts, source(seen, held))
        for fact, source in _SOURCES.items()
    )


def _pending(seen: RecordedDecision, held: bool) -> str:  # noqa: FBT001 - called from the table only
    if seen.interaction_id is None:
        return "It was open and readable." if held else "None was open and readable."
    if not seen.interaction_id:
        return "It had asked no question."
    state = "open and readable" if held else "not open, or not readable"
    return f"Its latest question, #{seen.interaction_id}, was {state}."


def _handle(seen: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    turn = "" if seen.session_turn is None else f" of turn {seen.session_turn}"
    where = f"A session handle{turn} was stored"
    finding = seen.session_finding
    if held and finding is None:
        return f"{where}; its engine has no check of sessions, so it was taken at its word."
    if finding is None or held is not finding.holds:
        return "No session handle was stored."
    return f"{where}, {'and' if held else 'but'} {_found(finding)}."


def _found(finding: SessionFinding) -> str:
    reason = finding.reason
    found = f"its engine's check said {finding.verdict}" if reason is None else REASON_TEXTS[reason]
    unknown = finding.verdict in {SessionVerdict.UNKNOWN, SessionVerdict.UNKNOWN_REFUSED}
    if unknown and reason is not None and reason not in INCONCLUSIVE:
        found += ", which says little: it had not been seen whole before"
    match finding.verdict:
        case SessionVerdict.UNKNOWN:
            return f'{found}; it counted as held, by unknown_session = "keep"'
        case SessionVerdict.UNKNOWN_REFUSED:
            return f'{found}; it counted as lost, by unknown_session = "fail"'
        case _:
            return found


def _cancel(seen: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    if held and seen.canceled_at is not None:
        return f"A cancel was accepted at {seen.canceled_at.isoformat()}."
    return "No cancel had been accepted."


def _reply(seen: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    if held:
        return (
            f"The answer to question #{seen.interaction_id or '?'} was accepted, and no process is"
            " known to have got it."
        )
    return "No accepted answer was waiting for a process."


def _requeue(seen: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    if seen.restart_policy is not RestartPolicy.REQUEUE:
        return f"Its restart policy is {seen.restart_policy}."
    left = "attempts were left" if held else "no attempt was left"
    return f"Its restart policy is REQUEUE; {left} ({seen.attempt} of {seen.max_attempts} used)."


_SOURCES: Final[Mapping[Fact, Callable[[RecordedDecision, bool], str]]] = MappingProxyType(
    {
        Fact.PENDING: _pending,
        Fact.HANDLE: _handle,
        Fact.CANCEL: _cancel,
        Fact.REPLY: _reply,
        Fact.REQUEUE: _requeue,
    }
)
