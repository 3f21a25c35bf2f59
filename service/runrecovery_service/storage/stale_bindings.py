"""Clears sessions and open questions that ended runs should not have."""

from __future__ import annotations

from typing import Final

from runrecovery_service.domain.run import RunStatus
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.recovery_apply import Tally
from runrecovery_service.storage.tables import sql_words

_TERMINAL: Final = sql_words(tuple(s.value for s in RunStatus if s.is_terminal))


def clear_stale_bindings(db: Database, owner: Owner) -> Tally:
    """Clear sessions and open questions of ended runs.

    Every end of a run clears them already, so this only repairs rows that were changed by hand. It
    finds these rows by partial indexes, which are otherwise empty.
    """
    ended = f"status IN ({_TERMINAL})"
    with db.transaction():
        sessions = db.execute(
            "UPDATE run SET session_type = NULL, session_value = NULL"
            f" WHERE owner = ? AND session_value IS NOT NULL AND {ended}",
            (owner.instance,),
        ).rowcount
        questions = db.execute(
            "UPDATE interaction SET state = 'CLOSED' WHERE state IN ('OPEN', 'ANSWERED')"
            f" AND EXISTS (SELECT 1 FROM run r WHERE r.id = interaction.run AND r.{ended}"
            " AND r.owner = ?)",
            (owner.instance,),
        ).rowcount
    return Tally(sessions=sessions, questions=questions)
