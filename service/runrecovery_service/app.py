"""Builds every object of the service, in the order in which the objects need each other."""

from __future__ import annotations

import asyncio
import gc
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from runrecovery_service import early_signals
from runrecovery_service.agents.blocking_store import LoopStore
from runrecovery_service.agents.end_launches import LaunchEnder
from runrecovery_service.agents.output import OutputFiles
from runrecovery_service.agents.session_checks import SessionChecker, session_checks
from runrecovery_service.agents.trust_keeper import TrustKeeper
from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.claim import claim_epoch, launch_site, this_host, this_start
from runrecovery_service.clock import Clock
from runrecovery_service.config.settings import Settings
from runrecovery_service.daemon_threads import new_event_loop
from runrecovery_service.data_dir_store import demand_own_store
from runrecovery_service.disk_floor import DiskFloor
from runrecovery_service.domain.reconciliation import Cause, Containment
from runrecovery_service.engine_setup import build_catalog
from runrecovery_service.entrance import Entrance
from runrecovery_service.execution.deadlines import Deadlines
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.execution.found_ends import EndFinder
from runrecovery_service.execution.launcher import Launcher
from runrecovery_service.execution.run_queue import RunQueue
from runrecovery_service.execution.running_turns import RunningTurns
from runrecovery_service.execution.straggler_sweep import StragglerSweep
from runrecovery_service.execution.supervisor_factory import SupervisorFactory
from runrecovery_service.execution.tree_deadline import TreeDeadline
from runrecovery_service.execution.trust_sweep import TrustSweep
from runrecovery_service.extras import demand_packages
from runrecovery_service.lifecycle import (
    RECOVERY_BACKOFF_MOST_S,
    BackgroundWork,
    RecoveryRunner,
    Service,
    prepare_process,
    store_kept,
)
from runrecovery_service.locks import ServiceLocks, sqlite_file
from runrecovery_service.machine_limits import agent_share, open_cgroup_parent, plan_open_files
from runrecovery_service.meters import Meters
from runrecovery_service.ownership import (
    LeaseRenewal,
    Ownership,
    StatementTrials,
    StorageHealthReporter,
    tree_deadline_ns,
)
from runrecovery_service.periodic import Backoff
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.process.open_files import OpenFiles
from runrecovery_service.process.probe import prove_containment
from runrecovery_service.process.watermark import watermark_bits
from runrecovery_service.recovery.bulk_session_check import BulkSessionCheck
from runrecovery_service.recovery.plan import Planner
from runrecovery_service.recovery.reconcile import Recovery, RecoveryLimits
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.reload import Reloader
from runrecovery_service.reload_setup import reloadable_parts, retention_policy
from runrecovery_service.rpc.call_meter import CallMeter
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.listen_address import parse_listen_address
from runrecovery_service.rpc.recovery_service import Prune, RecoveryDeps
from runrecovery_service.rpc.run_service import RunDeps, RunLimits
from runrecovery_service.rpc.server import GrpcServer, ServerLimits, build_server, start_grpc
from runrecovery_service.steady_thread_pool import SteadyThreadPool
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.opening import open_database
from runrecovery_service.systemd import SystemdNotifier
from runrecovery_service.webhook_setup import build_endpoints
from runrecovery_service.webhooks.webhooks import Webhooks

if TYPE_CHECKING:
    from runrecovery_service.metrics.http_server import MetricsServer
    from runrecovery_service.retention.sweep import RetentionSweep
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
    # Before anything is claimed: a name server that does not answer takes long.
    entrance = Entrance.make(settings, open_files)
    endpoints = build_endpoints(settings)
    with ServiceLocks.acquire(settings) as locks, SteadyThreadPool(1, "probe") as prober:
        early_signals.hold()
        # Before the store is migrated and an epoch is claimed: a start that no client could reach
        # must change nothing, and must not count as a start without a finished recovery.
        parse_listen_address(settings.listen).check_bindable()
        for listen in filter(None, (settings.probe_listen, settings.metrics_listen)):
            parse_listen_address(listen).check_bindable()
        # Beside the rest of the start: the probe waits some 30 ms for processes.
        probe = prober.submit(prove_containment, watermark_bits())
        db = open_database(settings.database, locks.data_dir, locks=locks.locks)
        try:
            demand_own_store(db, locks.data_dir)
            with store_kept(db), asyncio.Runner(loop_factory=new_event_loop) as runner:
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
    app = _App(settings, locks, db, probe, open_files, endpoints)
    service = app.service(entrance, load)
    gc.freeze()  # later collections need not look at what every start imports and makes
    gc.enable()  # see `cli.main`
    await service.run()


class _App:
    """Builds the parts of one service, in the order in which they need each other.

    Nothing runs before `service` returns. Make this object on the event loop.
    """

    def __init__(
        self,
        settings: Settings,
        locks: ServiceLocks,
        db: Database,
        probe: Future[Containment],
        open_files: OpenFiles,
        endpoints: Sequence[Endpoint],
    ) -> None:
        """Claim the next epoch, and build what the larger parts have in common.

        Raises:
            Held: an instance of this name is alive elsewhere.
            ContainmentRefused: processes cannot be contained on this system.
        """
        self.settings, self.locks, self.db = settings, locks, db
        self.open_files = open_files
        db.webhooks = tuple(endpoint.filter for endpoint in endpoints)
        self.stop, self.clock = StopSignal(), Clock()
        self.meters = Meters()
        self.calls = CallMeter(self.meters) if settings.metrics_listen else None
        self.status = RecoveryStatus(probe)
        self.gate = Gate(retry_after_s=settings.retry_hint_s)
        self.host = this_host()
        self.cgroups = open_cgroup_parent(settings)
        # Before the claim: processes must end before the lease does.
        deadline_ns = tree_deadline_ns(settings.lease_ttl_s, boot_time_ns())
        self.tree_deadline = TreeDeadline(deadline_ns)
        # Before the claim as well: a start that gets no thread must leave no lease behind.
        start_grpc()
        boot = this_start(settings, locks, self.host)
        with ExitStack() as made:  # a refused start ends at once: no thread may be left
            self.storage = Storage(db, self.meters if settings.metrics_listen else None)
            made.callback(self.storage.close)
            self.threads = SteadyThreadPool(settings.capacity * 4 + 4, thread_name_prefix="process")
            made.callback(self.threads.shutdown)
            self.owner = claim_epoch(db, boot, self.clock, settings.lease_ttl_s)
            made.pop_all()
        self.catalog = build_catalog(settings)
        self.workspaces = Workspaces(locks.data_dir)
        self.output = OutputFiles(self.workspaces, max_bytes=settings.max_output_bytes)
        self.ends = EndFinder(
            catalog=self.catalog,
            workspaces=self.workspaces,
            output=self.output,
            boot_id=self.host.boot_id,
        )
        self.trust = TrustKeeper(
            host_id=self.host.host_id,
            owner=self.owner,
            store=LoopStore(self.storage, asyncio.get_running_loop()),
            clock=self.clock,
        )
        self.turns = RunningTurns(tree_deadline=self.tree_deadline)
        self.sessions = BulkSessionCheck(
            checks=session_checks(self.catalog), workspace=self.workspaces.workspace
        )
        self.webhooks = Webhooks(
            db=db,
            storage=self.storage,
            owner=self.owner,
            clock=self.clock,
            stop_signal=self.stop,
            endpoints=endpoints,
            meters=self.meters,
        )

    def service(self, entrance: Entrance, load: Callable[[], Settings]) -> Service:
        """Return the service."""
        launcher = self._launcher()
        dispatcher = self._dispatcher(launcher)
        ownership = self._ownership(dispatcher)
        self.db.guard(ownership.lease.demand_current)
        work = self._background_work(launcher, dispatcher)
        systemd = SystemdNotifier.from_environment(self.gate, os.environ)
        return Service(
            settings=self.settings,
            stop=self.stop,
            gate=self.gate,
            server=self._server(entrance, work.retention),
            ownership=ownership,
            recovery_runner=self._recovery_runner(),
            work=work,
            systemd=systemd,
            reloader=Reloader(
                settings=self.settings,
                load=load,
                parts=reloadable_parts(
                    entrance=entrance,
                    catalog=self.catalog,
                    sessions=self.sessions,
                    dispatcher=dispatcher,
                    retention=work.retention,
                    webhooks=self.webhooks,
                ),
                systemd=systemd,
            ),
            max_connections=entrance.connections,
            probe=entrance.probe(self.gate),
            metrics=self._metrics(ownership, work, entrance.metrics_connections),
        )

    def _metrics(
        self, ownership: Ownership, work: BackgroundWork, max_connections: int
    ) -> MetricsServer | None:
        if self.calls is None:
            return None
        # Imported here: prometheus-client takes some 0.05 s.
        from runrecovery_service.metrics.setup import Sources, build_metrics  # noqa: PLC0415

        sources = Sources(
            ownership=ownership,
            gate=self.gate,
            dispatcher=work.dispatcher,
            status=self.status,
            calls=self.calls,
            webhooks=self.webhooks,
            retention=work.retention,
        )
        return build_metrics(sources, self.clock, max_connections=max_connections)

    def _launcher(self) -> Launcher:
        return Launcher(
            workspaces=self.workspaces,
            trust=self.trust,
            threads=self.threads,
            tree_deadline=self.tree_deadline,
            cgroups=self.cgroups,
            environ=dict(os.environ),
            cancel_grace_s=self.settings.cancel_grace_s,
            share=agent_share(self.settings, self.open_files),
        )

    def _dispatcher(self, launcher: Launcher) -> Dispatcher:
        return Dispatcher(
            queue=RunQueue(
                storage=self.storage,
                owner=self.owner,
                clock=self.clock,
                site=launch_site(self.host, self.cgroups),
            ),
            supervisors=SupervisorFactory(
                storage=self.storage,
                owner=self.owner,
                clock=self.clock,
                catalog=self.catalog,
                launcher=launcher,
                output=self.output,
                sessions=SessionChecker(workspaces=self.workspaces),
                meters=self.meters,
                exit_grace_s=self.settings.exit_grace_s,
            ),
            launcher=launcher,
            turns=self.turns,
            capacity=self.settings.capacity,
            stop_signal=self.stop,
        )

    def _ownership(self, dispatcher: Dispatcher) -> Ownership:
        health = StorageHealthReporter(self.gate)
        ttl_s = self.settings.lease_ttl_s
        return Ownership(
            lease=LeaseRenewal(
                lease_ttl_s=ttl_s,
                storage=self.storage,
                owner=self.owner,
                turns=self.turns,
                health=health,
                stop=self.stop,
            ),
            trials=StatementTrials(
                lease_ttl_s=ttl_s,
                storage=self.storage,
                owner=self.owner,
                clock=self.clock,
                dispatcher=dispatcher,
                gate=self.gate,
                health=health,
                stop=self.stop,
            ),
            storage=self.storage,
            owner=self.owner,
            locks=self.locks,
            stop=self.stop,
        )

    def _server(self, entrance: Entrance, retention: RetentionSweep | None) -> GrpcServer:
        settings = self.settings
        return build_server(
            self.gate,
            run_deps=RunDeps(
                storage=self.storage,
                owner=self.owner,
                catalog=self.catalog,
                workspaces=self.workspaces,
                output=self.output,
                limits=RunLimits(
                    max_queued=settings.max_queued, max_attempts=settings.max_attempts
                ),
                clock=self.clock,
            ),
            recovery_deps=RecoveryDeps(
                storage=self.storage,
                owner=self.owner,
                status=self.status,
                planner=Planner(
                    owner=self.owner,
                    sessions=self.sessions,
                    clock=self.clock,
                    find_end=self.ends.find,
                ),
                prune=_pruning(retention),
                webhooks=self.webhooks,
            ),
            limits=ServerLimits(
                max_concurrent_calls=settings.max_concurrent_calls,
                max_concurrent_streams=settings.max_concurrent_streams,
                stall_s=settings.watch_stall_s,
                max_request_bytes=settings.max_request_bytes,
                max_connections=entrance.per_address,
            ),
            tls=entrance.tls,
            guard=entrance.guard,
            public_reflection=settings.public_reflection,
            meter=self.calls,
        )

    def _recovery_runner(self) -> RecoveryRunner:
        settings = self.settings
        at_start = Recovery(
            owner=self.owner,
            cause=Cause.STARTUP,
            clock=self.clock,
            limits=_recovery_limits(settings),
            stop=self.stop,
            sessions=self.sessions,
            launches=self._launch_ender(
                "orphan", settings.orphan_grace_s, settings.orphan_deadline_s
            ),
            trust=self.trust,
            find_end=self.ends.find,
        )
        grace_s = settings.cancel_grace_s
        at_stop = replace(
            at_start,
            cause=Cause.SHUTDOWN,
            stop=StopSignal(),  # never set: only a second signal interrupts a stop, by an exit
            launches=self._launch_ender("stop", grace_s, grace_s + settings.orphan_deadline_s),
        )
        return RecoveryRunner(
            storage=self.storage,
            at_start=at_start,
            at_stop=at_stop,
            status=self.status,
            gate=self.gate,
            stop=self.stop,
            tries=settings.recovery_tries,
            backoff=Backoff(settings.recovery_backoff_s, RECOVERY_BACKOFF_MOST_S),
        )

    def _launch_ender(self, why: str, grace_s: float, deadline_s: float) -> LaunchEnder:
        return LaunchEnder(
            workspaces=self.workspaces,
            cgroups=self.cgroups,
            why=why,
            grace_s=grace_s,
            deadline_s=deadline_s,
        )

    def _background_work(self, launcher: Launcher, dispatcher: Dispatcher) -> BackgroundWork:
        return BackgroundWork(
            retention=self._retention(),
            disk_floor=self._disk_floor(dispatcher),
            dispatcher=dispatcher,
            straggler_sweep=StragglerSweep(
                storage=self.storage,
                owner=self.owner,
                clock=self.clock,
                turns=self.turns,
                launcher=launcher,
                stop_signal=self.stop,
            ),
            deadlines=Deadlines(
                storage=self.storage,
                owner=self.owner,
                clock=self.clock,
                turns=self.turns,
                stop_signal=self.stop,
            ),
            trust_sweep=TrustSweep(keeper=self.trust, threads=self.threads, stop_signal=self.stop),
            threads=self.threads,
            webhooks=self.webhooks,
        )

    def _disk_floor(self, dispatcher: Dispatcher) -> DiskFloor | None:
        if not self.settings.min_free_bytes:
            return None
        file = sqlite_file(self.settings, self.locks.data_dir)
        return DiskFloor(
            places=(self.locks.data_dir, *([] if file is None else [file.parent])),
            min_free_bytes=self.settings.min_free_bytes,
            gate=self.gate,
            dispatcher=dispatcher,
            stop_signal=self.stop,
        )

    def _retention(self) -> RetentionSweep | None:
        settings = self.settings.retention
        if settings is None:
            return None
        # Imported here: a start without retention needs none of it.
        from runrecovery_service.retention.files import RunFiles  # noqa: PLC0415
        from runrecovery_service.retention.sweep import RetentionSweep  # noqa: PLC0415

        return RetentionSweep(
            policy=retention_policy(settings),
            storage=self.storage,
            owner=self.owner,
            clock=self.clock,
            files=RunFiles(self.workspaces.runs),
            stop_signal=self.stop,
        )


def _pruning(sweep: RetentionSweep | None) -> Prune | None:
    if sweep is None:
        return None
    from runrecovery_service.retention.prune import Pruner  # noqa: PLC0415 - as the sweep

    return Pruner(sweep=sweep).prune


def _recovery_limits(settings: Settings) -> RecoveryLimits:
    return RecoveryLimits(
        batch_rows=settings.recovery_batch_rows,
        batch_s=settings.recovery_batch_s,
        safe_mode_after=settings.safe_mode_after,
        safe_mode_window_s=settings.safe_mode_window_s,
        reopen_window_s=settings.reopen_window_s,
    )
