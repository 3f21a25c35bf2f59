"""The order of a start and of a stop."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import Final

import structlog

from runrecovery_service.background_work import BackgroundWork
from runrecovery_service.clock import loop_time_s
from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.errors import Fenced, StorageUnavailable, error_facts, is_outage
from runrecovery_service.domain.reconciliation import Reconciliation
from runrecovery_service.domain.start_errors import LeaseLost, StoreLost
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.listeners import Listeners
from runrecovery_service.lost_commits import forget_loss
from runrecovery_service.ownership import Ownership
from runrecovery_service.recovery_runner import RecoveryRunner
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.signal_handlers import Control
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import backup
from runrecovery_service.storage.database import Database

log = structlog.get_logger()

FINISH_POLL_S: Final = 0.1
STEP_S: Final = 30.0
"""Time limit of one step of a stop, on top of the grace that is configured for the step."""


@contextmanager
def store_kept(db: Database) -> Iterator[None]:
    """After the block, check that the store's files still exist, before the last connection closes.

    Raises:
        StoreLost: a file is lost; a copy was made if possible. An error that the block raised is
            the cause.
    """
    ended_by: BaseException | None = None
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - raised below, or the cause of the raised error
        ended_by = error
    lost = ended_by if isinstance(ended_by, StoreLost) else _store_lost(db)
    if lost is None:
        if ended_by is not None:
            raise ended_by
        return
    lost.copy = str(backup.rescue(db) or "") or None
    if ended_by is None or ended_by is lost:
        raise lost
    log.error("service.ended_by", error=type(ended_by).__name__, reason=str(ended_by))
    raise lost from ended_by


def _store_lost(db: Database) -> StoreLost | None:
    try:
        db.demand_in_place()
    except StoreLost as error:
        return error
    except OSError:  # the system does not report whether the files exist
        pass
    return None


@dataclass(slots=True, kw_only=True, eq=False)
class Service:
    """Everything that one start has built: runs the service, and stops it in order."""

    settings: Settings
    stop: StopSignal
    gate: Gate
    control: Control
    listeners: Listeners
    ownership: Ownership
    recovery_runner: RecoveryRunner
    work: BackgroundWork

    async def run(self) -> None:
        """Bind, recover, serve until a stop, and stop in order.

        Raises:
            Exception: the error that stopped the service. A signal raises nothing.
        """
        self.control.start()
        self.ownership.start()
        try:
            await self.listeners.bind(keeper_ended=self.stop.task_ended)
            await self.recovery_runner.report_containment(self.settings.containment)
            report = await self.recovery_runner.recover()
            if report is not None and not self.stop.is_set():
                self._serve(report)
            await self.stop.wait()
        finally:
            await self._shut_down()
            await self.control.stop()
        if self.stop.failure is not None:
            raise self.stop.failure

    def _serve(self, report: Reconciliation) -> None:
        forget_loss(self.settings.data_dir)
        self.gate.open(safe_mode=report.safe_mode)
        log.info("service.serving", epoch=self.ownership.owner.epoch)
        self.work.start(safe_mode=report.safe_mode)

    # -- the stop ------------------------------------------------------------------------------

    async def _shut_down(self) -> None:
        """Drain, end processes, decide on runs, release the lease.

        The lease is renewed until the last process tree has ended: without renewals the trees'
        deadline would kill them.
        """
        await self._drain()
        await self._stop_calls()
        for sweep in self.work.sweeps:
            await _step(sweep.name, sweep.sweeper.stop(), grace_s=sweep.stop_grace_s)
        if self.stop.failure is None and self.gate.recovered:
            # No time limit, because there may be many runs. A store that does not answer ends the
            # step.
            await _step("runs", self._decide_on_runs(), grace_s=math.inf)
        await self._stop_processes()
        await _step("webhooks", self.work.webhooks.stop())  # after the last run has ended
        await _step("renewals", self.ownership.stop_tasks())
        await _step("threads", asyncio.to_thread(self.work.threads.shutdown))
        if not isinstance(self.stop.failure, Fenced | LeaseLost | StoreLost):
            await _step("lease", self.ownership.resign())
        await _step("probe", self.listeners.stop_probes())
        await _step("metrics", self.listeners.stop_metrics())
        await _step("storage", asyncio.to_thread(self.ownership.storage.close))
        log.info("service.stopped", epoch=self.ownership.owner.epoch)

    async def _drain(self) -> None:
        """Launch nothing more, await turns, refuse changes, and let load balancers notice."""
        begun_s = loop_time_s()
        self.work.dispatcher.pause()  # a queued run can survive the stop, a new process cannot
        await self._let_turns_end()
        self.gate.drain()
        await _step("deadlines", self.work.deadlines.stop())
        if self.stop.failure is not None:
            # Another instance may own the runs already, so processes and deliveries end first.
            await asyncio.gather(
                self._stop_processes(), _step("webhooks", self.work.webhooks.stop())
            )
        elif self.gate.recovered:  # else no load balancer has ever sent calls
            await asyncio.sleep(self.settings.drain_delay_s - (loop_time_s() - begun_s))

    async def _let_turns_end(self) -> None:
        """Wait up to `finish_s` seconds until the turns under way have ended.

        Meanwhile the service accepts replies and cancels, and carries out deadlines.
        """
        work, end_s = self.work.dispatcher, loop_time_s() + self.settings.finish_s
        if not self.settings.finish_s or self.stop.failure is not None or not work.at_work:
            return
        self.gate.finish()
        log.info("service.finishing", turns=work.at_work, finish_s=self.settings.finish_s)
        while work.at_work and loop_time_s() < end_s and self.stop.failure is None:  # noqa: ASYNC110 - three conditions have no common event
            await asyncio.sleep(FINISH_POLL_S)
        log.info("service.finished", turns_left=work.at_work)

    async def _stop_calls(self) -> None:
        self.gate.close()
        grace_s = self.settings.stop_grace_s
        await _step("server", self.listeners.stop_calls(grace_s=grace_s), grace_s=grace_s)
        await _step("reload", self.control.stop_reloads())

    async def _stop_processes(self) -> None:
        grace_s = self.settings.cancel_grace_s * 2
        await _step("processes", self.work.dispatcher.stop(), grace_s=grace_s)

    async def _decide_on_runs(self) -> None:
        """End all processes and record a decision on every run, as the next start would.

        Raises:
            StorageUnavailable: the store did not answer in time; the next start makes the
                decisions.
        """
        await self.work.dispatcher.detach()
        deciding = asyncio.create_task(self.recovery_runner.decide_at_stop())
        unrenewed = asyncio.create_task(self.ownership.lease.unrenewed.wait())
        await asyncio.wait({deciding, unrenewed}, return_when=asyncio.FIRST_COMPLETED)
        unrenewed.cancel()
        if not deciding.done():
            deciding.cancel()
            raise StorageUnavailable
        await deciding
        await self.work.dispatcher.release()


async def _step(name: str, work: Awaitable[object], *, grace_s: float = 0.0) -> None:
    """Do one step of a stop. A step that fails or hangs does not prevent the others."""
    limit = asyncio.timeout(None if grace_s == math.inf else grace_s + STEP_S)
    try:
        async with limit:
            await work
    except Exception as error:  # the service ends; the next start recovers what is left
        late = {"cause": "the step did not end in time"} if limit.expired() else {}
        log.error(  # noqa: TRY400 - an outage and a late step need no traceback
            "service.stop_step_failed",
            step=name,
            **(error_facts(error) | late),
            exc_info=not (late or is_outage(error)),
        )
