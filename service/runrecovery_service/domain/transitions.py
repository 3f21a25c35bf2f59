"""The legal status changes. Every write of a status obeys this table, in recovery too.

Only ReopenRun leaves a terminal status, as `REOPENED` allows.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from runrecovery_service.domain.run import TERMINAL, RunStatus

NEXT: Final = MappingProxyType(
    {
        RunStatus.QUEUED: frozenset(
            {RunStatus.QUEUED, RunStatus.RUNNING, RunStatus.FAILED, RunStatus.CANCELED}
        ),
        RunStatus.RUNNING: frozenset({RunStatus.QUEUED, RunStatus.WAITING_USER}) | TERMINAL,
        RunStatus.WAITING_USER: frozenset(
            {
                RunStatus.WAITING_USER,  # a recovery that lets the run wait on
                RunStatus.QUEUED,  # a reply to a resumable run
                RunStatus.RUNNING,  # a reply to a sticky run
                RunStatus.FAILED,
                RunStatus.CANCELED,
            }
        ),
        RunStatus.SUCCEEDED: frozenset[RunStatus](),
        RunStatus.FAILED: frozenset[RunStatus](),
        RunStatus.CANCELED: frozenset[RunStatus](),
    }
)

REOPENED: Final = MappingProxyType(
    {RunStatus.FAILED: frozenset({RunStatus.WAITING_USER, RunStatus.QUEUED})}
)
"""The status changes by which ReopenRun reopens a run that a recovery has failed."""


def is_legal(before: RunStatus, after: RunStatus) -> bool:
    """Return True if `after` is allowed to follow `before`. A terminal status never changes."""
    return after in NEXT[before]
