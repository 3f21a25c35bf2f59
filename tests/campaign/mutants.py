"""Mutants: the service with one deliberate defect, patched at its start.

    python mutants.py NAME serve …

The campaign must find a fault with each mutant.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from runrecovery_service.cli import main
from runrecovery_service.process import processes, procfs, shim
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.process.launch_tree import PinnedProcess
from runrecovery_service.process.markers import LaunchMarkers
from runrecovery_service.process.pinned_trees import PinnedTrees
from runrecovery_service.storage import launch_records


def _break(owner: object, name: str, broken: Callable[..., Any]) -> None:
    """Replace an attribute, which must exist."""
    getattr(owner, name)
    setattr(owner, name, broken)


def kill_groups() -> None:
    """Kill orphans by the process group of the recorded pid, which may be reused."""

    def end_groups(launches: Collection[LaunchMarkers], **_: object) -> dict[int, Ending]:
        for launch in launches:
            if launch.pid is not None:
                with suppress(ProcessLookupError):
                    os.killpg(launch.pid, signal.SIGKILL)
        return {launch.launch_key: Ending(gone=True) for launch in launches}

    _break(processes, "end_trees", end_groups)


def forget_watermarks() -> None:
    """Ignore watermarks."""
    _break(procfs, "watermark", lambda _: None)


def skip_rechecks() -> None:
    """Signal a pid without reading the proof again."""

    def believe(
        _: PinnedTrees, pinned: Collection[PinnedProcess], *__: object, **___: object
    ) -> None:
        for each in pinned:
            each.proved = True

    _break(PinnedTrees, "prove", believe)
    _break(PinnedTrees, "read_proof", lambda _, pinned: pinned.member.proof.value)
    _break(shim, "_descent", lambda _: "descent")


def close_on_failure() -> None:
    """Close every launch record at its end, even if processes of the launch live."""
    close, close_late = launch_records.close, launch_records.record_late_end

    def close_anyway(db: Any, launch: Any, ended: launch_records.LaunchEnd, **facts: Any) -> None:
        close(db, launch, replace(ended, gone=True), **facts)

    def close_late_anyway(db: Any, late: Any, **facts: Any) -> None:
        close_late(db, [(key, replace(ended, gone=True)) for key, ended in late], **facts)

    _break(launch_records, "close", close_anyway)
    _break(launch_records, "record_late_end", close_late_anyway)


MUTANTS: Final[dict[str, Callable[[], None]]] = {
    "killpg": kill_groups,
    "no-watermark": forget_watermarks,
    "no-recheck": skip_rechecks,
    "close-on-failure": close_on_failure,
}

if __name__ == "__main__":
    name, _, _, _, *arguments = sys.argv[1:]  # of the service: python -m runrecovery_service
    MUTANTS[name]()
    main(arguments)
