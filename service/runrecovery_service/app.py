"""Builds every object of the service, in one place."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address

import structlog

from runrecovery_service import early_signals
from runrecovery_service.agents.blocking_store import LoopStore
from runrecovery_service.agents.end_launches import LaunchEnder
from runrecovery_service.agents.output import OutputFiles
from runrecovery_service.agents.session_checks import SessionChecker, session_checks
from runrecovery_service.agents.trust_keeper import TrustKeeper
from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.clock import Clock
from runrecovery_service.config.settings import Settings
from runrecovery_service.daemon_threads import new_event_loop
from runrecovery_service.domain.errors import ContainmentRefused
from runrecovery_service.domain.reconciliation import Cause, Containment
from runrecovery_service.engine_setup import build_catalog
from runrecovery_service.execution.deadlines import Deadlines
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.execution.launcher import Launcher
from runrecovery_service.execution.run_queue import RunQueue
from runrecovery_service.execution.running_turns import RunningTurns
from runrecovery_service.execution.straggler_sweep import StragglerSweep
from runrecovery_service.execution.supervisor_factory import SupervisorFactory
from runrecovery_service.execution.tree_deadline import TreeDeadline
from runrecovery_service.execution.trust_sweep import TrustSweep
from runrecovery_service.lifecycle import Service, prepare_process, store_kept
from runrecovery_service.locks import Holdings
from runrecovery_service.machine import open_cgroup_parent, plan_open_files
from runrecovery_service.ownership import Ownership, trees_until
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.process.cgroup import CgroupParent
from runrecovery_service.process.host import Host
from runrecovery_service.process.open_files import OpenFiles
from runrecovery_service.process.probe import prove_containment
from runrecovery_service.process.watermark import watermark_bits
from runrecovery_service.recovery.bulk_session_check import BulkSessionCheck
from runrecovery_service.recovery.plan import Planner
from runrecovery_service.recovery.reconcile import Recovery, RecoveryLimits
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.listen_address import parse_listen_address
from runrecovery_service.rpc.recovery_service import RecoveryDeps
from runrecovery_service.rpc.run_service import RunDeps, RunLimits
from runrecovery_service.rpc.server import ServerLimits, build_server
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import instances
from runrecovery_service.storage.adapter import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Boot
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.processes import Place
from runrecovery_service.storage.refusals import refusing
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.use_case import retry_conflicts
from runrecovery_service.thread_pool import SteadyThreadPool

log = structlog.get_logger()


def serve(settings: Settings) -> None:
    """Run the service until it is told to stop.

    Raises:
        StartRefused: it will not start, or recovery gave up.
        StoreLost: the process must end without closing its last connection to the SQLite file.
        Fenced: a newer epoch of this instance has taken over.
    """
    prepare_process()
    open_files = plan_open_files(settings)
    open_files.apply()
    # Before anything is claimed: a name server that is away may take its time.
    per_address = open_files.connections // _addresses(settings.listen)
    with Holdings.take(settings) as held, SteadyThreadPool(1, "probe") as prober:
        early_signals.keep()
        # Before the store is migrated and an epoch claimed: a start that nobody could reach must
        # change nothing, and not count as one that did not finish recovering.
        parse_listen_address(settings.listen).demand_bindable()
        # Beside the rest of the start: it is some 30 ms of waiting for processes.
        containment = prober.submit(prove_containment, watermark_bits())
        db = open_database(settings.database, held.data_dir, locks=held.locks)
        try:
            with (
                store_kept(db),
                asyncio.Runner(loop_factory=new_event_loop) as runner,
            ):
                runner.run(_serve(settings, held, db, containment, open_files, per_address))
        finally:
            db.close()


async def _serve(
    settings: Settings,
    held: Holdings,
    db: Database,
    containment: Future[Containment],
    open_files: OpenFiles,
    per_address: int,
) -> None:
    service = build(settings, held, db, containment, open_files, per_address)
    await service.run()


def build(
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
    cgroups = open_cgroup_parent(settings)
    tree_deadline = TreeDeadline(trees_until(settings.lease_ttl_s, boot_time_ns()))
    clock, boot = Clock(), _boot(settings, held, host)
    ttl_s = settings.lease_ttl_s
    with refusing(db.name):
        owner = retry_conflicts(lambda: instances.claim(db, boot, now=clock.now(), ttl_s=ttl_s))
    if db.dialect.kind is DatabaseKind.SQLITE:
        db.watch_files()  # this thread's connection stays open, so that the log does
    else:
        db.close()
    log.info("service.epoch_claimed", instance=owner.instance, epoch=owner.epoch)
    storage, catalog = Storage(db), build_catalog(settings)
    workspaces = Workspaces(data_dir)
    output = OutputFiles(workspaces, max_bytes=settings.max_output_bytes)
    trust = TrustKeeper(
        host_id=host.host_id,
        owner=owner,
        store=LoopStore(storage, asyncio.get_running_loop()),
        clock=clock,
    )
    threads = SteadyThreadPool(settings.capacity * 4 + 4, thread_name_prefix="process")
    launcher = Launcher(
        workspaces=workspaces,
        trust=trust,
        threads=threads,
        tree_deadline=tree_deadline,
        cgroups=cgroups,
        environ=dict(os.environ),
        kill_grace_s=settings.cancel_grace_s,
        soft_open_files=open_files.agents_soft,
    )
    stop, status = StopSignal(), RecoveryStatus(containment)
    gate = Gate(retry_after_s=settings.retry_hint_s)
    turns = RunningTurns(tree_deadline=tree_deadline)
    dispatcher = Dispatcher(
        queue=RunQueue(storage=storage, owner=owner, clock=clock, site=_place(host, cgroups)),
        supervisors=SupervisorFactory(
            storage=storage,
            owner=owner,
            clock=clock,
            catalog=catalog,
            launcher=launcher,
            output=output,
            sessions=SessionChecker(catalog=catalog, workspaces=workspaces),
            exit_grace_s=settings.exit_grace_s,
        ),
        launcher=launcher,
        turns=turns,
        capacity=settings.capacity,
        stop_signal=stop,
    )
    ownership = Ownership(
        lease_ttl_s=ttl_s,
        storage=storage,
        owner=owner,
        clock=clock,
        dispatcher=dispatcher,
        gate=gate,
        held=held,
        stop=stop,
    )
    db.guard(ownership.demand_current)
    checks = session_checks(catalog)
    sessions = BulkSessionCheck(checks=checks, workspace=workspaces.workspace)
    server = build_server(
        gate,
        run_deps=RunDeps(
            storage=storage,
            owner=owner,
            catalog=catalog,
            workspaces=workspaces,
            output=output,
            limits=RunLimits(max_queued=settings.max_queued, max_attempts=settings.max_attempts),
            clock=clock,
        ),
        recovery_deps=RecoveryDeps(
            storage=storage,
            owner=owner,
            status=status,
            planner=Planner(owner=owner, sessions=sessions),
        ),
        limits=ServerLimits(
            max_concurrent_calls=settings.max_concurrent_calls,
            max_concurrent_streams=settings.max_concurrent_streams,
            stall_s=settings.watch_stall_s,
            max_request_bytes=settings.max_request_bytes,
            max_connections=per_address,
        ),
    )
    recovery = Recovery(
        owner=owner,
        cause=Cause.STARTUP,
        clock=clock,
        limits=_recovery_limits(settings),
        stop=stop,
        sessions=sessions,
        launches=LaunchEnder(
            workspaces=workspaces,
            cgroups=cgroups,
            why="orphan",
            grace_s=settings.orphan_grace_s,
            deadline_s=settings.orphan_deadline_s,
        ),
        trust=trust,
    )
    # Only a second signal interrupts the recovery of a planned stop: it ends the process.
    closing = replace(
        recovery,
        cause=Cause.SHUTDOWN,
        stop=StopSignal(),
        launches=LaunchEnder(
            workspaces=workspaces,
            cgroups=cgroups,
            why="stop",
            grace_s=settings.cancel_grace_s,
            deadline_s=settings.cancel_grace_s + settings.orphan_deadline_s,
        ),
    )
    return Service(
        settings=settings,
        storage=storage,
        owner=owner,
        threads=threads,
        stop=stop,
        status=status,
        gate=gate,
        server=server,
        recovery=recovery,
        closing=closing,
        dispatcher=dispatcher,
        patrol=StragglerSweep(
            storage=storage,
            owner=owner,
            clock=clock,
            turns=turns,
            launcher=launcher,
            stop_signal=stop,
        ),
        deadlines=Deadlines(
            storage=storage, owner=owner, clock=clock, turns=turns, stop_signal=stop
        ),
        trust_sweep=TrustSweep(keeper=trust, threads=threads, stop_signal=stop),
        ownership=ownership,
        containment=containment,
        max_connections=open_files.connections,
    )


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
    except (OSError, UnicodeError):  # to be told when it is listened on
        return 2
    return max(2, len(found))


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


def _recovery_limits(settings: Settings) -> RecoveryLimits:
    return RecoveryLimits(
        batch_rows=settings.recovery_batch_rows,
        batch_s=settings.recovery_batch_s,
        safe_mode_after=settings.safe_mode_after,
        safe_mode_window_s=settings.safe_mode_window_s,
        reopen_window_s=settings.reopen_window_s,
    )
