"""Takes over dead instances while this service serves. PostgreSQL only.

An instance is dead once its lease has ended by the database's clock. A takeover decides on its runs
as a restart would, in a separate report. `storage/takeover.py` has the SQL.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import field, replace
from typing import Final, TypeVar

import structlog

from runrecovery_service.domain.errors import Fenced, error_facts, is_outage
from runrecovery_service.domain.reconciliation import Reconciliation
from runrecovery_service.domain.recovery_matrix import NOTHING, Fact
from runrecovery_service.domain.start_errors import RecoveryInterrupted
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.metric_counters import Meters
from runrecovery_service.periodic import PeriodicTask
from runrecovery_service.recovery.reconcile import DeadInstance, Recovery
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import dead_instances, takeover
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.dead_instances import TakeoverRules
from runrecovery_service.storage.launch_records import LaunchRecord
from runrecovery_service.storage.newer_words import has_newer_words
from runrecovery_service.storage.takeover import Takeover, TakeoverFenced

R = TypeVar("R")

log = structlog.get_logger()

SEARCHES_PER_LEASE: Final = 5
"""The number of searches for dead instances in `lease_ttl_s`."""


@dataclass(slots=True, kw_only=True, eq=False)
class TakeoverLoop:
    """Searches for dead instances and takes them over, until it is stopped.

    Attributes:
        recovery: the template for the recovery of each takeover, which sets `dead`.
        engines: returns the names of the engines configured on this instance.
        is_here: returns whether a launch was made on this host during this boot.
        on_taken: called after each takeover, which may have queued runs of this instance.
    """

    storage: Storage
    rules: TakeoverRules
    recovery: Recovery
    engines: Callable[[], Collection[str]]
    is_here: Callable[[LaunchRecord], bool]
    on_taken: Callable[[], object]
    meters: Meters
    stop_signal: StopSignal
    _loop: PeriodicTask = field(init=False)
    _refused: set[str] = field(default_factory=set, init=False)
    _is_deciding: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for outcome in ("completed", "failed", "fenced"):
            self.meters.takeovers.show_zero(outcome)
        self._loop = PeriodicTask(
            name="takeover",
            step=self.search,
            interval_s=self.rules.lease_ttl_s / SEARCHES_PER_LEASE,
            failure_event="takeover.search_failed",
            stop_signal=self.stop_signal,
            first_wait_s=0.0,
        )

    def start(self) -> None:
        """Start the searches."""
        self._loop.start()

    async def stop(self) -> None:
        """Stop the searches. Interrupt a takeover that is under way; a later search continues it.

        A search is cancelled at once, because the database does not always answer.
        """
        await (self._loop.finish() if self._is_deciding else self._loop.cancel())

    @property
    def _is_stopping(self) -> bool:
        return self._loop.is_stopping or self.stop_signal.is_set()

    async def search(self) -> None:
        """Take over every dead instance. A failed takeover does not delay the others.

        Afterwards take the webhook deliveries that peers have recorded for dead instances
        meanwhile. A failure of this step delays no takeover.

        Raises:
            Fenced: a newer epoch of this service has started.
        """
        for name in await self.storage.read(dead_instances.find_dead, self.rules):
            if self._is_stopping:
                return
            try:
                await self._take_over(name)
            except RecoveryInterrupted:
                return
            except Fenced:
                raise
            except Exception as error:  # the next search repeats this takeover
                self.meters.takeovers.add("failed")
                log.error(  # noqa: TRY400 - an outage needs no traceback
                    "takeover.failed",
                    recovered_instance=name,
                    **error_facts(error),
                    exc_info=not is_outage(error),
                )
        if await self.storage.read(takeover.has_deliveries, self.rules.owner):
            with suppress(RecoveryInterrupted):
                await self._decide(self._take_deliveries)

    async def _take_over(self, name: str) -> None:
        if not await self._can_decide(name):
            return
        taken = await self.storage.write_own(takeover.begin, self.rules, name)
        if taken is None:
            return
        log.warning(
            "takeover.started",
            recovered_instance=name,
            recovered_epoch=taken.dead.epoch,
            host_lost=taken.host_lost,
        )
        try:
            report = await self._decide(lambda db: self._recover(db, taken))
        except TakeoverFenced:
            self.meters.takeovers.add("fenced")
            log.warning("takeover.fenced", recovered_instance=name)
            return
        finally:
            self.on_taken()
        self.meters.takeovers.add("completed")
        for decided in report.decisions:
            self.meters.takeover_runs.add(decided.rule, many=decided.count)
        log.info("takeover.completed", recovered_instance=name, runs=report.runs_scanned)

    async def _decide(self, work: Callable[[Database], R]) -> R:
        """Run work that checks `_is_stopping`. `stop` does not cancel it, but waits for it."""
        self._is_deciding = True
        try:
            return await self.storage.run_exclusive(work)
        finally:
            self._is_deciding = False

    async def _can_decide(self, name: str) -> bool:
        """Return whether this service has the engines of the runs, and knows every stored value."""
        missing = await self.storage.read(dead_instances.engines_of, name) - set(self.engines())
        is_newer = await self.storage.read(has_newer_words, name)
        if not missing and not is_newer:
            self._refused.discard(name)
            return True
        if name not in self._refused:
            self._refused.add(name)
            log.warning(
                "takeover.refused",
                recovered_instance=name,
                engines=sorted(missing),
                newer_version=is_newer,
            )
        return False

    def _recover(self, db: Database, taken: Takeover) -> Reconciliation:
        """Take the webhook deliveries of the dead instance, then decide on its runs.

        This order makes a webhook receive the events of each run in sequence.
        """
        self._take_deliveries(db, taken.dead.instance)
        dead = DeadInstance(
            owner=taken.dead,
            demand_current=taken.demand_current,
            is_here=self.is_here,
            elsewhere=self._elsewhere(taken),
        )
        report = replace(self.recovery, dead=dead).run(db, RecoveryStatus())
        takeover.finish(db, taken, self.rules.owner)
        return report

    def _take_deliveries(self, db: Database, dead: str | None = None) -> int:
        return takeover.take_deliveries(
            db, self.rules.owner, dead=dead, stopping=lambda: self._is_stopping
        )

    def _elsewhere(self, taken: Takeover) -> Fact:
        if self.rules.shares_workspaces:
            return NOTHING
        return Fact.ELSEWHERE | Fact.HOST_LOST if taken.host_lost else Fact.ELSEWHERE
