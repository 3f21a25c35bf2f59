"""Finds runs with values that only a newer version knows, while both versions use one database.

To this version, a record with an unknown status or policy looks damaged, and its recovery would
quarantine the run. So this version does not recover an instance that has one of these runs.
"""

from __future__ import annotations

from runrecovery_service.domain.run import RestartPolicy, RunStatus
from runrecovery_service.domain.start_errors import DatabaseRefused
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.migrate import is_newer
from runrecovery_service.storage.refusals import refusing
from runrecovery_service.storage.tables import LIVE, sql_words

_STATUSES = sql_words(tuple(status.value for status in RunStatus))
_POLICIES = sql_words(tuple(policy.value for policy in RestartPolicy))


def has_newer_words(db: Database, instance: str) -> bool:
    """Return whether an unfinished run of the instance has a value of a newer version."""
    if not is_newer(db):  # without a newer version, an unknown value is damage
        return False
    found = db.fetch_one(
        f"SELECT 1 FROM run WHERE {LIVE} AND owner = ?"
        f" AND (status NOT IN ({_STATUSES}) OR restart_policy NOT IN ({_POLICIES})) LIMIT 1",
        (instance,),
    )
    return found is not None


def demand_known_words(db: Database, instance: str) -> None:
    """Refuse to start for an instance with runs that only a newer version can read.

    Raises:
        DatabaseRefused: an unfinished run has a value of a newer version.
    """
    with refusing(db.name):
        if has_newer_words(db, instance):
            reason = f"has runs of instance {instance!r} of a newer version; start that version"
            raise DatabaseRefused(db.name, reason)
