"""Completes the kept output of killed turns. `execution/` appends to the files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from runrecovery_service.domain.start_errors import RecoveryInterrupted
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import found_ends
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.found_ends import OpenTurn
from runrecovery_service.storage.launch_records import LaunchRecord


class CompletesOutput(Protocol):
    """Completes the kept output of turns with what their agents had printed last. Blocking."""

    def has_rest(self, launch: LaunchRecord) -> bool:
        """Return True if the shim of a launch has saved output that its service had not kept."""
        ...

    def complete(self, turn: OpenTurn) -> None:
        """Append that output to the kept output."""
        ...


def complete_outputs(
    db: Database, outputs: CompletesOutput, launches: Sequence[LaunchRecord], stop: StopSignal
) -> None:
    """Complete the output of launches whose shims have ended.

    Raises:
        RecoveryInterrupted: the service is to stop.
    """
    for launch in filter(outputs.has_rest, launches):
        if stop.is_set():
            raise RecoveryInterrupted
        if (turn := found_ends.turn_of(db, launch)) is not None:
            outputs.complete(turn)
