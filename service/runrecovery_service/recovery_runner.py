"""Runs the recovery of a start, with its retries, and the recovery of a planned stop."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from typing import Final

import structlog

from runrecovery_service.config.settings import ContainmentPolicy
from runrecovery_service.domain.errors import Fenced, error_facts, is_outage
from runrecovery_service.domain.reconciliation import Containment, Reconciliation
from runrecovery_service.domain.start_errors import (
    ContainmentRefused,
    RecoveryGaveUp,
    RecoveryInterrupted,
)
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.periodic import Backoff
from runrecovery_service.recovery.hand_over import HandOver
from runrecovery_service.recovery.reconcile import Recovery
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database

log = structlog.get_logger()

RECOVERY_BACKOFF_MOST_S: Final = 30.0


@dataclass(slots=True, kw_only=True, eq=False)
class RecoveryRunner:
    """Runs the recovery of this start until it succeeds, and the recovery of a planned stop.

    Attributes:
        hand_over: hands runs over at a planned stop; None: there are no peers.
        tries: how many recoveries in a row may fail before the service ends.
    """

    storage: Storage
    at_start: Recovery
    at_stop: Recovery
    hand_over: HandOver | None
    status: RecoveryStatus
    gate: Gate
    stop: StopSignal
    tries: int
    backoff: Backoff

    async def report_containment(self, policy: ContainmentPolicy) -> None:
        """Log the containment that the probe has found. Policy `strict` refuses a low level."""
        probe = self.status.probe
        if probe is None:
            return
        if policy is not ContainmentPolicy.STRICT:
            probe.add_done_callback(_log_containment)
            return
        proved = await asyncio.wrap_future(probe)
        _log_containment(probe)
        if not proved.level.is_strict:
            reason = f'containment = "strict", but only {proved.level} was proved: {proved.detail}'
            self.stop.fail(ContainmentRefused(reason))

    async def recover(self) -> Reconciliation | None:
        """Recover with retries, and return the report; None if the service is stopping."""
        for tries_left in reversed(range(self.tries)):
            if self.stop.is_set():
                return None
            try:
                return await self.storage.run_exclusive(
                    lambda db: self.at_start.run(db, self.status)
                )
            except RecoveryInterrupted:
                return None
            except Fenced as error:
                self.stop.fail(error)
                return None
            except Exception as error:  # noqa: BLE001 - logged; the service stays NOT_SERVING, and retries
                self._report_failure(error, tries_left)
                last = ": ".join(error_facts(error).values())
            if tries_left and not await self.stop.wait_within(self.backoff.next_s()):
                self.gate.set_recovering()
        if not self.stop.is_set():
            self.stop.fail(RecoveryGaveUp(self.tries, last))
        return None

    def _report_failure(self, error: Exception, tries_left: int) -> None:
        log.error(
            "recovery.try_failed",
            tries_left=tries_left,
            **error_facts(error),
            exc_info=not is_outage(error),
        )
        self.gate.set_recovery_failed()

    async def decide_at_stop(self) -> None:
        """Decide on every run, as the next start would.

        Runs that peers can continue are handed over before and after the decisions. Before, because
        the decisions fail a queued run whose policy is FAIL. After, because the decisions queue
        further runs.
        """
        await self.storage.run_exclusive(self._decide_at_stop)

    def _decide_at_stop(self, db: Database) -> None:
        if self.hand_over is not None:
            self.hand_over.run(db)
        self.at_stop.run(db, RecoveryStatus())
        if self.hand_over is not None:
            self.hand_over.run(db)


def _log_containment(probe: Future[Containment]) -> None:
    if probe.cancelled():
        return
    proved = probe.result()
    if proved.level.is_strict:
        log.info("service.containment", proved=proved.level.value, detail=proved.detail)
    else:
        log.warning("service.containment", proved=proved.level.value, detail=proved.detail)
