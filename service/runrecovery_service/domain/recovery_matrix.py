"""The recovery matrix: what a restart does with a run, as data.

One table, read twice: `decide` here, to explain, plan and test; and a SQL `CASE` that
`storage/recovery.py` builds from the same rows, to converge many runs in a few statements.
The first rule that matches wins.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Flag, auto
from typing import Final

from runrecovery_service.domain.run import ErrorCode, Profile, RecoveryState, RunStatus


class Fact(Flag):
    """What a restart knows of a run beside its status and profile."""

    PENDING = auto()
    """An open question is stored and readable."""
    HANDLE = auto()
    """A session handle is stored and passed its engine's check."""
    CANCEL = auto()
    """A cancel was accepted."""
    REPLY = auto()
    """An accepted reply has not been given to a process yet."""
    REQUEUE = auto()
    """restart_policy is REQUEUE and attempts are left."""


NOTHING: Final = Fact(0)

_LIVE: Final = (RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.WAITING_USER)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One row of the matrix.

    Attributes:
        name: stable; it is the run's `recovery_reason`.
        statuses: the rule looks at runs found in one of these.
        profiles: and of one of these profiles (None: missing or unknown); empty means any.
        needs: facts that must hold.
        lacks: facts that must not hold.
        becomes: the status that the run gets.
        error: the error code that it gets, for FAILED.
        state: the `recovery_state` that it gets.
        keeps: the run goes on from where it is: its question, reply and session stay. Without
            it they are cleared, since nobody can use them any more.
        reopenable: the run failed for want of its session only: its question and handle are
            retired for a while instead, so that ReopenRun can set it back.
        because: one sentence: the message of the error, and the text of the docs.
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
    because: str

    def matches(self, status: RunStatus, profile: Profile | None, facts: Fact) -> bool:
        """True when the rule speaks of such a run."""
        return (
            status in self.statuses
            and (not self.profiles or profile in self.profiles)
            and self.needs in facts
            and not (self.lacks & facts)
        )


MATRIX: Final[tuple[Rule, ...]] = (
    Rule(
        name="cancel_completed",
        statuses=_LIVE,
        needs=Fact.CANCEL,
        becomes=RunStatus.CANCELED,
        state=RecoveryState.CANCELED_RECONCILED,
        because="A cancel had been accepted before the restart; it wins over every other end.",
    ),
    Rule(
        # RUNNING too: between taking the run and handing the reply to its process the reply
        # exists in the store only, and it was acknowledged.
        name="accepted_reply_redriven",
        statuses=(RunStatus.QUEUED, RunStatus.RUNNING),
        profiles=(Profile.RESUMABLE,),
        needs=Fact.REPLY | Fact.HANDLE,
        becomes=RunStatus.QUEUED,
        state=RecoveryState.RECOVERED_QUEUED,
        keeps=True,
        because="A reply had been accepted and not yet delivered; the next turn resumes with it.",
    ),
    Rule(
        name="resumable_waiting_preserved",
        statuses=(RunStatus.WAITING_USER,),
        profiles=(Profile.RESUMABLE,),
        needs=Fact.PENDING | Fact.HANDLE,
        becomes=RunStatus.WAITING_USER,
        state=RecoveryState.RECOVERED_WAITING,
        keeps=True,
        because="It waits without a process, and its question and session are intact.",
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
        because="It waited for a reply, but the session that a reply would resume is lost.",
    ),
    Rule(
        name="pending_interaction_lost",
        statuses=(RunStatus.WAITING_USER,),
        profiles=(Profile.RESUMABLE,),
        lacks=Fact.PENDING,
        becomes=RunStatus.FAILED,
        error=ErrorCode.SESSION_RESUME_FAILED,
        state=RecoveryState.FAILED_RECONCILED,
        because="It waited for a reply, but the question that it asked is lost.",
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
        because="It waited for a reply, but how it can be resumed is not recorded.",
    ),
    Rule(
        name="requeued",
        statuses=(RunStatus.QUEUED, RunStatus.RUNNING),
        needs=Fact.REQUEUE,
        becomes=RunStatus.QUEUED,
        state=RecoveryState.RECOVERED_QUEUED,
        because="Its restart policy starts it again, and its attempt budget allows that.",
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
        because="A reply had been accepted, but the session that it would resume is lost.",
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
        name="running_interrupted",
        statuses=(RunStatus.RUNNING,),
        becomes=RunStatus.FAILED,
        error=ErrorCode.ORCHESTRATOR_RESTART_INTERRUPTED,
        state=RecoveryState.FAILED_RECONCILED,
        because="The service restarted while the run was running.",
    ),
)

BECAUSE: Final = {rule.name: rule.because for rule in MATRIX if rule.error is not None}
"""What the error of a run says that one of these rules ended."""

QUARANTINE_RULE: Final = "record_damaged"
"""The recovery_reason of a run whose record cannot be read, so that no rule can speak of it."""

REOPEN_RULE: Final = "reopened_by_caller"
"""The recovery_reason of a run that a caller set back after a recovery had failed it. It stands in
the history of its decisions, although no restart made it."""

REOPENABLE: Final = frozenset(rule.name for rule in MATRIX if rule.reopenable)
"""Rules after which that is possible."""


def decide(status: RunStatus, profile: Profile | None, facts: Fact) -> Rule:
    """Return the rule for a non-terminal run that a restart found.

    Raises:
        ValueError: the status is terminal: nothing is to be decided.
    """
    for rule in MATRIX:
        if rule.matches(status, profile, facts):
            return rule
    raise ValueError(f"no rule for a run that is {status}")
