"""Finds runs with words of a newer version, beside which this version runs.

To this version such a record looks damaged, and a recovery would quarantine it. So no recovery of
this version may decide on the runs of an instance that has one.
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
    """Return whether a newer version has written an unfinished run of the instance."""
    if not is_newer(db):  # an unknown word is damage
        return False
    found = db.fetch_one(
        f"SELECT 1 FROM run WHERE {LIVE} AND owner = ?"
        f" AND (status NOT IN ({_STATUSES}) OR restart_policy NOT IN ({_POLICIES})) LIMIT 1",
        (instance,),
    )
    return found is not None


def demand_known_words(db: Database, instance: str) -> None:
    """Refuse to start for an instance whose runs a newer version has written.

    Raises:
        DatabaseRefused: see `has_newer_words`.
    """
    with refusing(db.name):
        if has_newer_words(db, instance):
            reason = f"has runs of instance {instance!r} that a newer version wrote; start that one"
            raise DatabaseRefused(db.name, reason)
