"""Services that sync too little, which the campaign must detect.

python mutants.py NAME -m runrecovery_service serve …
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True, slots=True)
class SyncMutant:
    """A change of the service, and the kinds of violation of which it must cause one."""

    apply: Callable[[], None]
    kinds: frozenset[str]


def _commits_not_synced() -> None:
    from runrecovery_service.storage import sqlite_file

    sqlite_file.SQLITE_PRAGMAS["synchronous"] = 1


def _never_synced() -> None:
    from runrecovery_service.storage import sqlite_file

    sqlite_file.SQLITE_PRAGMAS["synchronous"] = 0


MUTANTS: Final[Mapping[str, SyncMutant]] = {
    "commits-not-synced": SyncMutant(_commits_not_synced, frozenset({"lost"})),
    "never-synced": SyncMutant(_never_synced, frozenset({"damaged", "refused"})),
}


def mutated(name: str | None, command: Sequence[str]) -> list[str]:
    """Return what stands before the command of a service, so that it has the mutant."""
    return [*command, *([] if name is None else [sys.executable, __file__, name])]


if __name__ == "__main__":
    # What follows is `python -m module arguments…`.
    _, mutant, _, _, module, *arguments = sys.argv
    sys.path[:] = [entry for entry in sys.path if Path(entry) != Path(__file__).parent]
    MUTANTS[mutant].apply()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
