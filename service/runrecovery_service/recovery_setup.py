"""Builds what decides on runs at a start and at a stop."""

from __future__ import annotations

from dataclasses import replace

from runrecovery_service.agents.end_launches import LaunchEnder
from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.periodic import Backoff
from runrecovery_service.recovery.killed_usage import KilledUsage
from runrecovery_service.recovery.reconcile import Leftovers, Recovery, RecoveryLimits
from runrecovery_service.recovery_runner import RECOVERY_BACKOFF_MOST_S, RecoveryRunner
from runrecovery_service.shared_parts import SharedParts
from runrecovery_service.stop_signal import StopSignal


def build_recovery(parts: SharedParts) -> RecoveryRunner:
    """Return the recoveries of this start and of its stop."""
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
            usage=KilledUsage(catalog=parts.catalog, workspace=parts.workspaces.workspace),
        ),
        tracer=parts.tracer,
    )
    grace_s = settings.cancel_grace_s
    at_stop = replace(
        at_start,
        cause=Cause.SHUTDOWN,
        stop=StopSignal(),  # never set: only a second signal interrupts a stop, by an exit
        leftovers=replace(
            at_start.leftovers,
            launches=_launch_ender(parts, "stop", grace_s, grace_s + settings.orphan_deadline_s),
        ),
    )
    return RecoveryRunner(
        storage=parts.storage,
        at_start=at_start,
        at_stop=at_stop,
        status=parts.status,
        gate=parts.gate,
        stop=parts.stop,
        tries=settings.recovery_tries,
        backoff=Backoff(settings.recovery_backoff_s, RECOVERY_BACKOFF_MOST_S),
    )


def _launch_ender(parts: SharedParts, why: str, grace_s: float, deadline_s: float) -> LaunchEnder:
    return LaunchEnder(
        workspaces=parts.workspaces,
        cgroups=parts.cgroups,
        why=why,
        grace_s=grace_s,
        deadline_s=deadline_s,
    )


def _recovery_limits(settings: Settings) -> RecoveryLimits:
    return RecoveryLimits(
        batch_rows=settings.recovery_batch_rows,
        batch_s=settings.recovery_batch_s,
        safe_mode_after=settings.safe_mode_after,
        safe_mode_window_s=settings.safe_mode_window_s,
        reopen_window_s=settings.reopen_window_s,
    )
