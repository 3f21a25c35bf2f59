"""Builds the objects that several parts of the service share: storage, owner, catalog, gate."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from typing import TYPE_CHECKING

from runrecovery_service.agents.blocking_store import LoopStore
from runrecovery_service.agents.output import OutputFiles
from runrecovery_service.agents.session_checks import session_checks
from runrecovery_service.agents.trust_keeper import TrustKeeper
from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.claim import claim_epoch, this_start
from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.reconciliation import Containment
from runrecovery_service.domain.start_errors import ThreadsRefused
from runrecovery_service.execution.found_ends import EndFinder
from runrecovery_service.execution.lease_deadline import TreeDeadline
from runrecovery_service.execution.running_turns import RunningTurns
from runrecovery_service.lease_renewal import tree_deadline_ns
from runrecovery_service.locks import ServiceLocks, runs_dir
from runrecovery_service.lost_commits import noted_loss
from runrecovery_service.machine import Machine
from runrecovery_service.machine_limits import open_cgroup_parent
from runrecovery_service.metric_counters import Meters
from runrecovery_service.process.open_files import OpenFiles
from runrecovery_service.recovery.bulk_session_check import BulkSessionCheck
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.rpc.call_meter import CallMeter
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.setup.engines import build_catalog
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.webhooks.webhooks import Webhooks

if TYPE_CHECKING:
    from runrecovery_service.spans import Tracer
    from runrecovery_service.webhooks.endpoint import Endpoint


class SharedParts:
    """The objects that recovery, execution, upkeep and RPCs share.

    Building them starts no background task and no server. Make this object on the event loop.
    """

    def __init__(
        self,
        settings: Settings,
        locks: ServiceLocks,
        db: Database,
        probe: Future[Containment],
        open_files: OpenFiles,
        endpoints: Sequence[Endpoint],
        machine: Machine,
    ) -> None:
        """Claim the next epoch, and build the shared objects.

        Raises:
            Held: an instance of this name is alive elsewhere.
            ContainmentRefused: processes cannot be contained on this system.
        """
        self.settings, self.locks, self.db = settings, locks, db
        self.open_files, self.machine = open_files, machine
        db.webhooks = tuple(endpoint.filter for endpoint in endpoints)
        self.stop, self.clock = StopSignal(), machine.clock
        self.meters = Meters()
        self.calls = CallMeter(self.meters) if settings.metrics_listen else None
        self.status = RecoveryStatus(probe, lost_commits=noted_loss(locks.data_dir))
        self.gate = Gate(retry_after_s=settings.retry_hint_s)
        self.host = machine.host()
        self.cgroups = open_cgroup_parent(settings)
        # Before the claim: processes must end before the lease does.
        deadline_ns = tree_deadline_ns(settings.lease_ttl_s, machine.now_ns())
        self.tree_deadline = TreeDeadline(deadline_ns, machine.now_ns)
        self._claim()
        self.catalog = build_catalog(settings)
        self.workspaces = Workspaces(runs_dir(settings, locks.data_dir))
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

    def _claim(self) -> None:
        """Open the storage, start the threads, and claim the next epoch."""
        settings, is_metered = self.settings, self.calls is not None
        start = this_start(settings, self.locks, self.host)
        with ExitStack() as made:  # a refused start leaves no thread behind
            meters = self.meters if is_metered else None
            self.storage = Storage(self.db, meters, self.machine.storage_threads)
            made.callback(self.storage.close)
            self.threads = self.machine.pool(settings.capacity * 4 + 4, "process")
            made.callback(self.threads.shutdown)
            self.tracer = _tracer(settings, self.meters)
            self.started_at = self.clock.now()
            self.owner = claim_epoch(self.db, start, settings.lease_ttl_s, now=self.started_at)
            self.storage.hear_peers(self.owner.instance)
            made.pop_all()


def _tracer(settings: Settings, meters: Meters) -> Tracer | None:
    if settings.traces is None:
        return None
    # Imported here: OpenTelemetry's packages take some 0.2 s.
    from runrecovery_service.traces.setup import build_tracer  # noqa: PLC0415

    try:
        return build_tracer(settings.traces, instance=settings.instance, meters=meters)
    except RuntimeError as error:
        raise ThreadsRefused(str(error)) from error
