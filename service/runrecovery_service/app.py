"""Builds every object, in one place, and holds the order of a start and of a stop."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import secrets
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Final

import structlog

from runrecovery_service import clock, daemons, paths
from runrecovery_service.background_stream import drain_stderr
from runrecovery_service.config import ContainmentPolicy, EngineSettings, Settings
from runrecovery_service.domain.errors import (
    CgroupRefused,
    ContainmentRefused,
    DatabaseRefused,
    DataDirRefused,
    Fenced,
    LeaseLost,
    OpenFilesRefused,
    RecoveryGaveUp,
    RecoveryInterrupted,
    StartRefused,
    StorageUnavailable,
    StoreLost,
    is_outage,
)
from runrecovery_service.domain.reconciliation import Cause, Containment, Reconciliation
from runrecovery_service.domain.session_check import SessionCheck
from runrecovery_service.engines.catalog import Catalog, Engine
from runrecovery_service.engines.dialect import Dialect
from runrecovery_service.engines.jsonl import JSON_LINES
from runrecovery_service.engines.presets import PRESETS
from runrecovery_service.engines.sessions import sessions_of
from runrecovery_service.engines.sessions.files import CliSessions
from runrecovery_service.execution.deadlines import Deadlines
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.execution.output import OutputFiles
from runrecovery_service.execution.patrol import Patrol
from runrecovery_service.execution.trust_sweep import TrustSweep
from runrecovery_service.execution.trusting import (
    OwnConnection,
    ThroughLoop,
    TrustKeeper,
    why_not_trusting,
)
from runrecovery_service.execution.workshop import Heart, Workshop, evidence_of
from runrecovery_service.process import prctl
from runrecovery_service.process.cgroup import CgroupParent, CgroupUnusable
from runrecovery_service.process.evidence import Host
from runrecovery_service.process.launch import (
    agent_environment,
    boot_time_ns,
    killed_by_shim,
    watermark_bits,
    why_not_launchable,
)
from runrecovery_service.process.open_files import OpenFiles, TooFewOpenFiles
from runrecovery_service.process.probe import prove_containment
from runrecovery_service.process.sweep import Ending, end_trees
from runrecovery_service.recovery.plan import Planner
from runrecovery_service.recovery.startup import ClearTrust, Limits, Recovery
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.recovery_service import RecoveryRooms
from runrecovery_service.rpc.run_service import RunLimits, RunRooms
from runrecovery_service.rpc.server import GrpcServer, ServerLimits, build_server
from runrecovery_service.storage import instances, trial
from runrecovery_service.storage.adapter import Storage
from runrecovery_service.storage.database import (
    Database,
    Kind,
    applied_migrations,
    backup_sqlite,
    install_marker,
    integrity_problems,
    open_database,
    path_lock,
    postgresql_problems,
    refusing,
    repeated,
    sqlite_path,
)
from runrecovery_service.storage.instances import Boot, Owner
from runrecovery_service.storage.locks import Lock, LockFile
from runrecovery_service.storage.processes import Lease, Place
from runrecovery_service.thread_pool import SteadyThreadPool

log = structlog.get_logger()

LOCK_NAME: Final = "lock"
RECOVERY_BACKOFF_MOST_S: Final = 30.0
RENEWALS_PER_LEASE: Final = 5
SELF_FENCE_SHARE: Final = 2 / 3
"""An instance that could not renew its lease for this part of it stops before it runs out. Not on
SQLite: there the lock on the file fences, and a disk that is full is no reason to go."""
HARMLESS_SIGNALS: Final = (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""They would end a process that does not ask for them, and are sent to services as a matter of
course: to reload, to open the log anew."""
NO_TERMINAL: Final = frozenset({errno.ENXIO, errno.EIO, errno.ENOENT})
"""What opening /dev/tty fails with then. A lack of descriptors, for one, says nothing of it."""
HANG_UP_SETTLES_S: Final = 0.5
"""From SIGHUP until the system has taken the terminal away, if it does."""
TRY_SHARE: Final = 0.3
"""The part of the lease that one try to renew it may take on PostgreSQL."""
STEP_S: Final = 30.0
"""The most that a part of a stop may take on top of the graces that are configured for it."""
TREES_BEFORE_LEASE_S: Final = 1.0
"""Process trees end themselves so long before the lease of a silent service runs out: whoever
takes over then finds nothing alive."""
WRITE_TRIAL_LEASES: Final = 2
"""On PostgreSQL a write is tried once in so many leases: each trial uses up keys."""
FAILURES_IN_A_ROW: Final = 2
"""So many trials of the work's statements must fail until health says NOT_SERVING."""
FILES_LOOK_S: Final = 1.0
"""How soon a removed lock, or file of the SQLite store, is noticed without a write."""
FILES_LOOK_MOST_S: Final = 5.0
"""When a file system that has not answered such a look is logged."""


def serve(settings: Settings) -> None:
    """Run the service until it is told to stop.

    Raises:
        StartRefused: it will not start, or recovery gave up.
        StoreLost: the process must end without closing its last connection to the SQLite file.
        Fenced: a newer epoch of this instance has taken over.
    """
    if sys.platform == "linux":
        prctl.hide()  # agents of the same user must not get at our ends of the shims' pipes
    signal.pthread_sigmask(signal.SIG_SETMASK, ())  # whoever started us may have blocked some
    for number in _harmless_signals():  # also before the loop takes them
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which agents would inherit
    open_files = _open_files(settings)
    open_files.take()
    # Before anything is claimed: a name server that is away may take its time.
    per_address = open_files.connections // _addresses(settings.listen)
    with Holdings.take(settings) as held, SteadyThreadPool(1, "probe") as prober:
        # Beside the rest of the start: it is some 30 ms of waiting for processes.
        containment = prober.submit(prove_containment, watermark_bits())
        db = open_database(settings.database, held.data_dir, locks=held.locks)
        try:
            with store_kept(db), asyncio.Runner(loop_factory=daemons.new_event_loop) as runner:
                runner.run(_serve(settings, held, db, containment, open_files, per_address))
        finally:
            db.close()


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
    lost.copy = str(db.rescue() or "") or None
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


async def _serve(
    settings: Settings,
    held: Holdings,
    db: Database,
    containment: Future[Containment],
    open_files: OpenFiles,
    per_address: int,
) -> None:
    service = Service.build(settings, held, db, containment, open_files, per_address)
    await service.run()


def _open_files(settings: Settings) -> OpenFiles:
    """Divide the files that this process may open among runs, store and callers.

    Raises:
        OpenFilesRefused: they are too few.
    """
    runs = settings.capacity
    # Each call and stream may come by a connection of its own.
    wanted = settings.max_concurrent_calls + settings.max_concurrent_streams
    try:
        return OpenFiles.plan(runs=runs, connections=wanted)
    except TooFewOpenFiles as error:
        raise OpenFilesRefused(error.limit, error.needed, runs) from error


# -- the data directory ------------------------------------------------------------------------


def prepare_data_dir(settings: Settings) -> Path:
    """Make the data directory, if there is none, and return its absolute path.

    Raises:
        DataDirRefused: it cannot be made or written to.
        DatabaseRefused: there can be no SQLite store where the configuration wants it.
    """
    data_dir = paths.absolute(settings.data_dir)
    if reason := paths.directory_problem(data_dir):
        raise DataDirRefused(paths.shown(data_dir), reason)
    database = _sqlite_file(settings, data_dir)
    if database is not None and (reason := paths.database_problem(database, data_dir)):
        raise DatabaseRefused(paths.shown(database), reason)
    try:
        paths.make_directory(data_dir)
    except OSError as error:
        raise DataDirRefused(str(data_dir), error.strerror or "cannot be made") from error
    if others := paths.others_who_may_write(data_dir):
        log.warning("service.data_dir_shared", place=str(data_dir), writable_by=others)
    return data_dir


def _sqlite_file(settings: Settings, data_dir: Path) -> Path | None:
    """Return the absolute path of the SQLite file, None with PostgreSQL.

    Raises:
        DataDirRefused: it is relative, and the working directory was removed.
    """
    path = sqlite_path(settings.database, data_dir)
    return None if path is None else paths.absolute(path)


@dataclass(frozen=True, slots=True)
class Holdings:
    """The locks that a service holds for life: of its data directory, of the path of a SQLite
    file, and, once `open_database` has it, of that file."""

    data_dir: Path
    locks: list[Lock]

    @classmethod
    def take(cls, settings: Settings) -> Holdings:
        """Take them.

        Raises:
            DataDirRefused, DatabaseRefused: as `prepare_data_dir`; or a lock cannot be made.
            Held: another service has them; it is named.
        """
        data_dir = prepare_data_dir(settings)
        holder = f"instance {settings.instance!r}, pid {os.getpid()}, on {settings.listen}"
        with ExitStack() as taken:
            held = taken.enter_context(cls(data_dir, []))
            wanted = [(data_dir / LOCK_NAME, f"data directory {data_dir}")]
            if (database := _sqlite_file(settings, data_dir)) is not None:
                wanted.append((path_lock(database), f"database {database}"))
            for path, what in wanted:
                try:
                    held.locks.append(LockFile(path, what, holder))
                except OSError as error:
                    reason = error.strerror or "cannot be made"
                    raise DataDirRefused(str(path), reason) from error
            taken.pop_all()
        return held

    def demand_in_place(self) -> None:
        """Raise DataDirRefused if another service could take one of the locks now."""
        for lock in self.locks:
            lock.demand_in_place()

    def __enter__(self) -> Holdings:
        return self

    def __exit__(self, *_: object) -> None:
        for lock in reversed(self.locks):
            lock.release()


# -- signals ------------------------------------------------------------------------------------


def _harmless_signals() -> list[signal.Signals]:
    """Return those that are not ignored altogether, as SIGHUP is under nohup."""
    return [one for one in HARMLESS_SIGNALS if signal.getsignal(one) is not signal.SIG_IGN]


def _has_terminal() -> bool:
    """Return whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError as error:
        return error.errno not in NO_TERMINAL
    return True


# -- the service -------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True, eq=False)
class Service:
    """All the parts of a running service."""

    settings: Settings
    held: Holdings
    shop: Workshop
    gate: Gate
    server: GrpcServer
    recovery: Recovery
    closing: Recovery
    dispatcher: Dispatcher
    patrol: Patrol
    deadlines: Deadlines
    trust_sweep: TrustSweep
    containment: Future[Containment]
    max_connections: int
    report_id: str | None = None
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _stop: asyncio.Event = field(default_factory=asyncio.Event)
    _unrenewed: asyncio.Event = field(default_factory=asyncio.Event)
    _stop_asked: int = 0
    _had_terminal: bool = field(default_factory=_has_terminal)
    _failure: Exception | None = None
    _silent: set[str] = field(default_factory=set)

    @classmethod
    def build(
        cls,
        settings: Settings,
        held: Holdings,
        db: Database,
        containment: Future[Containment],
        open_files: OpenFiles,
        per_address: int,
    ) -> Service:
        """Claim the next epoch and put everything together; nothing runs yet.

        Args:
            per_address: connections that each address which is listened on may have.

        Raises:
            Held: an instance of this name is alive elsewhere.
            ContainmentRefused: this is not a system on which processes can be contained.
        """
        host, data_dir = _host(), held.data_dir
        cgroups = _cgroups(settings)
        heart = Heart(_trees_until(settings, boot_time_ns()))
        boot = _boot(settings, held, host)
        ttl_s = settings.lease_ttl_s
        with refusing(db.place):
            owner = repeated(lambda: instances.claim(db, boot, now=clock.utc_now(), ttl_s=ttl_s))
        if db.dialect.kind is Kind.SQLITE:
            db.keep_files()  # this thread's connection stays open, so that the log does
        else:
            db.close()
        log.info("service.epoch_claimed", instance=owner.instance, epoch=owner.epoch)
        storage = Storage(db)
        keeper = _trust_keeper(host, storage, owner)
        shop = _workshop(
            settings,
            data_dir,
            storage,
            owner,
            trust=keeper,
            heart=heart,
            cgroups=cgroups,
            open_files=open_files,
        )
        gate = Gate(retry_after_s=settings.retry_hint_s)
        service: Service
        dispatcher = Dispatcher(
            shop=shop,
            place=_place(host, cgroups),
            capacity=settings.capacity,
            fenced=lambda error: service.fail(error),  # noqa: PLW0108 - it is not built yet
        )
        service = cls(
            settings=settings,
            held=held,
            shop=shop,
            gate=gate,
            server=_server(
                settings,
                gate,
                dispatcher,
                max_connections=per_address,
                report_id=lambda: service.report_id,
                containment=lambda: containment.result() if containment.done() else None,
            ),
            recovery=_recovery(
                settings, shop, stopping=lambda: service.stopping, containment=containment.result
            ),
            closing=_closing(settings, shop),
            dispatcher=dispatcher,
            patrol=Patrol(
                shop=shop,
                followed=lambda: dispatcher.leases_followed,
                look_at_shims=dispatcher.look_at_shims,
                changed=dispatcher.look_again,
            ),
            deadlines=Deadlines(
                shop=shop,
                changed=dispatcher.changed,
                time_out=dispatcher.time_out,
                fenced=dispatcher.fenced,
            ),
            trust_sweep=TrustSweep(shop=shop),
            containment=containment,
            max_connections=open_files.connections,
        )
        db.guard(service.demand_current)
        return service

    def demand_current(self, db: Database) -> None:
        """Fence the transaction that begins, on whatever thread, and stop a service that was
        superseded. The lease alone would tell it only at the next renewal.

        Raises:
            Fenced: a newer epoch of this instance has started.
        """
        try:
            instances.demand_current(db, self.shop.owner)
        except Fenced as error:
            self._loop.call_soon_threadsafe(self.fail, error)
            raise

    @property
    def stopping(self) -> bool:
        """True once a stop was asked for."""
        return self._stop.is_set()

    def fail(self, error: Exception) -> None:
        """Stop because of an error that the service cannot go on with."""
        self._failure = self._failure or error
        self._stop.set()

    async def run(self) -> None:
        """Bind, recover, serve, drain. Raises what the service ended by, if not by a signal."""
        self._listen_to_signals()
        staying = [
            asyncio.create_task(self._renew()),
            asyncio.create_task(watch_files(self._demand_files, self.fail)),
            asyncio.create_task(self._try_statements()),
        ]
        if self.shop.storage.is_shared:
            staying.append(asyncio.create_task(self.shop.storage.follow_shared()))
        else:
            staying.append(asyncio.create_task(self._keep_trees()))
        for task in staying:
            task.add_done_callback(self._stays_no_longer)
        try:
            port = await self.server.bind(self.settings.listen, keeper_ended=self._stays_no_longer)
            log.info(
                "service.listening",
                address=_address(self.settings.listen, port),
                max_connections=self.max_connections,
            )
            await self._demand_containment()
            report = await self._recover()
            if report is not None and not self.stopping:
                self._open(report)
            await self._stop.wait()
        finally:
            await self._shut_down(staying)
        if self._failure is not None:
            raise self._failure

    async def _demand_containment(self) -> None:
        """Say what the probe proved. Strictly: stop the start if that is not enough."""
        strict = self.settings.containment is ContainmentPolicy.STRICT
        if not strict:
            self.containment.add_done_callback(_log_containment)
            return
        proved = await asyncio.wrap_future(self.containment)
        _log_containment(self.containment)
        if not proved.level.is_strict:
            self.fail(
                ContainmentRefused(
                    f'containment = "strict", but {proved.level} is what was proved here:'
                    f" {proved.detail}"
                )
            )

    def _open(self, report: Reconciliation) -> None:
        if not self.settings.engines:
            log.warning("service.no_engines")
        self.gate.open(safe_mode=report.safe_mode)
        log.info("service.serving", epoch=self.shop.owner.epoch)
        self.patrol.start()
        self.trust_sweep.start()
        if not report.safe_mode:
            self.dispatcher.start()
            self.deadlines.start()

    # -- recovering ----------------------------------------------------------------------------

    async def _recover(self) -> Reconciliation | None:
        """Recover, again after a failure; None when the service is to stop instead."""
        if self.stopping:
            return None
        pause_s = self.settings.recovery_backoff_s
        for left in reversed(range(self.settings.recovery_tries)):
            try:
                return await self.shop.storage.alone(
                    lambda db: self.recovery.run(db, self._report_begun)
                )
            except RecoveryInterrupted:
                return None
            except Fenced as error:
                self.fail(error)
                return None
            except Exception as error:  # whatever it was: say so, stay NOT_SERVING, try again
                log.error(  # noqa: TRY400 - an outage needs no traceback
                    "recovery.try_failed",
                    tries_left=left,
                    error=type(error).__name__,
                    exc_info=not is_outage(error),
                )
                self.gate.recovery_failed()
                failure = RecoveryGaveUp(self.settings.recovery_tries, type(error).__name__)
            if left and not await clock.set_within(pause_s, self._stop):
                pause_s = min(pause_s * 2, RECOVERY_BACKOFF_MOST_S)
                self.gate.recovering()
            elif self.stopping:
                return None
        self.fail(failure)
        return None

    def _report_begun(self, reconciliation_id: str) -> None:
        self.report_id = reconciliation_id

    # -- staying the owner ---------------------------------------------------------------------

    async def _renew(self) -> None:
        """Prolong the lease for ever; stop the service once it cannot be sure to be the owner."""
        ttl_s, shared = self.settings.lease_ttl_s, self.shop.storage.is_shared
        self_fence_s = ttl_s * SELF_FENCE_SHARE
        renewed = last = boot_time_ns() / 1e9
        pause_s = ttl_s / RENEWALS_PER_LEASE
        while True:
            await asyncio.sleep(pause_s)
            begun_ns = boot_time_ns()
            begun = begun_ns / 1e9
            if begun - last > ttl_s - TREES_BEFORE_LEASE_S:
                log.warning("service.stood_still", seconds=round(begun - last, 1))
            last = begun
            left_s = max(0.1, renewed + self_fence_s - begun)
            try:
                # One try of several where a connection may hang that another one replaces.
                async with asyncio.timeout(min(left_s, ttl_s * TRY_SHARE) if shared else left_s):
                    await self.shop.storage.renewal(instances.renew, self.shop.owner, ttl_s=ttl_s)
            except Fenced as error:
                self.fail(error)
                return
            except Exception as error:  # noqa: BLE001 - whatever it was, the lease is not renewed
                log.warning("service.lease_not_renewed", error=type(error).__name__)
                self._note_storage("lease", answers=False)
                pause_s = ttl_s / RENEWALS_PER_LEASE / 3
            else:
                renewed = begun
                if shared:
                    self._heartbeat(begun_ns)
                self._note_storage("lease", answers=True)
                self._unrenewed.clear()
                pause_s = ttl_s / RENEWALS_PER_LEASE
            if boot_time_ns() / 1e9 - renewed > self_fence_s:
                self._unrenewed.set()
                if shared:
                    self.fail(LeaseLost(self.shop.owner.instance, self_fence_s))
                    self.shop.storage.abandon()  # or what waits for an answer would hang on
                    return

    def _note_storage(self, part: str, *, answers: bool) -> None:
        """Note whether a part of the storage answers; health needs all of them."""
        if answers:
            self._silent.discard(part)
        else:
            self._silent.add(part)
        self.gate.set_storage_answers(answers=not self._silent)

    async def _try_statements(self) -> None:
        """For ever, once the gate is open: see that the statements of the work answer."""
        failed, looks = 0, 0
        write_every = 1
        if self.shop.storage.is_shared:
            write_every = RENEWALS_PER_LEASE * WRITE_TRIAL_LEASES
        while True:
            await asyncio.sleep(self.settings.lease_ttl_s / RENEWALS_PER_LEASE)
            if not self.gate.recovered or self.stopping:
                continue
            # After a failure every look: a read alone would call a failing write well.
            error = await self._failing_statement(write=bool(failed) or looks % write_every == 0)
            looks += 1
            failed = 0 if error is None else failed + 1
            self.dispatcher.look_again()  # its last failure, or success, is news no more
            if error is not None:
                log.warning("service.statements_failed", error=error, times=failed)
            self._note_storage("statements", answers=failed < FAILURES_IN_A_ROW)

    async def _failing_statement(self, *, write: bool) -> str | None:
        """Try the statements; return what failed, None if all of them answered."""
        storage, shop = self.shop.storage, self.shop
        try:
            async with asyncio.timeout(self.settings.lease_ttl_s):
                await storage.attempt(trial.read)
            if write:
                # SQLite has one thread that writes. Elsewhere it is a connection that may hang.
                bound_s = self.settings.lease_ttl_s if storage.is_shared else None
                async with asyncio.timeout(bound_s):
                    await (storage.attempt if storage.is_shared else storage.write)(
                        trial.create_and_take,
                        owner=shop.owner,
                        due_in=shop.due_in,
                        steady=shop.steady_now(),
                        now=shop.now(),
                    )
        except Exception as error:  # noqa: BLE001 - whatever it was, the work meets it as well
            return type(error).__name__
        failing_s = self.settings.lease_ttl_s / RENEWALS_PER_LEASE
        return "take_next" if self.dispatcher.failing_s >= failing_s else None

    def _stays_no_longer(self, task: asyncio.Task[None]) -> None:
        """A defect in what keeps us the owner, or the trees alive, must not go unnoticed."""
        error = None if task.cancelled() else task.exception()
        if isinstance(error, Exception):
            log.error("service.defect", exc_info=error)
            self.fail(error)

    async def _keep_trees(self) -> None:
        """Where nobody can take over, let the process trees live as long as the service does: a
        full disk, which makes renewals fail or hang, ends none."""
        while True:
            await asyncio.sleep(self.settings.lease_ttl_s / RENEWALS_PER_LEASE)
            self._heartbeat(boot_time_ns())

    def _demand_files(self) -> None:
        self.shop.storage.demand_in_place()
        self.held.demand_in_place()

    def _heartbeat(self, begun_ns: int) -> None:
        """Let the process trees live on: the lease was, or needed not be, renewed at `begun_ns`."""
        self.dispatcher.heartbeat(_trees_until(self.settings, begun_ns))

    # -- stopping ------------------------------------------------------------------------------

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._asked_to_stop, number)
        for number in _harmless_signals():
            loop.add_signal_handler(number, self._got_harmless, number)

    def _got_harmless(self, number: int) -> None:
        if number == signal.SIGHUP and self._had_terminal:
            asyncio.get_running_loop().call_later(HANG_UP_SETTLES_S, self._stop_if_hung_up)
        else:
            log.info("service.signal_ignored", signal=signal.Signals(number).name)

    def _stop_if_hung_up(self) -> None:
        """Stop a service whose terminal was closed: nobody could see it or press Ctrl-C."""
        if _has_terminal():
            log.info("service.signal_ignored", signal=signal.SIGHUP.name)
        elif not self.stopping:
            # Not counted: a single SIGTERM that follows must not cut the stop short.
            log.info("service.stop_asked", signal=signal.SIGHUP.name, times=self._stop_asked)
            self._stop.set()

    def _asked_to_stop(self, number: int) -> None:
        self._stop_asked += 1
        log.info("service.stop_asked", signal=signal.Signals(number).name, times=self._stop_asked)
        if self._stop_asked > 1:
            drain_stderr()
            os._exit(128 + number)  # at once; the next start converges what is left
        self._stop.set()

    async def _shut_down(self, staying: Sequence[asyncio.Task[None]]) -> None:
        """Drain, end, decide, let go. The lease is renewed, and process trees live, until the
        last of them has been ended in order."""
        grace_s = self.settings.cancel_grace_s
        self.gate.drain()
        await self._step("deadlines", self.deadlines.stop())
        self.dispatcher.pause()  # what stays in the queue may survive; what starts now will not
        if self._failure is None:
            await asyncio.sleep(self.settings.drain_delay_s)
        else:  # perhaps another one owns the runs already: first of all, nothing of ours may act
            await self._step("processes", self.dispatcher.stop(), grace_s=grace_s * 2)
        self.gate.close()
        stop_grace_s = self.settings.stop_grace_s
        await self._step("server", self.server.stop(grace_s=stop_grace_s), grace_s=stop_grace_s)
        await self._step("patrol", self.patrol.stop(), grace_s=grace_s)
        await self._step("trust", self.trust_sweep.stop())
        if self._failure is None and self.gate.recovered:
            # Without a bound by the clock: there may be many runs. The store has to answer.
            await self._step("runs", self._decide_on_runs(), grace_s=math.inf)
        await self._step("processes", self.dispatcher.stop(), grace_s=grace_s * 2)
        for task in staying:
            task.cancel()
        await asyncio.gather(*staying, return_exceptions=True)
        await self._step("threads", asyncio.to_thread(self.shop.threads.shutdown))
        if not isinstance(self._failure, Fenced | LeaseLost | StoreLost):
            await self._step("lease", self.shop.storage.write(instances.resign, self.shop.owner))
        await self._step("storage", asyncio.to_thread(self.shop.storage.close))
        log.info("service.stopped", epoch=self.shop.owner.epoch)

    async def _decide_on_runs(self) -> None:
        """End the processes and record what becomes of every run, as the next start would.

        Raises:
            StorageUnavailable: the store has not answered for so long that the rest is left to it.
        """
        await self.dispatcher.detach()
        deciding = asyncio.ensure_future(
            self.shop.storage.alone(lambda db: self.closing.run(db, lambda _: None))
        )
        silent = asyncio.create_task(self._unrenewed.wait())
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
            log.error("service.stop_step_failed", step=name, error=type(error).__name__)  # noqa: TRY400 - no defect
        except Exception as error:  # the service is ending; the next start converges what is left
            log.error(  # noqa: TRY400 - an outage needs no traceback
                "service.stop_step_failed",
                step=name,
                error=type(error).__name__,
                exc_info=not is_outage(error),
            )


async def watch_files(demand: Callable[[], None], fail: Callable[[Exception], None]) -> None:
    """Fail once a file of the store or a lock was removed or replaced.

    Each look has a thread: a file system that hangs (NFS, FUSE) must not stop the event loop.
    There is one look at a time, and one that is not answered proves nothing.
    """
    while True:
        await asyncio.sleep(FILES_LOOK_S)
        try:
            look = asyncio.wrap_future(daemons.begin(demand))
        except RuntimeError as error:  # the system gives no thread now
            log.warning("service.files_not_seen", error=str(error))
            continue
        answered, _ = await asyncio.wait({look}, timeout=FILES_LOOK_MOST_S)
        if not answered:
            log.warning("service.files_not_seen", error="no answer")
        try:
            await look
        except StartRefused as error:
            fail(error)
            return
        except OSError as error:  # the renewal meets it as well, and says NOT_SERVING
            log.warning("service.files_not_seen", error=error.strerror)


def _trees_until(settings: Settings, renewed_ns: int) -> int:
    """Return until when (CLOCK_BOOTTIME, which also runs while the machine sleeps) process trees
    may live after a renewal that began at `renewed_ns`."""
    return renewed_ns + int((settings.lease_ttl_s - TREES_BEFORE_LEASE_S) * 1e9)


def _log_containment(proved: Future[Containment]) -> None:
    if proved.cancelled():
        return
    found = proved.result()
    if found.level.is_strict:
        log.info("service.containment", proved=found.level.value, detail=found.detail)
    else:
        log.warning("service.containment", proved=found.level.value, detail=found.detail)


def _addresses(listen: str) -> int:
    """Return how many addresses `listen` may stand for; gRPC counts the connections of each by
    themselves. A name stands for two at least: gRPC takes `localhost` for both, whatever the
    system says."""
    host, colon, _ = listen.rpartition(":")
    if not colon or listen.startswith(("unix:", "unix-abstract:")):
        return 1
    with suppress(ValueError):
        ip_address(host.strip("[]"))
        return 1
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError:  # to be told when it is listened on
        return 2
    return max(2, len(found))


def _address(listen: str, port: int) -> str:
    """Return what a client connects to: the port that was really bound."""
    host, colon, _ = listen.rpartition(":")
    is_socket_file = listen.startswith(("unix:", "unix-abstract:"))
    return f"{host}:{port}" if colon and not is_socket_file else listen


# -- parts -------------------------------------------------------------------------------------


def _host() -> Host:
    try:
        return Host.here()
    except OSError as error:
        reason = f"the service needs Linux with a mounted /proc ({error.strerror})"
        raise ContainmentRefused(reason) from error


def _boot(settings: Settings, held: Holdings, host: Host) -> Boot:
    return Boot(
        instance=settings.instance,
        boot_token=secrets.token_hex(16),
        host_id=host.host_id,
        data_dir=str(held.data_dir),
        pid=os.getpid(),
        # A kernel that was booted once has one table of locks, and one number for each device.
        lock_id=f"{host.boot_id}/{held.locks[0].name}",
    )


def _place(host: Host, cgroups: CgroupParent | None) -> Place:
    return Place(
        host_id=host.host_id,
        boot_id=host.boot_id,
        pid_namespace=host.pid_namespace,
        watermark_bits=watermark_bits(),
        cgroup_parent=None if cgroups is None else cgroups.below,
    )


def _cgroups(settings: Settings) -> CgroupParent | None:
    """Open the delegated cgroup, if one is configured.

    Raises:
        CgroupRefused: it cannot be used.
    """
    if not settings.cgroup_parent:
        return None
    try:
        return CgroupParent.open(Path(settings.cgroup_parent))
    except CgroupUnusable as error:
        raise CgroupRefused(settings.cgroup_parent, str(error)) from error


def _catalog(settings: Settings) -> Catalog:
    return Catalog(_engine(name, engine) for name, engine in settings.engines.items())


def _engine(name: str, settings: EngineSettings) -> Engine:
    return Engine(
        name=name,
        command=settings.command,
        profile=settings.profile,
        dialect=_dialect(settings),
        env_allow=settings.env_allow,
        env=_agent_home(settings),
        max_concurrent=settings.max_concurrent,
        session_file=settings.session_file,
        sessions=_sessions(settings),
        unknown_session=settings.unknown_session,
        session_timeout_s=settings.session_timeout_s,
        require_user_reply=settings.require_user_reply,
        max_run_time_s=settings.max_run_time_s,
        niceness=settings.nice,
        max_memory=settings.max_memory,
        max_open_files=settings.max_open_files,
        max_processes=settings.max_processes,
        trust=settings.trust,
    )


def _dialect(settings: EngineSettings) -> Dialect:
    if settings.preset is None:
        return JSON_LINES
    trusted = settings.trust == settings.preset
    return replace(PRESETS[settings.preset].dialect, trusted=trusted)


def _sessions(settings: EngineSettings) -> CliSessions | None:
    if settings.preset is None:
        return None
    return sessions_of(settings.preset, _agent_environment(settings))


def _agent_home(settings: EngineSettings) -> dict[str, str]:
    if settings.preset is None or settings.agent_home is None:
        return {}
    return {PRESETS[settings.preset].home_variable: settings.agent_home}


def _trust_keeper(host: Host, storage: Storage, owner: Owner) -> TrustKeeper:
    return TrustKeeper(
        host_id=host.host_id,
        owner=owner,
        store=ThroughLoop(storage, asyncio.get_running_loop()),
        now=clock.utc_now,
    )


def _clear_trust(keeper: TrustKeeper) -> ClearTrust:
    """A recovery has a connection of its own, and need not go through the loop."""
    return lambda db, told, enough: replace(keeper, store=OwnConnection(db), told=told).clear(
        enough
    )


def _workshop(
    settings: Settings,
    data_dir: Path,
    storage: Storage,
    owner: Owner,
    *,
    trust: TrustKeeper,
    heart: Heart,
    cgroups: CgroupParent | None,
    open_files: OpenFiles,
) -> Workshop:
    return Workshop(
        storage=storage,
        owner=owner,
        catalog=_catalog(settings),
        output=OutputFiles(data_dir, max_bytes=settings.max_output_bytes),
        trust=trust,
        threads=SteadyThreadPool(settings.capacity * 4 + 4, thread_name_prefix="process"),
        environ=dict(os.environ),
        heart=heart,
        cgroups=cgroups,
        cancel_grace_s=settings.cancel_grace_s,
        exit_grace_s=settings.exit_grace_s,
        soft_open_files=open_files.agents_soft,
        now=clock.utc_now,
        steady_now=clock.steady_now,
        due_in=clock.due_in,
    )


def _server(
    settings: Settings,
    gate: Gate,
    dispatcher: Dispatcher,
    *,
    max_connections: int,
    report_id: Callable[[], str | None],
    containment: Callable[[], Containment | None],
) -> GrpcServer:
    shop = dispatcher.shop
    return build_server(
        gate,
        run_rooms=RunRooms(
            storage=shop.storage,
            owner=shop.owner,
            catalog=shop.catalog,
            dispatcher=dispatcher,
            output=shop.output,
            limits=RunLimits(max_queued=settings.max_queued, max_attempts=settings.max_attempts),
            now=shop.now,
            steady_now=shop.steady_now,
            due_in=shop.due_in,
        ),
        recovery_rooms=RecoveryRooms(
            storage=shop.storage,
            owner=shop.owner,
            current_report=report_id,
            containment=containment,
            planner=Planner(
                owner=shop.owner,
                session_checks=_session_checks(shop.catalog),
                workspace=shop.output.workspace,
            ),
        ),
        limits=ServerLimits(
            max_concurrent_calls=settings.max_concurrent_calls,
            max_concurrent_streams=settings.max_concurrent_streams,
            stall_s=settings.watch_stall_s,
            max_request_bytes=settings.max_request_bytes,
            max_connections=max_connections,
        ),
    )


def _recovery(
    settings: Settings,
    shop: Workshop,
    *,
    stopping: Callable[[], bool],
    containment: Callable[[], Containment],
) -> Recovery:
    return Recovery(
        owner=shop.owner,
        cause=Cause.STARTUP,
        containment=containment,
        limits=_limits(settings),
        sweep=_sweep(
            shop,
            why="orphan",
            grace_s=settings.orphan_grace_s,
            deadline_s=settings.orphan_deadline_s,
        ),
        clear_trust=_clear_trust(shop.trust),
        session_checks=_session_checks(shop.catalog),
        workspace=shop.output.workspace,
        now=clock.utc_now,
        due_in=clock.due_in,
        steady_now=clock.steady_now,
        stopping=stopping,
    )


def _closing(settings: Settings, shop: Workshop) -> Recovery:
    """The recovery of the next start, done by a planned stop. A second signal cuts it off."""
    grace_s = settings.cancel_grace_s
    return Recovery(
        owner=shop.owner,
        cause=Cause.SHUTDOWN,
        containment=None,
        limits=_limits(settings),
        sweep=_sweep(
            shop, why="stop", grace_s=grace_s, deadline_s=grace_s + settings.orphan_deadline_s
        ),
        clear_trust=_clear_trust(shop.trust),
        session_checks=_session_checks(shop.catalog),
        workspace=shop.output.workspace,
        now=clock.utc_now,
        due_in=clock.due_in,
        steady_now=clock.steady_now,
        stopping=lambda: False,
    )


def _limits(settings: Settings) -> Limits:
    return Limits(
        batch_rows=settings.recovery_batch_rows,
        batch_s=settings.recovery_batch_s,
        safe_mode_after=settings.safe_mode_after,
        safe_mode_window_s=settings.safe_mode_window_s,
        reopen_window_s=settings.reopen_window_s,
    )


def _sweep(
    shop: Workshop, *, why: str, grace_s: float, deadline_s: float
) -> Callable[[Sequence[Lease]], Mapping[int, Ending]]:
    """What ends the trees of leases, and reads in the shims' books what they did themselves."""

    def sweep(leases: Sequence[Lease]) -> Mapping[int, Ending]:
        endings = end_trees(
            [evidence_of(lease) for lease in leases],
            why=why,
            grace_s=grace_s,
            deadline_s=deadline_s,
        )
        for lease in leases:
            if endings[lease.key].gone:
                shop.remove_cgroup(lease)
        return {
            lease.key: endings[lease.key].with_book(
                killed_by_shim(shop.output.shim_book(lease.run_key, lease.attempt, lease.turn))
            )
            for lease in leases
        }

    return sweep


def _session_checks(catalog: Catalog) -> dict[str, SessionCheck]:
    """Only engines of which it is known where they keep a session can be checked."""
    checks = {name: catalog.get(name).session_check for name in catalog.names}
    return {name: check for name, check in checks.items() if check is not None}


# -- offline commands --------------------------------------------------------------------------


def migrate(settings: Settings) -> list[str]:
    """Open the store of a stopped service as a start does, which migrates it.

    Returns:
        The names of all steps that the store has now.

    Raises:
        StartRefused: it is held, or may not be opened.
    """
    path = _sqlite_file(settings, paths.absolute(settings.data_dir))
    if path is not None and not os.path.lexists(path):
        raise DatabaseRefused(paths.shown(path), "does not exist; a first start creates it")
    with Holdings.take(settings) as held:
        db = open_database(settings.database, held.data_dir, locks=held.locks)
        try:
            with refusing(db.place):
                return applied_migrations(db)
        finally:
            db.close()


def backup(settings: Settings, destination: Path) -> dict[str, int]:
    """Copy the SQLite store of a running or stopped service, and prove the copy.

    Returns:
        How many runs of each instance are in the copy.

    Raises:
        DatabaseRefused: it is not SQLite, is not there, or the copy is not sound.
    """
    path = _sqlite_file(settings, paths.absolute(settings.data_dir))
    if path is None:
        raise DatabaseRefused("PostgreSQL", "is backed up with its own tools (pg_dump)")
    return backup_sqlite(path, destination)


def check(settings: Settings) -> list[str]:
    """Look for what would go wrong at a start, changing nothing; return one sentence each."""
    problems = [
        f"engine {name!r}: {reason}"
        for name, engine in settings.engines.items()
        if (reason := why_not_launchable(engine.command, env_allow=engine.env_allow)) is not None
    ]
    problems += _trust_problems(settings)
    problems += _containment_problems(settings)
    problems += _open_files_problems(settings)
    problems += _store_problems(settings)
    return problems


def check_notes(settings: Settings) -> list[str]:
    """Return what hinders no start, and yet is good to know; one sentence each."""
    try:
        data_dir = paths.absolute(settings.data_dir)
        others = paths.others_who_may_write(data_dir)
    except (DataDirRefused, OSError):  # a problem, or not there yet
        return []
    return [] if others is None else [f"{data_dir}: may also be changed by {others}"]


def _open_files_problems(settings: Settings) -> list[str]:
    try:
        _open_files(settings)
    except OpenFilesRefused as error:
        return [str(error)]
    return []


def _store_problems(settings: Settings) -> list[str]:
    try:
        data_dir = paths.absolute(settings.data_dir)
        path = _sqlite_file(settings, data_dir)
    except DataDirRefused as error:
        return [str(error)]
    problems = []
    if reason := paths.directory_problem(data_dir):
        problems.append(f"{paths.shown(data_dir)}: {reason}")
    if path is None:
        problems += postgresql_problems(settings.database)
    elif problems and path.parent == data_dir:
        pass  # of the file nothing can be said
    elif reason := paths.database_problem(path, data_dir):
        problems.append(f"{paths.shown(path)}: {reason}")
    elif path.exists():
        problems += integrity_problems(path)
    elif install_marker(path).exists():
        problems.append(f"{path}: is gone; restore a backup")
    return problems


def _trust_problems(settings: Settings) -> list[str]:
    return [
        f"engine {name!r}: {reason}"
        for name, engine in settings.engines.items()
        if engine.trust is not None
        and (reason := why_not_trusting(engine.trust, _agent_environment(engine))) is not None
    ]


def _agent_environment(engine: EngineSettings) -> dict[str, str]:
    return agent_environment(engine.env_allow, os.environ, _agent_home(engine))


def _containment_problems(settings: Settings) -> list[str]:
    problems = []
    try:
        _cgroups(settings)
    except CgroupRefused as error:
        problems.append(str(error))
    if settings.containment is ContainmentPolicy.STRICT:
        proved = prove_containment(watermark_bits())
        if not proved.level.is_strict:
            problems.append(
                f'containment = "strict", but {proved.level} is proved: {proved.detail}'
            )
    return problems
