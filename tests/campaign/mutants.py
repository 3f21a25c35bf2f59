"""The service with one thing broken, without a change of its files.

    python mutants.py NAME serve …

A campaign that does not find out which one was broken is worth nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from runrecovery_service.agents import end_launches
from runrecovery_service.cli import main
from runrecovery_service.process import procfs, shim
from runrecovery_service.process.ending import Ending
from runrecovery_service.process.launch_tree import PinnedProcess
from runrecovery_service.process.markers import LaunchMarkers
from runrecovery_service.process.pinned_trees import PinnedTrees
from runrecovery_service.storage import launch_records


def _break(owner: object, name: str, broken: Callable[..., Any]) -> None:
    """Put something broken in the place of what is there, and must be."""
    getattr(owner, name)
    setattr(owner, name, broken)


def kill_groups() -> None:
    """End orphans by the process group of the recorded pid, whatever that is by now."""

    def end_groups(leases: Collection[LaunchMarkers], **_: object) -> dict[int, Ending]:
        for lease in leases:
            if lease.pid is not None:
                with suppress(ProcessLookupError):
                    os.killpg(lease.pid, signal.SIGKILL)
        return {lease.launch_key: Ending(gone=True) for lease in leases}

    _break(end_launches, "end_trees", end_groups)


def forget_watermarks() -> None:
    """Do not see the mark that nobody can lose by accident."""
    _break(procfs, "watermark", lambda _: None)


def skip_rechecks() -> None:
    """Signal whoever is there now where evidence was seen a moment ago."""

    def believe(
        _: PinnedTrees, pinned: Collection[PinnedProcess], *__: object, **___: object
    ) -> None:
        for each in pinned:
            each.proved = True

    _break(PinnedTrees, "prove", believe)
    _break(PinnedTrees, "read_proof", lambda _, pinned: pinned.member.proof.value)
    _break(shim, "_descent", lambda _: "descent")


def close_on_failure() -> None:
    """Close every lease that is over, whatever is alive of it."""
    close, close_late = launch_records.close, launch_records.record_late_end

    def close_anyway(db: Any, lease: Any, ended: launch_records.LaunchEnd, **facts: Any) -> None:
        close(db, lease, replace(ended, gone=True), **facts)

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
    name, *arguments = sys.argv[1:]
    MUTANTS[name]()
    main(arguments)
