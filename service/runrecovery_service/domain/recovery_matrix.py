"""The recovery matrix: what a restart does with a run, as data.

The table is used twice. `decide` applies it to one run, to explain, plan and test. Storage builds a
SQL `CASE` from the same rows, to decide many runs in a few statements. The first rule that matches
wins.
"""

from __future__ import annotations

from enum import Flag, auto
from typing import Final

from runrecovery_service.domain.run import ErrorCode, Profile, RecoveryState, RunStatus
from runrecovery_service.lazy_dataclass import dataclass


class Fact(Flag):
    """The facts that a restart uses about a run, in addition to its status and its profile."""

    PENDING = auto()
    """An open question is stored and readable."""
    HANDLE = auto()
    """A session handle is stored and passed its engine's check."""
    CANCEL = auto()
    """A cancel was accepted."""
    REPLY = auto()
    """An accepted reply has not been delivered to a process yet."""
    REQUEUE = auto()
    """restart_policy is REQUEUE and attempts are left."""
    RESUME = auto()
    """restart_policy is RESUME."""
    RESUME_LEFT = auto()
    """restart_policy is RESUME and the limit on resumes of the turn is not reached."""
    RESTART_LEFT = auto()
    """restart_policy is RESUME and attempts are left."""
    RESULT = auto()
    """The process had exited with 0, and its stored output ends with its complete result."""
    QUESTION = auto()
    """The process had exited with 0, and its stored output ends with its complete question."""
    OVER_BUDGET = auto()
    """Like QUESTION, but the run has used up its budget, so that no turn can follow."""
    ELSEWHERE = auto()
    """The next turn resumes a session whose files are on the host of a dead instance."""
    HOST_LOST = auto()
    """Like ELSEWHERE, but the dead instance's host did not return within `host_return_s`."""


NOTHING: Final = Fact(0)

_LIVE: Final = (RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.WAITING_USER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row of the matrix.

    Attributes:
        name: the `recovery_reason` of the run. A name never changes.
        statuses: the statuses to which the rule applies.
        profiles: the profiles to which the rule applies; empty: all. The profile None is a missing
            or unknown one.
        needs: facts that must be true.
        lacks: facts that must be false.
        becomes: the new status of the run.
        error: the error code of the run, for FAILED.
        state: the new `recovery_state` of the run.
        keeps: whether the run keeps its question, reply and session. Otherwise they are cleared,
            because no process can use them.
        reopenable: whether the run failed only because its session is lost. The question and the
            handle are then kept for a while, so that ReopenRun can reopen the run.
        stays: whether the run keeps its owner in a takeover, because only the owner's host has the
            session.
        because: one sentence: the message of the run's error, and the text of the docs.
    """

    name: str
    statuses: tuple[RunStatus, ...]
    profiles: tuple[Profile | None, ...] = ()
    needs: Fact = NOTHING
    lacks: Fact = NOTHING
    becomes: RunStatus
    error: ErrorCode | None = None
    state: RecoveryState
    keeps: bool = False
    reopenable: bool = False
    stays: bool = False
    because: str

    def matches(self, status: RunStatus, profile: Profile | None, facts: Fact) -> bool:
        """Return True if the rule applies to a run with this status, profile and facts."""
        return (
            status in self.statuses
            and (not self.profiles or profile in self.profiles)
            and self.needs in facts
            and not (self.lacks & facts)
        )


RESULT_RULE: Final = "result_found_in_output"
QUESTION_RULE: Final = "question_found_in_output"
"""The recovery_reasons of a run whose process had exited with 0 after a result or a question,
before the service could record its end."""
BUDGET_RULE: Final = "budget_used_up"
"""The recovery_reason in place of QUESTION_RULE for a run that has used up its budget."""

RESUMED_RULE: Final = "interrupted_turn_resumed"
"""The recovery_reason of a run whose next turn resumes its session with a notice."""
QUEUED_FOR_HOST_RULE: Final = "queued_for_its_host"
"""The recovery_reason of a run whose next turn waits for the host that has its session."""

MATRIX: Final[tuple[Rule, ...]] = (
    Rule(
        name="cancel_completed",
        statuses=_LIVE,
        needs=Fact.CANCEL,
        becomes=RunStatus.CANCELED,
        state=RecoveryState.CANCELED_RECONCILED,
        because="A cancel was accepted before the restart. A cancel wins over every other end.",
    ),
    Rule(
        name="host_did_not_return",
        statuses=_LIVE,
        needs=Fact.ELSEWHERE | Fact.HOST_LOST,
        becomes=RunStatus.FAILED,
        error=ErrorCode.SESSION_RESUME_FAILED,
        state=RecoveryState.FAILED_RECONCILED,
        reopenable=True,
        stays=True,
        because="The session of the run is on the host of a dead instance, and that host did not"
        " return within host_return_s.",
    ),
    Rule(
        name="waiting_for_its_host",
        statuses=(RunStatus.WAITING_USER,),
        needs=Fact.ELSEWHERE,
        becomes=RunStatus.WAITING_USER,
        state=RecoveryState.RECOVERED_WAITING,
        keeps=True,
        stays=True,
        because="The session of the run is on the host of a dead instance. A reply is accepted, and"
        " delivered once that instance has started again.",
    ),
    Rule(
        name=QUEUED_FOR_HOST_RULE,
        statuses=(RunStatus.QUEUED, RunStatus.RUNNING),
        needs=Fact.ELSEWHERE,
        becomes=RunStatus.QUEUED,
        state=RecoveryState.RECOVERED_QUEUED,
        keeps=True,
        stays=True,
        because="The session of the run is on the host of a dead instance. The next turn resumes it"
        " once that instance has started again.",
    ),
    Rule(
        name=RESULT_RULE,
        statuses=(RunStatus.RUNNING,),
        needs=Fact.RESULT,
        becomes=RunStatus.SUCCEEDED,
        state=RecoveryState.SUCCEEDED_RECONCILED,
        because="The process had exited with 0 before the restart, and its whole output was kept."
        " It ends with the result.",
    ),
    Rule(
        name=QUESTION_RULE,
        statuses=(RunStatus.RUNNING,),
        profiles=(Profile.RESUMABLE,),
        needs=Fact.QUESTION | Fact.HANDLE,
        becomes=RunStatus.WAITING_USER,
        state=RecoveryState.RECOVERED_WAITING,
        keeps=True,
        because="The process had exited with 0 before the restart, and its whole output was kept."
        " It ends with a question, and its session is intact.",
    ),
    Rule(
        name=BUDGET_RULE,
        statuses=(RunStatus.RUNNING,),
        profiles=(Profile.RESUMABLE,),
        needs=Fact.OVER_BUDGET,
        becomes=RunStatus.FAILED,
        error=ErrorCode.BUDGET_EXCEEDED,
        state=RecoveryState.FAILED_RECONCILED,
        because="The process had exited with 0 before the restart, with a question. The run has"
        " used up its budget, so no turn can follow.",
    ),
    Rule(
        # RUNNING too: until the process has received the reply, the acknowledged reply exists
        # only in the database.
        name="accepted_reply_redriven",
        statuses=(RunStatus.QUEUED, RunStatus.RUNNING),
        profiles=(Profile.RESUMABLE,),
        needs=Fact.REPLY | Fact.HANDLE,
        becomes=RunStatus.QUEUED,
        state=RecoveryState.RECOVERED_QUEUED,
        keeps=True,
        because="A reply was accepted but not delivered. The next turn resumes with this reply.",
    ),
    Rule(
        name="resumable_waiting_preserved",
        statuses=(RunStatus.WAITING_USER,),
        profiles=(Profile.RESUMABLE,),
        needs=Fact.PENDING | Fact.HANDLE,
        becomes=RunStatus.WAITING_USER,
        state=RecoveryState.RECOVERED_WAITING,
        keeps=True,
        because="The run waits without a process. Its question and session are intact.",
    ),
    Rule(
        name="session_handle_lost",
        statuses=(RunStatus.WAITING_USER,),
        profiles=(Profile.RESUMABLE,),
        needs=Fact.PENDING,
        lacks=Fact.HANDLE,
        becomes=RunStatus.FAILED,
        error=ErrorCode.SESSION_RESUME_FAILED,
        state=RecoveryState.FAILED_RECONCILED,
        reopenable=True,
        because="The run waited for a reply, but the session that a reply would resume is lost.",
    ),
    Rule(
        name="pending_interaction_lost",
        statuses=(RunStatus.WAITING_USER,),
        profiles=(Profile.RESUMABLE,),
        lacks=Fact.PENDING,
        becomes=RunStatus.FAILED,
        error=ErrorCode.SESSION_RESUME_FAILED,
        state=RecoveryState.FAILED_RECONCILED,
        because="The run waited for a reply, but its question is lost.",
    ),
    Rule(
        name="sticky_process_lost",
        statuses=(RunStatus.WAITING_USER,),
        profiles=(Profile.STICKY_PROCESS,),
        becomes=RunStatus.FAILED,
        error=ErrorCode.INTERACTION_PROCESS_LOST,
        state=RecoveryState.FAILED_RECONCILED,
        because="The process that waited for the reply ended with the service.",
    ),
    Rule(
        name="profile_missing",
        statuses=(RunStatus.WAITING_USER,),
        profiles=(None,),
        becomes=RunStatus.FAILED,
        error=ErrorCode.ORCHESTRATOR_RESTART_INTERRUPTED,
        state=RecoveryState.FAILED_RECONCILED,
        because="The run waited for a reply, but its profile is not recorded.",
    ),
    Rule(
        # QUEUED too: an interrupted run can be waiting for the turn that resumes its session.
        name=RESUMED_RULE,
        statuses=(RunStatus.QUEUED, RunStatus.RUNNING),
        needs=Fact.RESUME_LEFT | Fact.HANDLE,
        becomes=RunStatus.QUEUED,
        state=RecoveryState.RECOVERED_QUEUED,
        keeps=True,
        because="The restart policy is RESUME. The next turn resumes the session with a notice.",
    ),
    Rule(
        name="interrupted_before_session",
        statuses=(RunStatus.QUEUED, RunStatus.RUNNING),
        needs=Fact.RESTART_LEFT,
        lacks=Fact.HANDLE | Fact.REPLY,  # to start over would discard the accepted reply
        becomes=RunStatus.QUEUED,
        state=RecoveryState.RECOVERED_QUEUED,
        because="The restart policy is RESUME, but there is no session to resume. The run starts"
        " from the beginning.",
    ),
    Rule(
        name="requeued",
        statuses=(RunStatus.QUEUED, RunStatus.RUNNING),
        needs=Fact.REQUEUE,
        becomes=RunStatus.QUEUED,
        state=RecoveryState.RECOVERED_QUEUED,
        because="The restart policy is REQUEUE, and attempts are left.",
    ),
    Rule(
        name="accepted_reply_session_lost",
        statuses=(RunStatus.QUEUED, RunStatus.RUNNING),
        profiles=(Profile.RESUMABLE,),
        needs=Fact.REPLY,
        lacks=Fact.HANDLE,
        becomes=RunStatus.FAILED,
        error=ErrorCode.SESSION_RESUME_FAILED,
        state=RecoveryState.FAILED_RECONCILED,
        reopenable=True,
        because="A reply was accepted, but the session that it would resume is lost.",
    ),
    Rule(
        name="attempts_used_up",
        statuses=(RunStatus.QUEUED, RunStatus.RUNNING),
        needs=Fact.RESUME,
        lacks=Fact.HANDLE | Fact.REPLY,
        becomes=RunStatus.FAILED,
        error=ErrorCode.ORCHESTRATOR_RESTART_INTERRUPTED,
        state=RecoveryState.FAILED_RECONCILED,
        because="The run was interrupted, there is no session to resume, and it had been started"
        " max_attempts times already.",
    ),
    Rule(
        name="queued_interrupted",
        statuses=(RunStatus.QUEUED,),
        becomes=RunStatus.FAILED,
        error=ErrorCode.ORCHESTRATOR_RESTART_INTERRUPTED,
        state=RecoveryState.FAILED_RECONCILED,
        because="The service restarted before the run was started.",
    ),
    Rule(
        name="resumes_used_up",
        statuses=(RunStatus.RUNNING,),
        needs=Fact.RESUME | Fact.HANDLE,
        becomes=RunStatus.FAILED,
        error=ErrorCode.ORCHESTRATOR_RESTART_INTERRUPTED,
        state=RecoveryState.FAILED_RECONCILED,
        because="The run was interrupted, and its turn had been resumed max_resumes times already.",
    ),
    Rule(
        name="running_interrupted",
        statuses=(RunStatus.RUNNING,),
        becomes=RunStatus.FAILED,
        error=ErrorCode.ORCHESTRATOR_RESTART_INTERRUPTED,
        state=RecoveryState.FAILED_RECONCILED,
        because="The service restarted while the run was running.",
    ),
)

BECAUSE: Final = {rule.name: rule.because for rule in MATRIX if rule.error is not None}
"""The error message of a run that was failed by a rule."""

QUARANTINE_RULE: Final = "record_damaged"
"""The recovery_reason of a run whose record cannot be read, so that no rule applies."""

REOPEN_RULE: Final = "reopened_by_caller"
"""The recovery_reason of a run that a caller reopened after a recovery had failed it. The history
of decisions contains it, although no restart made this decision."""

REOPENABLE: Final = frozenset(rule.name for rule in MATRIX if rule.reopenable)
"""The rules after which a caller can reopen the run."""


def decide(status: RunStatus, profile: Profile | None, facts: Fact) -> Rule:
    """Return the rule for a non-terminal run that a restart found.

    Raises:
        ValueError: the status is terminal, so there is nothing to decide.
    """
    for rule in MATRIX:
        if rule.matches(status, profile, facts):
            return rule
    raise ValueError(f"no rule for a run that is {status}")
