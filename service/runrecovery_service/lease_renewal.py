"""Renews the lease of this instance and the tree deadline, and ends a service that lost its lease.

Process trees of agents have a deadline, which the shims enforce. Each renewal of the lease extends
this tree deadline. If renewals stop, the shims kill the trees before another instance takes over.
"""

from __future__ import annotations

import asyncio
from dataclasses import field
from typing import Final

import structlog

from runrecovery_service.domain.errors import Fenced, error_facts
from runrecovery_service.domain.start_errors import LeaseLost
from runrecovery_service.engines.catalog import Catalog
from runrecovery_service.execution.running_turns import RunningTurns
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.periodic import PeriodicTask
from runrecovery_service.renewal_note import RenewalNote
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import instances
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.commit_history import CommitHistory, LogPosition
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage_health import StorageHealthReporter

log = structlog.get_logger()

RENEWALS_PER_LEASE: Final = 5
"""How many renewals are made in `lease_ttl_s`."""
SELF_FENCE_SHARE: Final = 2 / 3
"""The share of `lease_ttl_s` after which a PostgreSQL instance stops if it could not renew. On
SQLite the file lock keeps others out, and a full disk is no reason to stop."""
RENEWAL_TRY_SHARE: Final = 0.3
"""The most time for one try to renew the lease, as a share of `lease_ttl_s`."""
TREES_BEFORE_LEASE_S: Final = 1.0
"""The time from the end of process trees to the end of the lease, if the lease is not renewed. An
instance that takes over then finds no process alive."""


def tree_deadline_ns(lease_ttl_s: float, renewed_ns: int) -> int:
    """Return the time at which process trees must end unless the lease is renewed again.

    Both times are nanoseconds of CLOCK_BOOTTIME, which also runs while the machine sleeps.

    Args:
        renewed_ns: when the last successful renewal began.
    """
    return renewed_ns + int((lease_ttl_s - TREES_BEFORE_LEASE_S) * 1e9)


@dataclass(slots=True, kw_only=True, eq=False)
class LeaseRenewal:
    """Renews the lease, and fences this service when another instance could own its runs.

    Attributes:
        catalog: the configured engines. Each renewal writes their names into the instance's row.
        note: writes each acknowledged renewal to disk, for the next start; None on SQLite.
        commits: the position up to which the database has acknowledged commits to this start.
        unrenewed: set when the lease could not be renewed for `SELF_FENCE_SHARE` of `lease_ttl_s`.
    """

    lease_ttl_s: float
    storage: Storage
    owner: Owner
    catalog: Catalog
    turns: RunningTurns
    health: StorageHealthReporter
    stop: StopSignal
    note: RenewalNote | None
    commits: CommitHistory = field(init=False)
    unrenewed: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop, init=False)
    _renewed_s: float = field(init=False)
    _last_try_s: float = field(init=False)
    _acknowledged_us: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.commits = CommitHistory(self.owner.instance, self.lease_ttl_s)
        self._renewed_s = self._last_try_s = self._now_ns() / 1e9

    @property
    def interval_s(self) -> float:
        """Seconds between two renewals while they succeed."""
        return self.lease_ttl_s / RENEWALS_PER_LEASE

    @property
    def left_s(self) -> float:
        """Seconds until the lease ends. Negative if it has ended."""
        return self._renewed_s + self.lease_ttl_s - self._now_ns() / 1e9

    def tasks(self) -> list[PeriodicTask]:
        """Return the loop of renewals and, on SQLite, the loop that extends the tree deadline."""
        renewal = PeriodicTask(
            name="lease-renewal",
            step=self.renew,
            interval_s=self.interval_s,
            failure_event="service.lease_not_renewed",
            stop_signal=self.stop,
            fatal=(Fenced, LeaseLost),
            retried=(),  # `renew` handles every error of the store
        )
        if self.storage.is_shared:
            return [renewal]
        # On SQLite a full disk makes renewals fail or hang. This must not end process trees.
        trees = PeriodicTask(
            name="tree-deadline",
            step=self._extend_tree_deadline,
            interval_s=self.interval_s,
            failure_event="service.defect",
            stop_signal=self.stop,
            retried=(),
        )
        return [renewal, trees]

    def demand_current(self, db: Database) -> LogPosition | None:
        """Check the epoch at the beginning of a transaction; stop the service if it is superseded.

        Without this check, only the next renewal would notice a new epoch or lost commits. Any
        thread may call this.

        Returns:
            The end of the write-ahead log; None if the database does not report positions.

        Raises:
            Fenced: a newer epoch of this instance has started.
            CommitsLost: the database lacks commits that it had acknowledged.
        """
        before = self.commits.acknowledged
        try:
            position = instances.demand_current(db, self.owner)
            if position is not None:
                self.commits.demand_kept(db, before, position)
        except Fenced as error:
            self._loop.call_soon_threadsafe(self.stop.fail, error)
            raise
        return position

    async def renew(self) -> float | None:
        """Try once to renew the lease, and return the pause until the next try; None: `interval_s`.

        Raises:
            Fenced: a newer epoch of this instance has started.
            CommitsLost: the database lacks commits that it had acknowledged.
            LeaseLost: the lease could not be renewed for too long, so that others can take it.
        """
        begun_ns = self._now_ns()
        begun_s = begun_ns / 1e9
        if begun_s - self._last_try_s > self.lease_ttl_s - TREES_BEFORE_LEASE_S:
            log.warning("service.stood_still", seconds=round(begun_s - self._last_try_s, 1))
        self._last_try_s = begun_s
        pause_s = None
        try:
            async with asyncio.timeout(self._try_limit_s(begun_s)):
                until_us = await self.storage.renew(
                    instances.renew,
                    self.owner,
                    ttl_s=self.lease_ttl_s,
                    acknowledged_us=self._acknowledged_us,
                    engines=self.catalog.names,
                )
        except Fenced:
            raise
        except Exception as error:  # noqa: BLE001 - whatever the error, the lease is not renewed
            log.warning("service.lease_not_renewed", **error_facts(error))
            self.health.note("lease", answers=False)
            pause_s = self.interval_s / 3
        else:
            self._note_renewed(begun_ns)
            if self.storage.is_shared:
                self._acknowledged_us = until_us
            if self.note is not None:
                self.note.keep(until_us)
        self._demand_recent_renewal()
        return pause_s

    def _try_limit_s(self, begun_s: float) -> float:
        # A connection can hang. The limit leaves time for a try on another connection.
        most_s = self.lease_ttl_s * RENEWAL_TRY_SHARE
        if not self.storage.is_shared:  # SQLite has no self-fencing, so a slow disk can recover
            return most_s
        left_s = self._renewed_s + self.lease_ttl_s * SELF_FENCE_SHARE - begun_s
        return min(max(0.1, left_s), most_s)

    def _note_renewed(self, begun_ns: int) -> None:
        self._renewed_s = begun_ns / 1e9
        if self.storage.is_shared:
            self.turns.heartbeat(tree_deadline_ns(self.lease_ttl_s, begun_ns))
        self.health.note("lease", answers=True)
        self.unrenewed.clear()

    def _demand_recent_renewal(self) -> None:
        self_fence_s = self.lease_ttl_s * SELF_FENCE_SHARE
        if self._now_ns() / 1e9 - self._renewed_s <= self_fence_s:
            return
        self.unrenewed.set()
        if self.storage.is_shared:
            self.storage.abandon()  # otherwise calls that wait for an answer would never return
            raise LeaseLost(self.owner.instance, self_fence_s)

    async def _extend_tree_deadline(self) -> None:
        self.turns.heartbeat(tree_deadline_ns(self.lease_ttl_s, self._now_ns()))

    def _now_ns(self) -> int:
        return self.turns.tree_deadline.now_ns()
