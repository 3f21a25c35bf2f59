"""Builds retention and the disk floor, which keep the disk from filling up."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runrecovery_service.disk_floor import DiskFloor
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.locks import sqlite_file
from runrecovery_service.rpc.recovery_service import Prune
from runrecovery_service.setup.reload import retention_policy
from runrecovery_service.setup.shared_parts import SharedParts

if TYPE_CHECKING:
    from runrecovery_service.retention.sweep import RetentionSweep


def build_disk_floor(parts: SharedParts, dispatcher: Dispatcher) -> DiskFloor | None:
    """Return the check of free disk space; None if it is not configured."""
    if not parts.settings.min_free_bytes:
        return None
    file = sqlite_file(parts.settings, parts.locks.data_dir)
    return DiskFloor(
        places=(
            parts.locks.data_dir,
            *([parts.workspaces.runs] if parts.settings.runs_dir else []),
            *([] if file is None else [file.parent]),
        ),
        min_free_bytes=parts.settings.min_free_bytes,
        gate=parts.gate,
        dispatcher=dispatcher,
        stop_signal=parts.stop,
    )


def build_retention(parts: SharedParts) -> RetentionSweep | None:
    """Return the sweep that removes old rows and files; None without `[retention]`."""
    settings = parts.settings.retention
    if settings is None:
        return None
    # Imported here: a start without retention needs none of it.
    from runrecovery_service.retention.files import RunFiles  # noqa: PLC0415
    from runrecovery_service.retention.sweep import RetentionSweep  # noqa: PLC0415

    return RetentionSweep(
        policy=retention_policy(settings),
        storage=parts.storage,
        owner=parts.owner,
        clock=parts.clock,
        files=RunFiles(parts.workspaces.runs),
        stop_signal=parts.stop,
    )


def build_prune(sweep: RetentionSweep | None) -> Prune | None:
    """Return the function of the RPC Prune; None without `[retention]`."""
    if sweep is None:
        return None
    from runrecovery_service.retention.prune import Pruner  # noqa: PLC0415 - only with a retention

    return Pruner(sweep=sweep).prune
