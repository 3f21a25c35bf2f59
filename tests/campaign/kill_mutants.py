"""A service with one thing broken, without a change of its files.

python kill_mutants.py NAME PYTHON -m runrecovery_service serve …
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, NamedTuple

COMMIT_S: Final = 0.05


def answer_early() -> None:
    """Answer before the commit, which a disk that is slow delays."""
    from runrecovery_service.storage.group_commit import GroupCommitWriter

    def commit(self: Any, batch: list[Any]) -> None:
        with self._db.transaction():
            for write in batch:
                write.attempt(self._db)
                write.resolve()
            time.sleep(COMMIT_S)

    GroupCommitWriter._commit = commit  # type: ignore[method-assign]


def skip_oldest() -> None:
    """Recover all runs but the oldest one of each batch."""
    from runrecovery_service.storage import recovery_apply

    next_batch = recovery_apply.next_batch

    def next_but_oldest(db: Any, scope: Any, *, after: int, rows: int) -> Any:
        batch = next_batch(db, scope, after=after, rows=rows)
        if batch is None or batch.rows == 1:
            return None
        return replace(batch, first=batch.first + 1, rows=batch.rows - 1)

    recovery_apply.next_batch = next_but_oldest


class Mutant(NamedTuple):
    """A broken service, and the kind of violation that it causes."""

    break_service: Callable[[], None]
    kind: str


MUTANTS: Final = {
    "early-answer": Mutant(break_service=answer_early, kind="lost write"),
    "skipped-run": Mutant(break_service=skip_oldest, kind="decisions"),
}

if __name__ == "__main__":
    from runrecovery_service.cli import main

    name, _, _, _, *arguments = sys.argv[1:]  # of the service: python -m runrecovery_service
    MUTANTS[name].break_service()
    main(arguments)
