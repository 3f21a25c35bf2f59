"""Replicas with one thing broken, without a change of their files.

python replica_mutants.py NAME PYTHON -m runrecovery_service serve …
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final


def fence_by_exists() -> None:
    """Check the epoch by a plain read of another row, and no epoch and version in the run's row."""
    from runrecovery_service.domain.errors import Fenced
    from runrecovery_service.storage import instances, runs
    from runrecovery_service.storage.database import Stale

    def demand_current(db: Any, owner: Any) -> None:
        found = db.fetch_one(
            "SELECT 1 WHERE EXISTS (SELECT 1 FROM instance_epoch"
            " WHERE name = ? AND epoch = ? AND boot_token = ?)",
            (owner.instance, owner.epoch, owner.boot_token),
        )
        if found is None:
            raise Fenced(owner.instance)

    def compare_and_set(db: Any, run: Any, _: Any, columns: Any) -> None:
        assignments = ", ".join(f"{name} = ?" for name in columns)
        changed = db.execute(
            f"UPDATE run SET {assignments} WHERE id = ?",  # noqa: S608 - the service's own names
            (*columns.values(), run.key),
        ).rowcount
        if changed != 1:
            raise Stale
        db.mark_changed(run.key)

    instances.demand_current = demand_current
    runs._compare_and_set = compare_and_set  # type: ignore[assignment]


def take_again_in_drain() -> None:
    """Take queued runs of peers again after the hand-over of a stop."""
    from runrecovery_service.recovery.hand_over import HandOver
    from runrecovery_service.storage import work_stealing

    hand_over = HandOver.run

    def hand_over_and_take(self: Any, db: Any) -> None:
        hand_over(self, db)
        row = db.fetch_one("SELECT engines FROM instance WHERE name = ?", (self.owner.instance,))
        taker = work_stealing.Taker(
            owner=self.owner,
            engines=json.loads(row[0]),
            shares_workspaces=self.shares_workspaces,
        )
        now, steady = self.clock.now(), self.clock.steady()
        while (peer := work_stealing.find_peer(db, taker, now=now)) is not None:
            if work_stealing.take_from(db, taker, peer, now=now, steady=steady) is None:
                break

    HandOver.run = hand_over_and_take  # type: ignore[method-assign]


def trust_from_the_answer() -> None:
    """Trust the lease from the answer to its renewal, and not from the renewal's start."""
    from runrecovery_service.lease_renewal import LeaseRenewal
    from runrecovery_service.process.boot_clock import boot_time_ns

    note_renewed = LeaseRenewal._note_renewed

    def note_renewed_now(self: LeaseRenewal, begun_ns: int) -> None:
        note_renewed(self, max(begun_ns, boot_time_ns()))

    LeaseRenewal._note_renewed = note_renewed_now  # type: ignore[method-assign]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A broken replica, and how the campaign must detect it.

    Attributes:
        kind: the kind of violation that the mutant causes.
        fault: the fault that provokes the violation: a method of `Faults`.
        lease_ttl_s: the time of a lease in which the violation shows.
    """

    break_service: Callable[[], None]
    kind: str
    fault: str
    lease_ttl_s: float = 3.0


MUTANTS: Final = {
    "exists": Mutant(
        break_service=fence_by_exists, kind="stale write", fault="freeze_in_transaction"
    ),
    "drain": Mutant(
        break_service=take_again_in_drain, kind="taken while stopping", fault="stop_with_queues"
    ),
    "renewal": Mutant(
        break_service=trust_from_the_answer,
        kind="agent outlived its lease",
        fault="freeze_after_slow_renewal",
        lease_ttl_s=12.0,  # a renewal may take 3.6 s then, and agents end 1 s before the lease
    ),
}

if __name__ == "__main__":
    from runrecovery_service.cli import main

    name, _, _, _, *arguments = sys.argv[1:]  # of the service: python -m runrecovery_service
    MUTANTS[name].break_service()
    main(arguments)
