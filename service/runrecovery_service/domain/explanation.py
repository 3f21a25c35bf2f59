"""Explains a recorded decision in words: each fact, and its source. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from runrecovery_service.domain.run import Profile, RecoveryInfo, RestartPolicy, RunStatus
from runrecovery_service.domain.session_check import (
    INCONCLUSIVE,
    REASON_TEXTS,
    SessionFinding,
    SessionVerdict,
)
from runrecovery_service.lazy_dataclass import dataclass

RULE_TEXTS: Final[Mapping[str, str]] = MappingProxyType(
    {rule.name: rule.because for rule in MATRIX}
    | {
        QUARANTINE_RULE: "The run's record cannot be read, so no rule applies. The record was left"
        " unchanged.",
        REOPEN_RULE: "A recovery had failed the run because its session was lost. A caller reopened"
        " the run.",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchOrphans:
    """The processes of one launch that outlived their service."""

    attempt: int
    turn: int
    orphans: tuple[Orphan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedDecision:
    """A recorded decision and the facts that it was based on.

    Attributes:
        interaction_id: the number of the run's latest question. 0: the run had asked none. None:
            an earlier version did not record the number.
        session_turn: the turn that named the session's handle. None: there was no handle, or its
            turn is not recorded.
        session_finding: the result of the session check. None: the session was not checked.
        resumes: how often the interrupted turn had been resumed.
        restart_policy, max_attempts, max_resumes, canceled_at: the fields of the run.
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
    resumes: int = 0
    max_resumes: int = 0


@dataclass(frozen=True, slots=True)
class ExplainedFact:
    """One fact: whether it was true, and its source as a sentence."""

    name: str
    held: bool
    source: str


def explain_rule(rule: str) -> str:
    """Return the meaning of a rule as a sentence; empty for a rule of another version."""
    return RULE_TEXTS.get(rule, "")


def explain_facts(decision: RecordedDecision) -> tuple[ExplainedFact, ...]:
    """Return every fact that the rules use, or none if no rule of the matrix decided."""
    if decision.info.recovery_reason in {QUARANTINE_RULE, REOPEN_RULE}:
        return ()
    return tuple(
        ExplainedFact(fact.name or "", held := fact in decision.facts, source(decision, held))
        for fact, source in _SOURCES.items()
        if _is_used(fact, decision)
    )


def _is_used(fact: Fact, decision: RecordedDecision) -> bool:
    """Return whether the rules for this run can use the fact."""
    if fact in _OF_OUTPUT:
        return decision.info.status_before is RunStatus.RUNNING
    if fact in _OF_TAKEOVER:
        return Fact.ELSEWHERE in decision.facts
    return fact not in _OF_RESUME or decision.restart_policy is RestartPolicy.RESUME


def _pending(decision: RecordedDecision, held: bool) -> str:  # noqa: FBT001 - called from the table only
    if decision.interaction_id is None:
        return "A question was open and readable." if held else "No question was open and readable."
    if not decision.interaction_id:
        return "The run had asked no question."
    state = "open and readable" if held else "not open, or not readable"
    return f"The latest question, #{decision.interaction_id}, was {state}."


def _handle(decision: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    turn = "" if decision.session_turn is None else f" of turn {decision.session_turn}"
    where = f"A session handle{turn} was stored"
    finding = decision.session_finding
    if held and finding is None:
        return f"{where}; the engine has no session check, so the handle counted as valid."
    if finding is None or held is not finding.holds:
        return "No session handle was stored."
    return f"{where}, {'and' if held else 'but'} {_found(finding)}."


def _found(finding: SessionFinding) -> str:
    reason = finding.reason
    found = (
        f"the session check returned {finding.verdict}" if reason is None else REASON_TEXTS[reason]
    )
    unknown = finding.verdict in {SessionVerdict.UNKNOWN, SessionVerdict.UNKNOWN_REFUSED}
    if unknown and reason is not None and reason not in INCONCLUSIVE:
        found += ", which proves little because the session had never been seen intact"
    match finding.verdict:
        case SessionVerdict.UNKNOWN:
            return f'{found}; the session counted as valid because of unknown_session = "keep"'
        case SessionVerdict.UNKNOWN_REFUSED:
            return f'{found}; the session counted as lost because of unknown_session = "fail"'
        case _:
            return found


def _cancel(decision: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    if held and decision.canceled_at is not None:
        return f"A cancel was accepted at {decision.canceled_at.isoformat()}."
    return "No cancel had been accepted."


def _reply(decision: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    if held:
        return (
            f"The reply to question #{decision.interaction_id or '?'} was accepted, and no process"
            " is known to have received it."
        )
    return "No accepted reply was waiting for a process."


def _requeue(decision: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    if decision.restart_policy is not RestartPolicy.REQUEUE:
        return f"The restart policy is {decision.restart_policy}."
    return f"The restart policy is REQUEUE; {_attempts_left(decision, held)}."


def _resume(decision: RecordedDecision, _: bool) -> str:  # noqa: FBT001
    return f"The restart policy is {decision.restart_policy}."


def _resume_left(decision: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    used = f"{decision.resumes} of {decision.max_resumes}"
    left = "may be resumed" if held else "may not be resumed"
    return f"The turn had been resumed {used} times, so it {left}."


def _restart_left(decision: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    return f"For a start from the beginning, {_attempts_left(decision, held)}."


def _result(_: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    return _end_in_output("result", held=held)


def _question(_: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    return _end_in_output("question", held=held)


def _over_budget(_: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    if held:
        return f"{_end_in_output('question', held=True)} The run has used up its budget."
    return "No question was found in the output, or the run had not used up its budget."


def _elsewhere(_: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    if held:
        return "The instance was dead, and the files of the session are on its host."
    return "The next turn needed no session whose files are on the host of a dead instance."


def _host_lost(_: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    if held:
        return "The host had not returned within host_return_s after the takeover."
    return "host_return_s had not passed since the takeover."


def _end_in_output(end: str, *, held: bool) -> str:
    if held:
        return f"The process had exited with 0. Its whole output was kept and has a {end}."
    return f"No {end} was found in completely kept output of a process that had exited with 0."


def _attempts_left(decision: RecordedDecision, held: bool) -> str:  # noqa: FBT001
    left = "attempts were left" if held else "no attempt was left"
    return f"{left} ({decision.attempt} of {decision.max_attempts} used)"


_SOURCES: Final[Mapping[Fact, Callable[[RecordedDecision, bool], str]]] = MappingProxyType(
    {
        Fact.PENDING: _pending,
        Fact.HANDLE: _handle,
        Fact.CANCEL: _cancel,
        Fact.REPLY: _reply,
        Fact.REQUEUE: _requeue,
        Fact.RESUME: _resume,
        Fact.RESUME_LEFT: _resume_left,
        Fact.RESTART_LEFT: _restart_left,
        Fact.RESULT: _result,
        Fact.QUESTION: _question,
        Fact.OVER_BUDGET: _over_budget,
        Fact.ELSEWHERE: _elsewhere,
        Fact.HOST_LOST: _host_lost,
    }
)
_OF_RESUME: Final = Fact.RESUME | Fact.RESUME_LEFT | Fact.RESTART_LEFT
"""The facts that only rules for the restart policy RESUME use."""
_OF_OUTPUT: Final = Fact.RESULT | Fact.QUESTION | Fact.OVER_BUDGET
"""The facts that only rules for RUNNING runs use."""
_OF_TAKEOVER: Final = Fact.ELSEWHERE | Fact.HOST_LOST
"""The facts that are true only in a takeover."""
