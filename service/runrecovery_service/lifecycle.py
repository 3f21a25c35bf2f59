"""The order of a start and of a stop, and what the service does at each signal."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import monotonic
from typing import TYPE_CHECKING, Final

import structlog

from runrecovery_service import early_signals
from runrecovery_service.background_stream import drain_stderr
from runrecovery_service.config.settings import ContainmentPolicy, Settings
from runrecovery_service.disk_floor import DiskFloor
from runrecovery_service.domain.errors import Fenced, StorageUnavailable, error_facts, is_outage
from runrecovery_service.domain.reconciliation import Containment, Reconciliation
from runrecovery_service.domain.start_errors import (
    ContainmentRefused,
    LeaseLost,
    RecoveryGaveUp,
    RecoveryInterrupted,
    StoreLost,
)
from runrecovery_service.execution.deadlines import Deadlines
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.execution.straggler_sweep import StragglerSweep
from runrecovery_service.execution.trust_sweep import TrustSweep
from runrecovery_service.ownership import Ownership
from runrecovery_service.periodic import Backoff
from runrecovery_service.process import prctl
from runrecovery_service.recovery.reconcile import Recovery
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.reload import Reloader
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.listen_address import bound_address
from runrecovery_service.rpc.server import GrpcServer
from runrecovery_service.steady_thread_pool import SteadyThreadPool
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import backup
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.systemd import SystemdNotifier
from runrecovery_service.webhooks.webhooks import Webhooks

if TYPE_CHECKING:  # the imports would slow down starts without these features
    from runrecovery_service.metrics.http_server import MetricsServer
    from runrecovery_service.retention.sweep import RetentionSweep
    from runrecovery_service.spans import Tracer

log = structlog.get_logger()

RECOVERY_BACKOFF_MOST_S: Final = 30.0
TWICE_REPORTED_S: Final = 0.05
"""How long after its start the loop may report a signal that was held already."""
HANG_UP_SETTLES_S: Final = 0.5
"""How long after SIGHUP the system takes the terminal away, if the terminal was closed."""
FINISH_POLL_S: Final = 0.1
STEP_S: Final = 30.0
"""The most that a step of a stop may take, on top of the graces that are configured for it."""


def prepare_process() -> None:
    """Protect this process from its agents, and handle its signals from now on."""
    if sys.platform == "linux":
        prctl.hide()  # agents of the same user must not open the service's ends of shim pipes
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # the parent may have blocked signals
    early_signals.exit_at_once(serves=True)


@contextmanager
def store_kept(db: Database) -> Iterator[None]:
    """Check the files of the store before the last connection is closed, however the service ends.

    Raises:
        StoreLost: a file is lost; a copy was made, if that was possible. The error that ended the
            service before is the cause.
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
    except OSError:  # the system does not say whether the files are in place
        pass
    return None


# -- signals -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Signals:
    """The signal handlers of a running service."""

    stop: StopSignal
    request_reload: Callable[[], bool]
    _stops_requested: int = 0
    _were_held: set[int] = field(default_factory=set)
    _had_terminal: bool = field(default_factory=early_signals.had_terminal)

    def handle(self) -> None:
        """Install the handlers, and handle the signals that came before."""
        loop = asyncio.get_running_loop()
        for number in early_signals.STOP_SIGNALS:
            loop.add_signal_handler(number, self._receive_stop, number)
        for number in early_signals.HARMLESS_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                loop.add_signal_handler(number, self._receive_harmless, number)
        for kept in early_signals.take_held():
            stops = kept in early_signals.STOP_SIGNALS
            (self._request_stop if stops else self._receive_harmless)(kept)
            self._were_held.add(kept)
        loop.call_later(TWICE_REPORTED_S, self._were_held.clear)

    def _receive_stop(self, number: int) -> None:
        """Handle a stop signal, unless it was held already.

        The loop's descriptor receives signals a moment before the loop's handlers replace the
        holding ones. A signal in between is reported by both, and must count once.
        """
        if number in self._were_held:
            self._were_held.discard(number)
        else:
            self._request_stop(number)

    def _request_stop(self, number: int) -> None:
        self._stops_requested += 1
        times = self._stops_requested
        log.info("service.stop_asked", signal=signal.Signals(number).name, times=times)
        if times > 1:
            drain_stderr()
            os._exit(128 + number)  # at once; the next start recovers what is left
        self.stop.request()

    def _receive_harmless(self, number: int) -> None:
        """Reload at SIGHUP, unless it says that the terminal was closed. Ignore other signals."""
        if number != signal.SIGHUP:
            log.info("service.signal_ignored", signal=signal.Signals(number).name)
        elif self._had_terminal:
            asyncio.get_running_loop().call_later(HANG_UP_SETTLES_S, self._stop_if_hung_up)
        else:
            self._reload()

    def _reload(self) -> None:
        if not self.request_reload():
            log.info("service.signal_ignored", signal=signal.SIGHUP.name)

    def _stop_if_hung_up(self) -> None:
        """Stop a service whose terminal was closed: no user could see it or press Ctrl-C."""
        if early_signals.has_terminal():
            self._reload()
        elif not self.stop.is_set():
            # Not counted: a single SIGTERM that follows must not cut the stop short.
            times = self._stops_requested
            log.info("service.stop_asked", signal=signal.SIGHUP.name, times=times)
            self.stop.request()


# -- recovery ----------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True, eq=False)
class RecoveryRunner:
    """The recovery of this start, with its retries, and the recovery of a planned stop.

    Attributes:
        tries: failed recoveries after which the service ends.
    """

    storage: Storage
    at_start: Recovery
    at_stop: Recovery
    status: RecoveryStatus
    gate: Gate
    stop: StopSignal
    tries: int
    backoff: Backoff

    async def recover(self) -> Reconciliation | None:
        """Recover, and return the report; None if the service is to stop instead."""
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
        """Decide on every run, as the next start would."""
        await self.storage.run_exclusive(lambda db: self.at_stop.run(db, RecoveryStatus()))


# -- the service -------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True, eq=False)
class BackgroundWork:
    """What launches, follows and cleans up the processes of runs while the service serves."""

    dispatcher: Dispatcher
    straggler_sweep: StragglerSweep
    deadlines: Deadlines
    trust_sweep: TrustSweep
    retention: RetentionSweep | None
    disk_floor: DiskFloor | None
    threads: SteadyThreadPool
    webhooks: Webhooks

    def start(self, *, safe_mode: bool) -> None:
        """Start sweeps and webhooks; outside safe mode also all that changes or removes runs."""
        self.straggler_sweep.start()
        self.trust_sweep.start()
        if self.disk_floor is not None:
            self.disk_floor.start()
        self.webhooks.start()
        if not safe_mode:
            self.dispatcher.start()
            self.deadlines.start()
            if self.retention is not None:
                self.retention.start()


@dataclass(slots=True, kw_only=True, eq=False)
class Service:
    """A service of one start: runs it, and stops it in order.

    Attributes:
        max_connections: client connections at one time, for the log.
        probe: answers health checks on an address of their own.
        metrics: answers scrapes; None: metrics are off.
        tracer: sends spans; None: traces are off.
    """

    settings: Settings
    stop: StopSignal
    gate: Gate
    server: GrpcServer
    ownership: Ownership
    recovery_runner: RecoveryRunner
    work: BackgroundWork
    systemd: SystemdNotifier
    reloader: Reloader
    max_connections: int
    probe: GrpcServer | None
    metrics: MetricsServer | None
    tracer: Tracer | None

    async def run(self) -> None:
        """Bind, recover, serve until a stop, and stop in order.

        Raises:
            Exception: the error that stopped the service, if not a signal did.
        """
        Signals(self.stop, self.reloader.request).handle()
        self.systemd.start()
        self.reloader.start()
        self.ownership.start()
        try:
            await self._listen()
            await self._report_containment()
            report = await self.recovery_runner.recover()
            if report is not None and not self.stop.is_set():
                self._serve(report)
            await self.stop.wait()
        finally:
            await self._shut_down()
            await self.systemd.stop()
        if self.stop.failure is not None:
            raise self.stop.failure

    async def _listen(self) -> None:
        ended = self.stop.task_ended
        listen, probe_listen = self.settings.listen, self.settings.probe_listen
        address = bound_address(listen, await self.server.bind(listen, keeper_ended=ended))
        more: dict[str, str] = {}
        if self.probe is not None:
            port = await self.probe.bind(probe_listen, keeper_ended=ended)
            more["probe_address"] = bound_address(probe_listen, port)
        if self.metrics is not None:
            port = await self.metrics.bind(self.settings.metrics_listen)
            more["metrics_address"] = bound_address(self.settings.metrics_listen, port)
        log.info("service.listening", address=address, max_connections=self.max_connections, **more)

    async def _report_containment(self) -> None:
        """Log what the probe proved. Policy `strict` refuses the start if that is too little."""
        probe = self.recovery_runner.status.probe
        if probe is None:
            return
        if self.settings.containment is not ContainmentPolicy.STRICT:
            probe.add_done_callback(_log_containment)
            return
        proved = await asyncio.wrap_future(probe)
        _log_containment(probe)
        if not proved.level.is_strict:
            reason = f'containment = "strict", but only {proved.level} was proved: {proved.detail}'
            self.stop.fail(ContainmentRefused(reason))

    def _serve(self, report: Reconciliation) -> None:
        self.gate.open(safe_mode=report.safe_mode)
        log.info("service.serving", epoch=self.ownership.owner.epoch)
        self.work.start(safe_mode=report.safe_mode)

    # -- the stop ------------------------------------------------------------------------------

    async def _shut_down(self) -> None:
        """Drain, end processes, decide on runs, release the lease.

        The lease is renewed, and process trees live, until the last tree was ended in order.
        """
        grace_s, stop_grace_s = self.settings.cancel_grace_s, self.settings.stop_grace_s
        work = self.work
        begun_s = monotonic()
        work.dispatcher.pause()  # queued runs may survive the stop; a launched one would not
        await self._let_turns_end()
        self.gate.drain()
        await self._step("deadlines", work.deadlines.stop())
        if self.stop.failure is not None:
            # Another instance may own the runs already: first our processes and deliveries end.
            await asyncio.gather(
                self._step("processes", work.dispatcher.stop(), grace_s=grace_s * 2),
                self._step("webhooks", work.webhooks.stop()),
            )
        elif self.gate.recovered:  # before, health was NOT_SERVING: no load balancer sends calls
            await asyncio.sleep(self.settings.drain_delay_s - (monotonic() - begun_s))
        self.gate.close()
        await self._step("server", self.server.stop(grace_s=stop_grace_s), grace_s=stop_grace_s)
        await self._step("reload", self.reloader.stop())
        await self._step("patrol", work.straggler_sweep.stop(), grace_s=grace_s)
        await self._step("trust", work.trust_sweep.stop())
        if work.disk_floor is not None:
            await self._step("disk", work.disk_floor.stop())
        if work.retention is not None:
            await self._step("retention", work.retention.stop())
        if self.stop.failure is None and self.gate.recovered:
            # Without a time limit: there may be many runs. But the store has to answer.
            await self._step("runs", self._decide_on_runs(), grace_s=math.inf)
        await self._step("processes", work.dispatcher.stop(), grace_s=grace_s * 2)
        await self._step("webhooks", work.webhooks.stop())  # after the last end of a run
        await self.ownership.stop_tasks()
        await self._step("threads", asyncio.to_thread(work.threads.shutdown))
        if not isinstance(self.stop.failure, Fenced | LeaseLost | StoreLost):
            await self._step("lease", self.ownership.resign())
        if self.probe is not None:
            await self._step("probe", self.probe.stop(grace_s=0.0))
        if self.metrics is not None:
            await self._step("metrics", self.metrics.stop())
        if self.tracer is not None:
            await self._step("traces", self.tracer.stop())
        await self._step("storage", asyncio.to_thread(self.ownership.storage.close))
        log.info("service.stopped", epoch=self.ownership.owner.epoch)

    async def _let_turns_end(self) -> None:
        """Wait until the turns under way have ended, for `finish_s` at most.

        Replies and cancels are accepted meanwhile, and deadlines carried out.
        """
        work, end_s = self.work.dispatcher, monotonic() + self.settings.finish_s
        if not self.settings.finish_s or self.stop.failure is not None or not work.at_work:
            return
        self.gate.finish()
        log.info("service.finishing", turns=work.at_work, finish_s=self.settings.finish_s)
        while work.at_work and monotonic() < end_s and self.stop.failure is None:  # noqa: ASYNC110 - three conditions have no common event
            await asyncio.sleep(FINISH_POLL_S)
        log.info("service.finished", turns_left=work.at_work)

    async def _decide_on_runs(self) -> None:
        """End all processes and record a decision on every run, as the next start would.

        Raises:
            StorageUnavailable: the store did not answer for too long; the next start decides.
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

    async def _step(self, name: str, work: Awaitable[object], *, grace_s: float = 0.0) -> None:
        """Do one step of the stop. A step that fails does not prevent the others."""
        try:
            async with asyncio.timeout(None if grace_s == math.inf else grace_s + STEP_S):
                await work
        except TimeoutError as error:
            log.error("service.stop_step_failed", step=name, **error_facts(error))  # noqa: TRY400 - no defect
        except Exception as error:  # the service ends; the next start recovers what is left
            log.error(  # noqa: TRY400 - an outage needs no traceback
                "service.stop_step_failed",
                step=name,
                **error_facts(error),
                exc_info=not is_outage(error),
            )


def _log_containment(probe: Future[Containment]) -> None:
    if probe.cancelled():
        return
    proved = probe.result()
    if proved.level.is_strict:
        log.info("service.containment", proved=proved.level.value, detail=proved.detail)
    else:
        log.warning("service.containment", proved=proved.level.value, detail=proved.detail)
