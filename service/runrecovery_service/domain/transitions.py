"""Which status may follow which. Every writer of a status, recovery too, keeps to this table;
`REOPENED` holds the one way out of a terminal status, which only ReopenRun takes."""

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
                RunStatus.WAITING_USER,  # a recovery that keeps it
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
"""For a run that a recovery failed, in its window, by a caller's word."""


def is_legal(before: RunStatus, after: RunStatus) -> bool:
    """True when a run in `before` may become `after`. Nothing follows a terminal status."""
    return after in NEXT[before]
