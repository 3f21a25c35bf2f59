"""Which runs may move between the instances on one PostgreSQL database.

A run without a process can move. Each move checks owner and epoch in the row, so that a run does
not move if its owner starts it at the same moment.

To resume a session, a run needs files on its host. If instances do not share workspaces, a run
moves only if its next turn starts from the beginning in an empty workspace.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from runrecovery_service.domain.run import (
    InteractionState,
    Profile,
    RestartPolicy,
    RunStatus,
)
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.tables import sql_words

FROM_BEGINNING: Final = (
    "(r.interrupted_at IS NULL OR COALESCE(r.session_value, '') = '')"
    " AND NOT EXISTS (SELECT 1 FROM interaction q WHERE q.run = r.id"
    f" AND q.no = r.interaction_count AND q.state = '{InteractionState.ANSWERED}')"
)
"""SQL condition: the next turn of run `r` starts from the beginning, and resumes no session."""
QUEUED: Final = (
    f"r.status = '{RunStatus.QUEUED}' AND r.recovery_state <> 'QUARANTINED'"
    # A newer version may have stored a policy that this version does not know. Instances of the
    # newer version start the run.
    f" AND r.restart_policy IN ({sql_words(frozenset(RestartPolicy))})"
    # While a launch is not CLOSED, a process of the run may be alive on its owner's host.
    " AND NOT EXISTS (SELECT 1 FROM process_lease l WHERE l.run = r.id AND l.state <> 'CLOSED')"
)
"""SQL condition: run `r` is QUEUED, and none of its processes can be alive."""
WAITING: Final = (
    f"r.status = '{RunStatus.WAITING_USER}' AND r.profile = '{Profile.RESUMABLE}'"
    " AND r.recovery_state <> 'QUARANTINED'"
)
"""SQL condition: run `r` waits for a reply without a process."""


def marks(values: Collection[object]) -> str:
    """Return the placeholders of an SQL list."""
    return ", ".join("?" for _ in values)


def move_deliveries(db: Database, instance: str, run_keys: Collection[int]) -> None:
    """Move the runs' waiting webhook deliveries to the new owner, so that their order is kept."""
    db.execute(
        f"UPDATE webhook_delivery SET instance = ? WHERE run IN ({marks(run_keys)})",
        (instance, *run_keys),
    )
