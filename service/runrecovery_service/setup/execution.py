"""Builds the launcher, the dispatcher and the background work."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from runrecovery_service.agents.session_checks import SessionChecker
from runrecovery_service.background_work import BackgroundWork, Sweep
from runrecovery_service.claim import launch_site
from runrecovery_service.execution.deadlines import Deadlines
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.execution.launcher import Launcher
from runrecovery_service.execution.run_queue import RunQueue
from runrecovery_service.execution.straggler_sweep import StragglerSweep
from runrecovery_service.execution.supervisor_factory import SupervisorFactory, TurnRecordsFactory
from runrecovery_service.execution.trust_sweep import TrustSweep
from runrecovery_service.machine_limits import agent_share
from runrecovery_service.setup.shared_parts import SharedParts
from runrecovery_service.setup.upkeep import build_disk_floor

if TYPE_CHECKING:  # a start imports them only if they are configured
    from runrecovery_service.recovery.takeover import TakeoverLoop
    from runrecovery_service.retention.sweep import RetentionSweep


def build_launcher(parts: SharedParts) -> Launcher:
    """Return the launcher of processes."""
    return Launcher(
        workspaces=parts.workspaces,
        trust=parts.trust,
        threads=parts.threads,
        tree_deadline=parts.tree_deadline,
        cgroups=parts.cgroups,
        environ=dict(os.environ),
        cancel_grace_s=parts.settings.cancel_grace_s,
        share=agent_share(parts.settings, parts.open_files),
        processes=parts.machine.processes,
    )


def build_dispatcher(parts: SharedParts, launcher: Launcher) -> Dispatcher:
    """Return the dispatcher, which takes runs from the queue."""
    return Dispatcher(
        queue=RunQueue(
            storage=parts.storage,
            owner=parts.owner,
            clock=parts.clock,
            site=launch_site(parts.host, parts.cgroups),
            catalog=parts.catalog,
            shares_workspaces=parts.settings.shared_workspaces,
        ),
        supervisors=SupervisorFactory(
            records=TurnRecordsFactory(
                storage=parts.storage,
                owner=parts.owner,
                clock=parts.clock,
                meters=parts.meters,
                tracer=parts.tracer,
            ),
            catalog=parts.catalog,
            launcher=launcher,
            output=parts.output,
            sessions=SessionChecker(workspaces=parts.workspaces),
            exit_grace_s=parts.settings.exit_grace_s,
        ),
        launcher=launcher,
        turns=parts.turns,
        capacity=parts.settings.capacity,
        stop_signal=parts.stop,
    )


def build_background_work(
    parts: SharedParts,
    launcher: Launcher,
    dispatcher: Dispatcher,
    retention: RetentionSweep | None,
    takeovers: TakeoverLoop | None,
) -> BackgroundWork:
    """Return the deadlines and the sweeps that run in the background."""
    return BackgroundWork(
        dispatcher=dispatcher,
        deadlines=Deadlines(
            storage=parts.storage,
            owner=parts.owner,
            clock=parts.clock,
            turns=parts.turns,
            stop_signal=parts.stop,
        ),
        sweeps=_sweeps(parts, launcher, dispatcher, retention, takeovers),
        webhooks=parts.webhooks,
        threads=parts.threads,
    )


def _sweeps(
    parts: SharedParts,
    launcher: Launcher,
    dispatcher: Dispatcher,
    retention: RetentionSweep | None,
    takeovers: TakeoverLoop | None,
) -> list[Sweep]:
    stragglers = StragglerSweep(
        storage=parts.storage,
        owner=parts.owner,
        clock=parts.clock,
        turns=parts.turns,
        launcher=launcher,
        stop_signal=parts.stop,
    )
    trust = TrustSweep(keeper=parts.trust, threads=parts.threads, stop_signal=parts.stop)
    disk_floor = build_disk_floor(parts, dispatcher)
    grace_s = parts.settings.cancel_grace_s
    return [
        *(
            []
            if takeovers is None
            else [Sweep(name="takeover", sweeper=takeovers, in_safe_mode=False)]
        ),
        Sweep(name="stragglers", sweeper=stragglers, stop_grace_s=grace_s),
        Sweep(name="trust", sweeper=trust),
        *([] if disk_floor is None else [Sweep(name="disk", sweeper=disk_floor)]),
        *(
            []
            if retention is None
            else [Sweep(name="retention", sweeper=retention, in_safe_mode=False)]
        ),
    ]
