"""Takes over the runs of an instance whose lease has ended. PostgreSQL only.

`dead_instances.py` finds these instances.

A takeover raises the epoch of the dead instance, as the instance's own start would. The dead
instance is then fenced, and its runs are of an earlier epoch. The takeover does not renew the
lease, so the dead instance may start at any time. Its start raises the epoch again, and fences the
takeover.

The *successor* is the instance that takes over. If it dies as well, another instance repeats the
takeover.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Final

from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.start_errors import RecoveryInterrupted
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import instances
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.dead_instances import TakeoverRules, needs_takeover
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.newer_words import has_newer_words

DELIVERIES_AT_ONCE: Final = 5_000


class TakeoverFenced(Exception):
    """The takeover is over: the instance has started again, or another successor has begun."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Takeover:
    """A takeover under way.

    Attributes:
        dead: the dead instance, with the epoch and the boot token that the takeover gave it.
        host_lost: whether the host of the dead instance has stayed away for `host_return_s`.
    """

    dead: Owner
    host_lost: bool

    def demand_current(self, db: Database) -> None:
        """Check that the takeover is current, and keep it current until the transaction ends.

        Raises:
            TakeoverFenced: the takeover is over.
        """
        try:
            instances.demand_current(db, self.dead)
        except Fenced as error:
            raise TakeoverFenced(self.dead.instance) from error


def begin(db: Database, rules: TakeoverRules, instance: str) -> Takeover | None:
    """Begin the takeover of an instance; return None if the instance no longer needs one.

    The call waits for open transactions of the dead instance. Its later transactions are fenced.
    """
    condition, params = needs_takeover(db, rules)
    token, now = secrets.token_hex(16), db.dialect.now_us
    until = (
        "NULL"
        if rules.shares_workspaces
        else f"COALESCE(i.host_return_until, {now} + {round(rules.host_return_s * 1e6)})"
    )
    with db.transaction():
        db.fetch_one("SELECT 1 FROM instance_epoch WHERE name = ? FOR UPDATE", (instance,))
        if has_newer_words(db, instance):  # a replica of the newer version will take over
            return None
        # The statement checks the lease again, because the instance may have renewed it meanwhile.
        row = db.fetch_one(
            "UPDATE instance AS i SET epoch = i.epoch + 1, boot_token = ?, taken_over_by = ?,"
            f" taken_over_at = {now}, takeover_done_at = NULL, host_return_until = {until}"
            f" WHERE i.name = ? AND {condition}"
            f" RETURNING i.epoch, COALESCE(i.host_return_until, {now} + 1) <= {now}",
            (token, rules.owner.instance, instance, *params),
        )
        if row is None:
            return None
        epoch, host_lost = row
        db.execute(
            "UPDATE instance_epoch SET epoch = ?, boot_token = ? WHERE name = ?",
            (epoch, token, instance),
        )
    return Takeover(dead=Owner(instance, epoch, token), host_lost=bool(host_lost))


def finish(db: Database, takeover: Takeover, successor: Owner) -> None:
    """Record that a takeover is complete.

    It also makes the successor responsible for instances that the dead instance had taken over.
    """
    with db.transaction():
        takeover.demand_current(db)
        dead = takeover.dead
        db.execute(
            f"UPDATE instance SET takeover_done_at = {db.dialect.now_us}"
            " WHERE name = ? AND epoch = ? AND boot_token = ?",
            (dead.instance, dead.epoch, dead.boot_token),
        )
        db.execute(
            "UPDATE instance SET taken_over_by = ?"
            " WHERE taken_over_by = ? AND takeover_done_at IS NOT NULL",
            (successor.instance, dead.instance),
        )


def _deliveries(db: Database) -> str:
    """Return an SQL FROM clause: webhook deliveries of instances that a successor has taken over.

    Parameter: the successor's name.
    """
    return (
        "FROM webhook_delivery d JOIN instance i ON i.name = d.instance"
        f" WHERE i.taken_over_by = ? AND i.lease_until <= {db.dialect.now_us}"
    )


def has_deliveries(db: Database, successor: Owner) -> bool:
    """Return whether the successor's dead instances still have webhook deliveries."""
    return db.fetch_one(f"SELECT 1 {_deliveries(db)} LIMIT 1", (successor.instance,)) is not None


def take_deliveries(
    db: Database,
    successor: Owner,
    *,
    dead: str | None = None,
    stopping: Callable[[], bool],
    rows: int = DELIVERIES_AT_ONCE,
) -> int:
    """Move the webhook deliveries of the successor's dead instances to the successor.

    Args:
        dead: the name of the only instance whose deliveries are moved; None: all of them.
        rows: the most rows that one transaction moves.

    Returns:
        The number of deliveries that were moved.

    Raises:
        RecoveryInterrupted: `stopping` has returned True.
    """
    params: tuple[str, ...] = (successor.instance,)
    which = ""
    if dead is not None:
        params, which = (*params, dead), " AND i.name = ?"
    dead_names = f"SELECT i.name FROM instance i WHERE i.taken_over_by = ?{which}"
    found = f"SELECT d.id {_deliveries(db)}{which} LIMIT ?"
    taken = 0
    while True:
        if stopping():
            raise RecoveryInterrupted
        with db.transaction():
            # The lock makes a dead instance that starts wait until the commit; it then takes its
            # deliveries back. The next statement sees instances that started before the lock.
            db.fetch_all(
                f"SELECT 1 FROM instance_epoch WHERE name IN ({dead_names})"
                " ORDER BY name FOR SHARE",
                params,
            )
            count: int = db.execute(
                f"UPDATE webhook_delivery SET instance = ? WHERE id IN ({found})",
                (successor.instance, *params, rows),
            ).rowcount
        if not count:
            return taken
        taken += count
