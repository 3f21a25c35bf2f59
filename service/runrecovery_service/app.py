"""Builds every object of the service, in one place."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

import structlog

from runrecovery_service import early_signals
from runrecovery_service.agents.launch_markers import launch_markers
from runrecovery_service.agents.output import OutputFiles
from runrecovery_service.agents.trust_keeper import OwnConnection, ThroughLoop, TrustKeeper
from runrecovery_service.clock import Clock
from runrecovery_service.config.settings import Settings
from runrecovery_service.daemon_threads import new_event_loop
from runrecovery_service.domain.errors import ContainmentRefused
from runrecovery_service.domain.reconciliation import Cause, Containment
from runrecovery_service.domain.session_check import SessionCheck
from runrecovery_service.engine_setup import build_catalog
from runrecovery_service.engines.catalog import Catalog
from runrecovery_service.execution.deadlines import Deadlines
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.execution.straggler_sweep import StragglerSweep
from runrecovery_service.execution.trust_sweep import TrustSweep
from runrecovery_service.execution.workshop import TreeDeadline, Workshop
from runrecovery_service.lifecycle import Progress, Service, prepare_process, store_kept
from runrecovery_service.locks import Holdings
from runrecovery_service.machine import open_cgroup_parent, plan_open_files
from runrecovery_service.ownership import Ownership, trees_until
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.process.cgroup import CgroupParent
from runrecovery_service.process.ending import Ending
from runrecovery_service.process.host import Host
from runrecovery_service.process.open_files import OpenFiles
from runrecovery_service.process.probe import prove_containment
from runrecovery_service.process.shim_journal import killed_by_shim
from runrecovery_service.process.sweep import end_trees
from runrecovery_service.process.watermark import watermark_bits
from runrecovery_service.recovery.plan import Planner
from runrecovery_service.recovery.startup import ClearTrust, Limits, Recovery
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.listen_address import parse_listen_address
from runrecovery_service.rpc.recovery_service import RecoveryDeps
from runrecovery_service.rpc.run_service import RunDeps, RunLimits
from runrecovery_service.rpc.server import GrpcServer, ServerLimits, build_server
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import instances
from runrecovery_service.storage.adapter import Storage
from runrecovery_service.storage.database import (
    Database,
    Kind,
    open_database,
    refusing,
    repeated,
)
from runrecovery_service.storage.instances import Boot, Owner
from runrecovery_service.storage.processes import Lease, Place
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
    clock = Clock()
    host, data_dir = _host(), held.data_dir
    cgroups = open_cgroup_parent(settings)
    tree_deadline = TreeDeadline(trees_until(settings.lease_ttl_s, boot_time_ns()))
    boot = _boot(settings, held, host)
    ttl_s = settings.lease_ttl_s
    with refusing(db.place):
        owner = repeated(lambda: instances.claim(db, boot, now=clock.now(), ttl_s=ttl_s))
    if db.dialect.kind is Kind.SQLITE:
        db.keep_files()  # this thread's connection stays open, so that the log does
    else:
        db.close()
    log.info("service.epoch_claimed", instance=owner.instance, epoch=owner.epoch)
    storage = Storage(db)
    keeper = _trust_keeper(host, storage, owner, clock)
    shop = _workshop(
        settings,
        data_dir,
        storage,
        owner,
        clock=clock,
        trust=keeper,
        tree_deadline=tree_deadline,
        cgroups=cgroups,
        open_files=open_files,
    )
    stop, progress = StopSignal(), Progress()
    gate = Gate(retry_after_s=settings.retry_hint_s)
    dispatcher = Dispatcher(
        shop=shop, place=_place(host, cgroups), capacity=settings.capacity, fenced=stop.fail
    )
    ownership = Ownership(
        lease_ttl_s=ttl_s, shop=shop, dispatcher=dispatcher, gate=gate, held=held, stop=stop
    )
    db.guard(ownership.demand_current)
    return Service(
        settings=settings,
        shop=shop,
        stop=stop,
        progress=progress,
        gate=gate,
        server=_server(
            settings,
            gate,
            dispatcher,
            max_connections=per_address,
            report_id=lambda: progress.report_id,
            containment=lambda: containment.result() if containment.done() else None,
        ),
        recovery=_recovery(
            settings, shop, stopping=lambda: stop.is_set, containment=containment.result
        ),
        closing=_closing(settings, shop),
        dispatcher=dispatcher,
        patrol=StragglerSweep(
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


def _trust_keeper(host: Host, storage: Storage, owner: Owner, clock: Clock) -> TrustKeeper:
    return TrustKeeper(
        host_id=host.host_id,
        owner=owner,
        store=ThroughLoop(storage, asyncio.get_running_loop()),
        clock=clock,
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
    clock: Clock,
    trust: TrustKeeper,
    tree_deadline: TreeDeadline,
    cgroups: CgroupParent | None,
    open_files: OpenFiles,
) -> Workshop:
    return Workshop(
        storage=storage,
        owner=owner,
        catalog=build_catalog(settings),
        output=OutputFiles(data_dir, max_bytes=settings.max_output_bytes),
        trust=trust,
        threads=SteadyThreadPool(settings.capacity * 4 + 4, thread_name_prefix="process"),
        environ=dict(os.environ),
        tree_deadline=tree_deadline,
        cgroups=cgroups,
        cancel_grace_s=settings.cancel_grace_s,
        exit_grace_s=settings.exit_grace_s,
        soft_open_files=open_files.agents_soft,
        clock=clock,
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
        run_deps=RunDeps(
            storage=shop.storage,
            owner=shop.owner,
            catalog=shop.catalog,
            dispatcher=dispatcher,
            output=shop.output,
            limits=RunLimits(max_queued=settings.max_queued, max_attempts=settings.max_attempts),
            clock=shop.clock,
        ),
        recovery_deps=RecoveryDeps(
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
        clock=shop.clock,
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
        clock=shop.clock,
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
            [launch_markers(lease) for lease in leases],
            why=why,
            grace_s=grace_s,
            deadline_s=deadline_s,
        )
        for lease in leases:
            if endings[lease.key].gone:
                shop.remove_cgroup(lease)
        return {
            lease.key: endings[lease.key].with_shim_kills(
                killed_by_shim(shop.output.shim_journal(lease.run_key, lease.attempt, lease.turn))
            )
            for lease in leases
        }

    return sweep


def _session_checks(catalog: Catalog) -> dict[str, SessionCheck]:
    """Only engines of which it is known where they keep a session can be checked."""
    checks = {name: catalog.get(name).session_check for name in catalog.names}
    return {name: check for name, check in checks.items() if check is not None}
