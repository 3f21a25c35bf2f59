"""The words and colours for values of the contract on the pages. Pure.

A tone is the name of a colour. Each tone comes with a word, so that nobody needs to see the colour.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2

from runrecovery_service.lazy_dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Word:
    """A value as a readable word. `tone` is one of busy, wait, good, bad, warn and calm."""

    text: str
    tone: str = "calm"


_UNKNOWN: Final = Word("unknown", "warn")

STATUSES: Final[Mapping[int, Word]] = MappingProxyType(
    {
        run_pb2.RUN_STATUS_UNSPECIFIED: Word("quarantined", "bad"),
        run_pb2.RUN_STATUS_QUEUED: Word("queued", "calm"),
        run_pb2.RUN_STATUS_RUNNING: Word("running", "busy"),
        run_pb2.RUN_STATUS_WAITING_USER: Word("waiting for you", "wait"),
        run_pb2.RUN_STATUS_SUCCEEDED: Word("succeeded", "good"),
        run_pb2.RUN_STATUS_FAILED: Word("failed", "bad"),
        run_pb2.RUN_STATUS_CANCELED: Word("canceled", "calm"),
    }
)

STATUS_BY_NAME: Final[Mapping[str, int]] = MappingProxyType(
    {
        "queued": run_pb2.RUN_STATUS_QUEUED,
        "running": run_pb2.RUN_STATUS_RUNNING,
        "waiting": run_pb2.RUN_STATUS_WAITING_USER,
        "succeeded": run_pb2.RUN_STATUS_SUCCEEDED,
        "failed": run_pb2.RUN_STATUS_FAILED,
        "canceled": run_pb2.RUN_STATUS_CANCELED,
    }
)
"""The statuses, by the word that stands for each in the address of the list of runs."""

OUTCOMES: Final[Mapping[int, Word]] = MappingProxyType(
    {
        recovery_service_pb2.PLANNED_OUTCOME_KEPT_WAITING: Word("keeps waiting", "good"),
        recovery_service_pb2.PLANNED_OUTCOME_REPLY_DELIVERED: Word("gets its reply", "good"),
        recovery_service_pb2.PLANNED_OUTCOME_RESUMED: Word("resumes its turn", "good"),
        recovery_service_pb2.PLANNED_OUTCOME_RESTARTED: Word("starts over", "warn"),
        recovery_service_pb2.PLANNED_OUTCOME_FAILED: Word("fails", "bad"),
        recovery_service_pb2.PLANNED_OUTCOME_CANCELED: Word("is canceled", "calm"),
        recovery_service_pb2.PLANNED_OUTCOME_QUARANTINED: Word("is quarantined", "bad"),
        recovery_service_pb2.PLANNED_OUTCOME_SUCCEEDED: Word("succeeds", "good"),
    }
)

RECOVERY_STATES: Final[Mapping[int, Word]] = MappingProxyType(
    {
        run_pb2.RECOVERY_STATE_RECOVERED_WAITING: Word("kept waiting", "good"),
        run_pb2.RECOVERY_STATE_FAILED_RECONCILED: Word("failed", "bad"),
        run_pb2.RECOVERY_STATE_RECOVERED_QUEUED: Word("queued again", "good"),
        run_pb2.RECOVERY_STATE_CANCELED_RECONCILED: Word("canceled", "calm"),
        run_pb2.RECOVERY_STATE_QUARANTINED: Word("quarantined", "bad"),
        run_pb2.RECOVERY_STATE_REOPENED: Word("reopened", "good"),
        run_pb2.RECOVERY_STATE_SUCCEEDED_RECONCILED: Word("succeeded", "good"),
    }
)

REPORT_STATES: Final[Mapping[int, Word]] = MappingProxyType(
    {
        recovery_pb2.RECONCILIATION_STATE_RUNNING: Word("under way", "busy"),
        recovery_pb2.RECONCILIATION_STATE_COMPLETED: Word("completed", "good"),
        recovery_pb2.RECONCILIATION_STATE_FAILED: Word("failed", "bad"),
    }
)

TRIGGERS: Final[Mapping[int, str]] = MappingProxyType(
    {
        recovery_pb2.RECONCILIATION_TRIGGER_STARTUP: "Start",
        recovery_pb2.RECONCILIATION_TRIGGER_SHUTDOWN: "Planned stop",
        recovery_pb2.RECONCILIATION_TRIGGER_TAKEOVER: "Takeover",
    }
)

SERVICE_STATES: Final[Mapping[int, Word]] = MappingProxyType(
    {
        recovery_pb2.SERVICE_STATE_RECOVERING: Word("recovering", "busy"),
        recovery_pb2.SERVICE_STATE_RECOVERY_FAILED: Word("recovery failed", "bad"),
        recovery_pb2.SERVICE_STATE_SERVING: Word("serving", "good"),
        recovery_pb2.SERVICE_STATE_DRAINING: Word("stopping", "warn"),
    }
)

CONTAINMENT: Final[Mapping[int, Word]] = MappingProxyType(
    {
        recovery_pb2.CONTAINMENT_LEVEL_NONE: Word("none", "bad"),
        recovery_pb2.CONTAINMENT_LEVEL_COOKIE: Word("cookie", "warn"),
        recovery_pb2.CONTAINMENT_LEVEL_WATERMARK: Word("watermark", "good"),
    }
)

PROFILES: Final[Mapping[int, str]] = MappingProxyType(
    {
        run_pb2.INTERACTIVE_PROFILE_KIND_RESUMABLE: "resumable",
        run_pb2.INTERACTIVE_PROFILE_KIND_STICKY_PROCESS: "sticky process",
    }
)

POLICIES: Final[Mapping[int, str]] = MappingProxyType(
    {
        run_pb2.RESTART_POLICY_FAIL: "fail",
        run_pb2.RESTART_POLICY_REQUEUE: "start over",
        run_pb2.RESTART_POLICY_RESUME: "resume the turn",
    }
)

KINDS: Final[Mapping[int, str]] = MappingProxyType(
    {
        run_pb2.INTERACTION_KIND_OPEN_TEXT: "Question",
        run_pb2.INTERACTION_KIND_CHOOSE_ONE: "Choice",
        run_pb2.INTERACTION_KIND_CONFIRM: "Yes or no",
        run_pb2.INTERACTION_KIND_FILL_FIELDS: "Form",
        run_pb2.INTERACTION_KIND_RISK_ACK: "Risk",
    }
)


def status_word(status: int) -> Word:
    """Return the word of a status of a run."""
    return STATUSES.get(status, _UNKNOWN)


def outcome_word(outcome: int) -> Word:
    """Return the word for the planned decision about a run."""
    return OUTCOMES.get(outcome, _UNKNOWN)


def recovery_word(state: int) -> Word:
    """Return the word for the decision that a restart made about a run."""
    return RECOVERY_STATES.get(state, _UNKNOWN)


def count(number: int, one: str, many: str | None = None) -> str:
    """Return a number with its noun: `1 run`, `2,000 runs`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
