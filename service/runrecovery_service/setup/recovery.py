"""Builds the recoveries of a start, of a stop and of takeovers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from runrecovery_service.agents.end_launches import LaunchEnder
from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.execution.output_completer import OutputCompleter
from runrecovery_service.periodic import Backoff
from runrecovery_service.recovery.hand_over import HandOver
from runrecovery_service.recovery.killed_usage import KilledUsage
from runrecovery_service.recovery.reconcile import Leftovers, Recovery, RecoveryLimits
from runrecovery_service.recovery_runner import RECOVERY_BACKOFF_MOST_S, RecoveryRunner
from runrecovery_service.setup.shared_parts import SharedParts
from runrecovery_service.stop_signal import StopSignal

if TYPE_CHECKING:
    from runrecovery_service.recovery.takeover import TakeoverLoop


def build_recovery(parts: SharedParts) -> RecoveryRunner:
    """Return the runner of the recovery at this start, and of the decisions at the planned stop."""
    settings = parts.settings
    at_start = Recovery(
        owner=parts.owner,
        cause=Cause.STARTUP,
        clock=parts.clock,
        limits=_recovery_limits(settings),
        stop=parts.stop,
        leftovers=Leftovers(
            sessions=parts.sessions,
            launches=_launch_ender(
                parts, "orphan", settings.orphan_grace_s, settings.orphan_deadline_s
            ),
            trust=parts.trust,
            find_end=parts.ends.find,
            usage=KilledUsage(
                catalog=parts.catalog,
                workspace=parts.workspaces.workspace,
                output=parts.workspaces.output,
            ),
            outputs=OutputCompleter(
                catalog=parts.catalog,
                workspaces=parts.workspaces,
                output=parts.output,
                boot_id=parts.host.boot_id,
            ),
        ),
        tracer=parts.tracer,
    )
    grace_s = settings.cancel_grace_s
    at_stop = replace(
        at_start,
        cause=Cause.SHUTDOWN,
        stop=StopSignal(),  # never set: only the exit at a second signal interrupts a stop
        leftovers=replace(
            at_start.leftovers,
            launches=_launch_ender(parts, "stop", grace_s, grace_s + settings.orphan_deadline_s),
        ),
    )
    return RecoveryRunner(
        storage=parts.storage,
        at_start=at_start,
        at_stop=at_stop,
        hand_over=_hand_over(parts),
        status=parts.status,
        gate=parts.gate,
        stop=parts.stop,
        tries=settings.recovery_tries,
        backoff=Backoff(settings.recovery_backoff_s, RECOVERY_BACKOFF_MOST_S),
    )


def _hand_over(parts: SharedParts) -> HandOver | None:
    if not parts.storage.is_shared:
        return None
    return HandOver(
        owner=parts.owner,
        clock=parts.clock,
        shares_workspaces=parts.settings.shared_workspaces,
    )


def build_takeovers(
    parts: SharedParts, dispatcher: Dispatcher, runner: RecoveryRunner
) -> TakeoverLoop | None:
    """Return the loop that takes over dead instances; None on a store that is not shared."""
    if not parts.storage.is_shared:
        return None
    # Imported here: a start on SQLite needs none of it.
    from runrecovery_service.recovery.takeover import TakeoverLoop  # noqa: PLC0415
    from runrecovery_service.storage.dead_instances import TakeoverRules  # noqa: PLC0415

    host, settings = parts.host, parts.settings
    here = (host.host_id, host.boot_id, host.pid_namespace)
    return TakeoverLoop(
        storage=parts.storage,
        rules=TakeoverRules(
            owner=parts.owner,
            shares_workspaces=settings.shared_workspaces,
            lease_ttl_s=settings.lease_ttl_s,
            host_return_s=settings.host_return_s,
        ),
        recovery=replace(runner.at_start, cause=Cause.TAKEOVER),
        engines=lambda: parts.catalog.names,
        is_here=lambda launch: (launch.host_id, launch.boot_id, launch.pid_namespace) == here,
        on_taken=dispatcher.check_queue,
        meters=parts.meters,
        stop_signal=parts.stop,
    )


def _launch_ender(parts: SharedParts, why: str, grace_s: float, deadline_s: float) -> LaunchEnder:
    return LaunchEnder(
        workspaces=parts.workspaces,
        cgroups=parts.cgroups,
        why=why,
        grace_s=grace_s,
        deadline_s=deadline_s,
        processes=parts.machine.processes,
    )


def _recovery_limits(settings: Settings) -> RecoveryLimits:
    return RecoveryLimits(
        batch_rows=settings.recovery_batch_rows,
        batch_s=settings.recovery_batch_s,
        safe_mode_after=settings.safe_mode_after,
        safe_mode_window_s=settings.safe_mode_window_s,
        reopen_window_s=settings.reopen_window_s,
    )
