"""The order of a start and of a stop, and the signals that the process takes."""

from __future__ import annotations

import asyncio
import math
import os
import signal
import sys
from collections.abc import Awaitable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

import structlog

from runrecovery_service import early_signals
from runrecovery_service.background_stream import drain_stderr
from runrecovery_service.config.settings import ContainmentPolicy, Settings
from runrecovery_service.domain.errors import (
    ContainmentRefused,
    Fenced,
    LeaseLost,
    RecoveryGaveUp,
    RecoveryInterrupted,
    StorageUnavailable,
    StoreLost,
    error_facts,
    is_outage,
)
from runrecovery_service.domain.reconciliation import Containment, Reconciliation
from runrecovery_service.execution.deadlines import Deadlines
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.execution.straggler_sweep import StragglerSweep
from runrecovery_service.execution.trust_sweep import TrustSweep
from runrecovery_service.ownership import Ownership
from runrecovery_service.process import prctl
from runrecovery_service.recovery.reconcile import Recovery
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.server import GrpcServer
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import backup, instances
from runrecovery_service.storage.adapter import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.thread_pool import SteadyThreadPool

log = structlog.get_logger()

RECOVERY_BACKOFF_MOST_S: Final = 30.0
HANG_UP_SETTLES_S: Final = 0.5
"""From SIGHUP until the system has taken the terminal away, if it does."""
STEP_S: Final = 30.0
"""The most that a part of a stop may take on top of the graces that are configured for it."""


def prepare_process() -> None:
    """Guard this process against its agents, and take its signals from now on."""
    if sys.platform == "linux":
        prctl.hide()  # agents of the same user must not get at our ends of the shims' pipes
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever started us may have blocked some
    early_signals.leave(serves=True)


@contextmanager
def store_kept(db: Database) -> Iterator[None]:
    """Look at the store's files before the last connection is closed, whatever the service ends by.

    Raises:
        StoreLost: one is lost; a copy was made, if one could be. What the service ended by before
            is its cause.
    """
    ended_by: BaseException | None = None
    try:
        yield
    except BaseException as error:  # noqa: BLE001 - raised again, or the cause of what is
        ended_by = error
    lost = ended_by if isinstance(ended_by, StoreLost) else _lost(db)
    if lost is None:
        if ended_by is not None:
            raise ended_by
        return
    lost.copy = str(backup.rescue(db) or "") or None
    if ended_by is None or ended_by is lost:
        raise lost
    log.error("service.ended_by", error=type(ended_by).__name__, reason=str(ended_by))
    raise lost from ended_by


def _lost(db: Database) -> StoreLost | None:
    try:
        db.demand_in_place()
    except StoreLost as error:
        return error
    except OSError:  # the system does not tell
        pass
    return None


@dataclass(slots=True, kw_only=True, eq=False)
class Service:
    """All the parts of a running service."""

    settings: Settings
    storage: Storage
    owner: Owner
    threads: SteadyThreadPool
    stop: StopSignal
    status: RecoveryStatus
    gate: Gate
    server: GrpcServer
    recovery: Recovery
    closing: Recovery
    dispatcher: Dispatcher
    patrol: StragglerSweep
    deadlines: Deadlines
    trust_sweep: TrustSweep
    ownership: Ownership
    containment: Future[Containment]
    max_connections: int
    _stop_asked: int = 0
    _had_terminal: bool = field(default_factory=early_signals.had_terminal)

    async def run(self) -> None:
        """Bind, recover, serve, drain. Raises what the service ended by, if not by a signal."""
        self._listen_to_signals()
        staying = self.ownership.start()
        try:
            port = await self.server.bind(self.settings.listen, keeper_ended=self.stop.task_ended)
            log.info(
                "service.listening",
                address=_address(self.settings.listen, port),
                max_connections=self.max_connections,
            )
            await self._demand_containment()
            report = await self._recover()
            if report is not None and not self.stop.is_set():
                self._open(report)
            await self.stop.wait()
        finally:
            await self._shut_down(staying)
        if self.stop.failure is not None:
            raise self.stop.failure

    async def _demand_containment(self) -> None:
        """Say what the probe proved. Strictly: stop the start if that is not enough."""
        strict = self.settings.containment is ContainmentPolicy.STRICT
        if not strict:
            self.containment.add_done_callback(_log_containment)
            return
        proved = await asyncio.wrap_future(self.containment)
        _log_containment(self.containment)
        if not proved.level.is_strict:
            self.stop.fail(
                ContainmentRefused(
                    f'containment = "strict", but {proved.level} is what was proved here:'
                    f" {proved.detail}"
                )
            )

    def _open(self, report: Reconciliation) -> None:
        if not self.settings.engines:
            log.warning("service.no_engines")
        self.gate.open(safe_mode=report.safe_mode)
        log.info("service.serving", epoch=self.owner.epoch)
        self.patrol.start()
        self.trust_sweep.start()
        if not report.safe_mode:
            self.dispatcher.start()
            self.deadlines.start()

    async def _recover(self) -> Reconciliation | None:
        """Recover, again after a failure; None when the service is to stop instead."""
        if self.stop.is_set():
            return None
        pause_s = self.settings.recovery_backoff_s
        for left in reversed(range(self.settings.recovery_tries)):
            try:
                return await self.storage.alone(lambda db: self.recovery.run(db, self.status))
            except RecoveryInterrupted:
                return None
            except Fenced as error:
                self.stop.fail(error)
                return None
            except Exception as error:  # whatever it was: say so, stay NOT_SERVING, try again
                log.error(  # noqa: TRY400 - an outage needs no traceback
                    "recovery.try_failed",
                    tries_left=left,
                    **error_facts(error),
                    exc_info=not is_outage(error),
                )
                self.gate.recovery_failed()
                last = ": ".join(error_facts(error).values())
                failure = RecoveryGaveUp(self.settings.recovery_tries, last)
            if left and not await self.stop.wait_within(pause_s):
                pause_s = min(pause_s * 2, RECOVERY_BACKOFF_MOST_S)
                self.gate.recovering()
            elif self.stop.is_set():
                return None
        self.stop.fail(failure)
        return None

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in early_signals.STOPS:
            loop.add_signal_handler(number, self._asked_to_stop, number)
        for number in early_signals.HARMLESS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as SIGHUP is under nohup
                loop.add_signal_handler(number, self._got_harmless, number)
        for kept in early_signals.kept():
            (self._asked_to_stop if kept in early_signals.STOPS else self._got_harmless)(kept)

    def _got_harmless(self, number: int) -> None:
        if number == signal.SIGHUP and self._had_terminal:
            asyncio.get_running_loop().call_later(HANG_UP_SETTLES_S, self._stop_if_hung_up)
        else:
            log.info("service.signal_ignored", signal=signal.Signals(number).name)

    def _stop_if_hung_up(self) -> None:
        """Stop a service whose terminal was closed: nobody could see it or press Ctrl-C."""
        if early_signals.has_terminal():
            log.info("service.signal_ignored", signal=signal.SIGHUP.name)
        elif not self.stop.is_set():
            # Not counted: a single SIGTERM that follows must not cut the stop short.
            log.info("service.stop_asked", signal=signal.SIGHUP.name, times=self._stop_asked)
            self.stop.request()

    def _asked_to_stop(self, number: int) -> None:
        self._stop_asked += 1
        log.info("service.stop_asked", signal=signal.Signals(number).name, times=self._stop_asked)
        if self._stop_asked > 1:
            drain_stderr()
            os._exit(128 + number)  # at once; the next start converges what is left
        self.stop.request()

    async def _shut_down(self, staying: Sequence[asyncio.Task[None]]) -> None:
        """Drain, end, decide, let go. The lease is renewed, and process trees live, until the
        last of them has been ended in order."""
        grace_s = self.settings.cancel_grace_s
        self.gate.drain()
        await self._step("deadlines", self.deadlines.stop())
        self.dispatcher.pause()  # what stays in the queue may survive; what starts now will not
        if self.stop.failure is None:
            await asyncio.sleep(self.settings.drain_delay_s)
        else:  # perhaps another one owns the runs already: first of all, nothing of ours may act
            await self._step("processes", self.dispatcher.stop(), grace_s=grace_s * 2)
        self.gate.close()
        stop_grace_s = self.settings.stop_grace_s
        await self._step("server", self.server.stop(grace_s=stop_grace_s), grace_s=stop_grace_s)
        await self._step("patrol", self.patrol.stop(), grace_s=grace_s)
        await self._step("trust", self.trust_sweep.stop())
        if self.stop.failure is None and self.gate.recovered:
            # Without a bound by the clock: there may be many runs. The store has to answer.
            await self._step("runs", self._decide_on_runs(), grace_s=math.inf)
        await self._step("processes", self.dispatcher.stop(), grace_s=grace_s * 2)
        for task in staying:
            task.cancel()
        await asyncio.gather(*staying, return_exceptions=True)
        await self._step("threads", asyncio.to_thread(self.threads.shutdown))
        if not isinstance(self.stop.failure, Fenced | LeaseLost | StoreLost):
            await self._step("lease", self.storage.write(instances.resign, self.owner))
        await self._step("storage", asyncio.to_thread(self.storage.close))
        log.info("service.stopped", epoch=self.owner.epoch)

    async def _decide_on_runs(self) -> None:
        """End the processes and record what becomes of every run, as the next start would.

        Raises:
            StorageUnavailable: the store has not answered for so long that the rest is left to it.
        """
        await self.dispatcher.detach()
        deciding = asyncio.ensure_future(
            self.storage.alone(lambda db: self.closing.run(db, RecoveryStatus()))
        )
        silent = asyncio.create_task(self.ownership.unrenewed.wait())
        await asyncio.wait({deciding, silent}, return_when=asyncio.FIRST_COMPLETED)
        silent.cancel()
        if not deciding.done():
            deciding.cancel()
            raise StorageUnavailable
        await deciding
        await self.dispatcher.release()

    async def _step(self, name: str, doing: Awaitable[object], *, grace_s: float = 0.0) -> None:
        """Do one part of the stop; none of them keeps the others from being done."""
        try:
            async with asyncio.timeout(None if grace_s == math.inf else grace_s + STEP_S):
                await doing
        except TimeoutError as error:
            log.error("service.stop_step_failed", step=name, **error_facts(error))  # noqa: TRY400 - no defect
        except Exception as error:  # the service is ending; the next start converges what is left
            log.error(  # noqa: TRY400 - an outage needs no traceback
                "service.stop_step_failed",
                step=name,
                **error_facts(error),
                exc_info=not is_outage(error),
            )


def _log_containment(proved: Future[Containment]) -> None:
    if proved.cancelled():
        return
    found = proved.result()
    if found.level.is_strict:
        log.info("service.containment", proved=found.level.value, detail=found.detail)
    else:
        log.warning("service.containment", proved=found.level.value, detail=found.detail)


def _address(listen: str, port: int) -> str:
    """Return what a client connects to: the port that was really bound."""
    host, colon, _ = listen.rpartition(":")
    is_socket_file = listen.startswith(("unix:", "unix-abstract:"))
    return f"{host}:{port}" if colon and not is_socket_file else listen
