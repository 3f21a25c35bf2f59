"""Builds what launches and follows processes."""

from __future__ import annotations

import os

from runrecovery_service.agents.session_checks import SessionChecker
from runrecovery_service.claim import launch_site
from runrecovery_service.execution.deadlines import Deadlines
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.execution.launcher import Launcher
from runrecovery_service.execution.run_queue import RunQueue
from runrecovery_service.execution.straggler_sweep import StragglerSweep
from runrecovery_service.execution.supervisor_factory import SupervisorFactory
from runrecovery_service.execution.trust_sweep import TrustSweep
from runrecovery_service.lifecycle import BackgroundWork
from runrecovery_service.machine_limits import agent_share
from runrecovery_service.shared_parts import SharedParts
from runrecovery_service.upkeep_setup import build_disk_floor, build_retention


def build_launcher(parts: SharedParts) -> Launcher:
    """Return what launches processes."""
    return Launcher(
        workspaces=parts.workspaces,
        trust=parts.trust,
        threads=parts.threads,
        tree_deadline=parts.tree_deadline,
        cgroups=parts.cgroups,
        environ=dict(os.environ),
        cancel_grace_s=parts.settings.cancel_grace_s,
        share=agent_share(parts.settings, parts.open_files),
    )


def build_dispatcher(parts: SharedParts, launcher: Launcher) -> Dispatcher:
    """Return what takes runs from the queue."""
    return Dispatcher(
        queue=RunQueue(
            storage=parts.storage,
            owner=parts.owner,
            clock=parts.clock,
            site=launch_site(parts.host, parts.cgroups),
        ),
        supervisors=SupervisorFactory(
            storage=parts.storage,
            owner=parts.owner,
            clock=parts.clock,
            catalog=parts.catalog,
            launcher=launcher,
            output=parts.output,
            sessions=SessionChecker(workspaces=parts.workspaces),
            meters=parts.meters,
            tracer=parts.tracer,
            exit_grace_s=parts.settings.exit_grace_s,
        ),
        launcher=launcher,
        turns=parts.turns,
        capacity=parts.settings.capacity,
        stop_signal=parts.stop,
    )


def build_background_work(
    parts: SharedParts, launcher: Launcher, dispatcher: Dispatcher
) -> BackgroundWork:
    """Return what works beside the calls."""
    return BackgroundWork(
        retention=build_retention(parts),
        disk_floor=build_disk_floor(parts, dispatcher),
        dispatcher=dispatcher,
        straggler_sweep=StragglerSweep(
            storage=parts.storage,
            owner=parts.owner,
            clock=parts.clock,
            turns=parts.turns,
            launcher=launcher,
            stop_signal=parts.stop,
        ),
        deadlines=Deadlines(
            storage=parts.storage,
            owner=parts.owner,
            clock=parts.clock,
            turns=parts.turns,
            stop_signal=parts.stop,
        ),
        trust_sweep=TrustSweep(keeper=parts.trust, threads=parts.threads, stop_signal=parts.stop),
        threads=parts.threads,
        webhooks=parts.webhooks,
    )
