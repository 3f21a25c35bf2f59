"""Two instances on one PostgreSQL database: one is dead, the other one takes it over."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from runrecovery_service.domain.reconciliation import Cause, Reconciliation
from runrecovery_service.domain.recovery_matrix import NOTHING, Fact
from runrecovery_service.domain.run import RestartPolicy, Run
from runrecovery_service.recovery.bulk_session_check import BulkSessionCheck
from runrecovery_service.recovery.reconcile import (
    DeadInstance,
    EndsLaunches,
    Leftovers,
    Recovery,
    RecoveryLimits,
)
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import instances, takeover
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.dead_instances import TakeoverRules
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.takeover import Takeover
from storage.service_store import Crash, ServiceStore, boot
from support.owner_history import HISTORY, STALE_WRITES
from support.recovery import FakeLaunchEnder, FakeTrustCleaner
from support.waiting import until

TTL_S: Final = 15.0
HOST_RETURN_S: Final = 3600.0

AGAIN: Final[dict[str, Any]] = {"restart_policy": RestartPolicy.REQUEUE, "max_attempts": 2}
RESUMES: Final[dict[str, Any]] = {
    "restart_policy": RestartPolicy.RESUME,
    "max_resumes": 2,
    "max_attempts": 2,
}

NO_LAUNCHES: Final = FakeLaunchEnder()
BLOCKED: Final = (
    "SELECT 1 FROM pg_locks w WHERE NOT w.granted"
    " AND pg_backend_pid() = ANY(pg_blocking_pids(w.pid))"
)


@dataclass
class Pair:
    """A dead instance `a` with its runs, and the instance `b`, which takes them over.

    Attributes:
        dead: the store as `a` uses it.
        db: the store as `b` uses it, with the guard of `b`.
    """

    dead: ServiceStore
    db: Database
    owner: Owner
    shares_workspaces: bool = False
    stop: StopSignal = field(default_factory=StopSignal)

    @property
    def rules(self) -> TakeoverRules:
        """How `b` takes over."""
        return TakeoverRules(
            owner=self.owner,
            shares_workspaces=self.shares_workspaces,
            lease_ttl_s=TTL_S,
            host_return_s=HOST_RETURN_S,
        )

    def third(self, name: str = "c") -> Pair:
        """Return a third instance, which can take over too."""
        db = Database(self.dead.db.peewee, self.dead.db.dialect, self.dead.db.name)
        owner = instances.claim(db, boot(name), now=self.dead.tick())
        db.guard(lambda on: instances.demand_current(on, owner))
        return replace(self, db=db, owner=owner)

    def begin(self, name: str = "a") -> Takeover:
        """Begin the takeover, which is due."""
        taken = takeover.begin(self.db, self.rules, name)
        assert taken is not None
        return taken

    def recover(self, taken: Takeover, *, batch_rows: int = 3, **changes: Any) -> Reconciliation:
        """Decide on the runs of the dead instance, and finish the takeover."""
        report = self.recovery(taken, batch_rows=batch_rows, **changes).run(
            self.db, RecoveryStatus()
        )
        takeover.finish(self.db, taken, self.owner)
        return report

    def recovery(
        self,
        taken: Takeover,
        *,
        batch_rows: int = 3,
        is_here: bool = False,
        launches: EndsLaunches = NO_LAUNCHES,
    ) -> Recovery:
        """Return the recovery of a takeover.

        Args:
            is_here: the launches of the dead instance were on the host of the successor.
        """
        away = Fact.ELSEWHERE | Fact.HOST_LOST if taken.host_lost else Fact.ELSEWHERE
        return Recovery(
            owner=self.owner,
            cause=Cause.TAKEOVER,
            clock=self.dead.ticking_clock,
            limits=RecoveryLimits(
                batch_rows=batch_rows,
                batch_s=5.0,
                safe_mode_after=5,
                safe_mode_window_s=600.0,
                reopen_window_s=3600.0,
            ),
            stop=self.stop,
            leftovers=Leftovers(
                launches=launches,
                sessions=BulkSessionCheck(checks={}, workspace=lambda *_: Path("/nowhere")),
                trust=FakeTrustCleaner(),
            ),
            dead=DeadInstance(
                owner=taken.dead,
                demand_current=taken.demand_current,
                is_here=lambda _: is_here,
                elsewhere=NOTHING if self.shares_workspaces else away,
            ),
        )

    def take_over(self, **changes: Any) -> Reconciliation:
        """Take over all runs of the dead instance."""
        return self.recover(self.begin(), **changes)

    def owners(self) -> list[tuple[Any, ...]]:
        """Return run, owner, epoch and status of every run."""
        return self.dead.rows("SELECT id, owner, owner_epoch, status FROM run ORDER BY id")

    def keep_history(self) -> None:
        """Record every change of a run from now on."""
        for statement in HISTORY:
            self.dead.db.execute(statement)

    def stale_writes(self) -> list[tuple[Any, ...]]:
        """Return the changes of runs that no current owner may have made."""
        return self.dead.rows(STALE_WRITES)

    def expire(self, name: str = "a") -> None:
        """Let the lease of an instance run out."""
        set_lease(self.dead.db, name, -1_000_000)


def set_lease(db: Database, name: str, left_us: int) -> None:
    """Set the end of a lease, relative to the clock of the database."""
    db.execute(
        f"UPDATE instance SET lease_until = {db.dialect.now_us} + ? WHERE name = ?",  # noqa: S608
        (left_us, name),
    )


def deliver(pair: Pair, run: Run, sequence: int, *, instance: str = "a") -> None:
    """Record an event of a run, which the webhook `w` has not got yet."""
    pair.dead.db.execute(
        "INSERT INTO webhook_delivery (webhook, instance, run, run_id, engine, sequence, event,"
        " status, created_at) VALUES ('w', ?, ?, ?, 'demo', ?, 'ENDED', 'FAILED', 1)",
        (instance, run.key, run.run_id, sequence),
    )


def make_pair(database: Database, **changes: Any) -> Pair:
    """Return a dead instance and its successor."""
    dead = instances.claim(database, boot("a"), now=ServiceStore.now)
    store = ServiceStore(db=database, owner=dead)
    db = Database(database.peewee, database.dialect, database.name)
    owner = instances.claim(db, boot("b"), now=store.tick())
    db.guard(lambda on: instances.demand_current(on, owner))
    return Pair(dead=store, db=db, owner=owner, **changes)


NewPair = Callable[..., Pair]


def rules_of(pair: Pair) -> list[tuple[Any, ...]]:
    """Return rule, owner and status of each run."""
    return pair.dead.rows(
        "SELECT COALESCE(recovery_reason, ''), owner, status FROM run ORDER BY id"
    )


def crash(*_: object, **__: object) -> None:
    raise Crash


def until_blocked(db: Database, thread: threading.Thread) -> None:
    """Wait until another session waits for a lock of this one, or the thread has ended."""
    until(
        lambda: not thread.is_alive() or db.fetch_all(BLOCKED),
        "the other transaction waits for a lock, or has ended",
    )
