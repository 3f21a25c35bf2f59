"""Completes the output files of killed turns, by an interface that `execution/` implements."""

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
    """Appends the last output of agents to the output files of their turns. Blocking."""

    def has_rest(self, launch: LaunchRecord) -> bool:
        """Return whether the shim of a launch has saved output that its service did not write."""
        ...

    def complete(self, turn: OpenTurn) -> None:
        """Append the saved output to the output file of the turn."""
        ...


def complete_outputs(
    db: Database, outputs: CompletesOutput, launches: Sequence[LaunchRecord], stop: StopSignal
) -> None:
    """Complete the output of launches whose shims have ended.

    Raises:
        RecoveryInterrupted: a stop was requested.
    """
    for launch in filter(outputs.has_rest, launches):
        if stop.is_set():
            raise RecoveryInterrupted
        if (turn := found_ends.turn_of(db, launch)) is not None:
            outputs.complete(turn)
