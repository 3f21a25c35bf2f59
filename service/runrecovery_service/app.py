"""Builds every object of the service, in the order in which the objects need each other."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import structlog

from runrecovery_service import early_signals
from runrecovery_service.config.settings import Settings
from runrecovery_service.daemon_threads import new_event_loop
from runrecovery_service.data_dir_store import demand_own_store
from runrecovery_service.domain.reconciliation import Containment
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.extras import demand_packages
from runrecovery_service.lease_renewal import LeaseRenewal
from runrecovery_service.lifecycle import Service, store_kept
from runrecovery_service.listeners import Listeners
from runrecovery_service.locks import ServiceLocks, runs_dir
from runrecovery_service.lost_commits import losses_noted
from runrecovery_service.machine import Machine
from runrecovery_service.machine_limits import plan_open_files
from runrecovery_service.ownership import Ownership
from runrecovery_service.process.open_files import OpenFiles
from runrecovery_service.process.probe import prove_containment
from runrecovery_service.process.watermark import watermark_bits
from runrecovery_service.recovery.plan import Planner
from runrecovery_service.reload import ReloadablePart, Reloader
from runrecovery_service.renewal_note import RenewalNote, note_loss_while_down
from runrecovery_service.rpc.listen_address import parse_listen_address
from runrecovery_service.rpc.paging import PageTokens
from runrecovery_service.rpc.recovery_service import RecoveryDeps
from runrecovery_service.rpc.run_service import RunDeps, RunLimits
from runrecovery_service.rpc.server import GrpcServer, start_grpc
from runrecovery_service.rpc.server_setup import Contract, build_contract, build_server
from runrecovery_service.setup.entrance import Entrance
from runrecovery_service.setup.execution import (
    build_background_work,
    build_dispatcher,
    build_launcher,
)
from runrecovery_service.setup.recovery import build_recovery, build_takeovers
from runrecovery_service.setup.reload import reloadable_parts
from runrecovery_service.setup.shared_parts import SharedParts
from runrecovery_service.setup.upkeep import build_prune, build_retention
from runrecovery_service.setup.webhooks import build_endpoints
from runrecovery_service.signal_handlers import Control, prepare_process
from runrecovery_service.steady_thread_pool import SteadyThreadPool
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Renewal
from runrecovery_service.storage.newer_words import demand_known_words
from runrecovery_service.storage.opening import open_database, open_direct
from runrecovery_service.storage.rows import to_us
from runrecovery_service.storage_health import StatementTrials, StorageHealthReporter
from runrecovery_service.systemd import SystemdNotifier

if TYPE_CHECKING:
    from runrecovery_service.http.server import HttpServer
    from runrecovery_service.metrics.http_server import MetricsServer
    from runrecovery_service.retention.sweep import RetentionSweep
    from runrecovery_service.rpc.call_tracer import CallTracer
    from runrecovery_service.spans import Tracer
    from runrecovery_service.webhooks.endpoint import Endpoint

log = structlog.get_logger()


def serve(settings: Settings, load: Callable[[], Settings]) -> None:
    """Run the service until a signal or an error stops it.

    Args:
        load: reads the settings again, for a reload.

    Raises:
        StartRefused: the start is refused, or every try of the recovery failed.
        StoreLost: the process must end without closing its last connection to the SQLite file.
        Fenced: a newer epoch of this instance has taken over.
    """
    prepare_process()
    open_files = plan_open_files(settings)
    open_files.apply()
    demand_packages(settings)
    # Built before anything is claimed, because a name server can take long to answer.
    entrance = Entrance.make(settings, open_files)
    endpoints = build_endpoints(settings)
    with ServiceLocks.acquire(settings) as locks, SteadyThreadPool(1, "probe") as prober:
        early_signals.hold()
        # Checked before the store is migrated and an epoch is claimed. A start on an unusable
        # address must change nothing, and must not count as a start whose recovery never finished.
        parse_listen_address(settings.listen).check_bindable()
        others = (settings.http_listen, settings.probe_listen, settings.metrics_listen)
        for listen in filter(None, others):
            parse_listen_address(listen).check_bindable()
        # Runs in parallel with the rest of the start, because the probe takes some 30 ms.
        probe = prober.submit(prove_containment, watermark_bits())
        db = open_database(settings.database, locks.data_dir, locks=locks.locks)
        try:
            demand_known_words(db, settings.instance)
            demand_own_store(db, runs_dir(settings, locks.data_dir))
            note_loss_while_down(
                db, locks.data_dir, settings.instance, lease_ttl_s=settings.lease_ttl_s
            )
            if settings.database_direct:
                open_direct(settings.database_direct, db)
            with (
                losses_noted(locks.data_dir),
                store_kept(db),
                asyncio.Runner(loop_factory=new_event_loop) as runner,
            ):
                runner.run(_run(settings, load, locks, db, probe, open_files, entrance, endpoints))
        finally:
            db.close()


async def _run(
    settings: Settings,
    load: Callable[[], Settings],
    locks: ServiceLocks,
    db: Database,
    probe: Future[Containment],
    open_files: OpenFiles,
    entrance: Entrance,
    endpoints: Sequence[Endpoint],
) -> None:
    # Before the claim: a start that gets no thread must leave no lease behind.
    start_grpc()
    parts = SharedParts(settings, locks, db, probe, open_files, endpoints, Machine())
    service = _service(parts, entrance, load)
    gc.freeze()  # later collections skip the objects that the start has made
    gc.enable()  # see `cli.main`
    try:
        await service.run()
    finally:
        if parts.tracer is not None:  # stopped last, because the stop itself reports spans
            await parts.tracer.stop()


def _service(parts: SharedParts, entrance: Entrance, load: Callable[[], Settings]) -> Service:
    """Return the service."""
    launcher = build_launcher(parts)
    dispatcher = build_dispatcher(parts, launcher)
    retention = build_retention(parts)
    recovery = build_recovery(parts)
    ownership = _ownership(parts, dispatcher)
    lease = ownership.lease
    parts.db.guard(lease.demand_current, acknowledged=lease.commits.note)
    reloadable = reloadable_parts(
        entrance=entrance,
        catalog=parts.catalog,
        sessions=parts.sessions,
        dispatcher=dispatcher,
        retention=retention,
        webhooks=parts.webhooks,
    )
    metrics = _metrics(parts, ownership, dispatcher, retention, entrance.metrics_connections)
    contract = _contract(parts, entrance, retention)
    return Service(
        settings=parts.settings,
        stop=parts.stop,
        gate=parts.gate,
        control=_control(parts, load, reloadable),
        listeners=Listeners(
            settings=parts.settings,
            server=_server(parts, entrance, contract),
            http=_http(parts, entrance, contract),
            max_connections=entrance.connections,
            probe=entrance.probe(parts.gate),
            metrics=metrics,
        ),
        ownership=ownership,
        recovery_runner=recovery,
        work=build_background_work(
            parts, launcher, dispatcher, retention, build_takeovers(parts, dispatcher, recovery)
        ),
    )


def _control(
    parts: SharedParts, load: Callable[[], Settings], reloadable: Sequence[ReloadablePart]
) -> Control:
    systemd = SystemdNotifier.from_environment(parts.gate, os.environ)
    return Control(
        stop_signal=parts.stop,
        reloader=Reloader(settings=parts.settings, load=load, parts=reloadable, systemd=systemd),
        systemd=systemd,
    )


def _metrics(
    parts: SharedParts,
    ownership: Ownership,
    dispatcher: Dispatcher,
    retention: RetentionSweep | None,
    max_connections: int,
) -> MetricsServer | None:
    if parts.calls is None:
        return None
    # Imported here: prometheus-client takes some 0.05 s.
    from runrecovery_service.metrics.setup import Sources, build_metrics  # noqa: PLC0415

    sources = Sources(
        ownership=ownership,
        gate=parts.gate,
        dispatcher=dispatcher,
        status=parts.status,
        calls=parts.calls,
        webhooks=parts.webhooks,
        retention=retention,
    )
    return build_metrics(sources, parts.clock, max_connections=max_connections)


def _ownership(parts: SharedParts, dispatcher: Dispatcher) -> Ownership:
    health = StorageHealthReporter(parts.gate)
    ttl_s = parts.settings.lease_ttl_s
    return Ownership(
        lease=LeaseRenewal(
            lease_ttl_s=ttl_s,
            storage=parts.storage,
            owner=parts.owner,
            catalog=parts.catalog,
            turns=parts.turns,
            health=health,
            stop=parts.stop,
            note=_renewal_note(parts),
        ),
        trials=StatementTrials(
            lease_ttl_s=ttl_s,
            storage=parts.storage,
            owner=parts.owner,
            clock=parts.clock,
            dispatcher=dispatcher,
            gate=parts.gate,
            health=health,
            stop=parts.stop,
        ),
        storage=parts.storage,
        owner=parts.owner,
        locks=parts.locks,
        stop=parts.stop,
    )


def _renewal_note(parts: SharedParts) -> RenewalNote | None:
    if not parts.storage.is_shared:  # a SQLite file has its own count of commits
        return None
    owner = parts.owner
    start = Renewal(instance=owner.instance, epoch=owner.epoch, started_us=to_us(parts.started_at))
    return RenewalNote(parts.locks.data_dir, start)


def _contract(parts: SharedParts, entrance: Entrance, retention: RetentionSweep | None) -> Contract:
    settings = parts.settings
    page_tokens = PageTokens.of_store(parts.db)
    return build_contract(
        parts.gate,
        run_deps=RunDeps(
            storage=parts.storage,
            owner=parts.owner,
            catalog=parts.catalog,
            workspaces=parts.workspaces,
            output=parts.output,
            limits=RunLimits(max_queued=settings.max_queued, max_attempts=settings.max_attempts),
            clock=parts.clock,
            page_tokens=page_tokens,
        ),
        recovery_deps=RecoveryDeps(
            storage=parts.storage,
            owner=parts.owner,
            status=parts.status,
            planner=Planner(
                owner=parts.owner,
                sessions=parts.sessions,
                clock=parts.clock,
                find_end=parts.ends.find,
            ),
            page_tokens=page_tokens,
            prune=build_prune(retention),
            webhooks=parts.webhooks,
        ),
        limits=entrance.limits(settings),
        guard=entrance.guard,
        meter=parts.calls,
        tracer=_call_tracer(parts.tracer),
    )


def _server(parts: SharedParts, entrance: Entrance, contract: Contract) -> GrpcServer:
    return build_server(
        parts.gate,
        contract,
        limits=entrance.limits(parts.settings),
        tls=entrance.tls,
        guard=entrance.guard,
        public_reflection=parts.settings.public_reflection,
    )


def _http(parts: SharedParts, entrance: Entrance, contract: Contract) -> HttpServer | None:
    if not parts.settings.http_listen:
        return None
    # Imported here: uvicorn takes some 0.05 s.
    from runrecovery_service.setup.http import build_http  # noqa: PLC0415

    return build_http(
        parts.settings,
        contract,
        parts.gate,
        tls=entrance.tls,
        guard=entrance.guard,
        max_connections=entrance.http_connections,
    )


def _call_tracer(tracer: Tracer | None) -> CallTracer | None:
    if tracer is None:
        return None
    from runrecovery_service.rpc.call_tracer import CallTracer  # noqa: PLC0415 - only for traces

    return CallTracer(tracer)
