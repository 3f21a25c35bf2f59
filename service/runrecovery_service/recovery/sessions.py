"""Which session handles can still be resumed by, asked of their engines' checks in bulk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final

from runrecovery_service.storage import converge
from runrecovery_service.storage.converge import Reach, StoredSession
from runrecovery_service.storage.database import Database

SESSIONS_PER_CHECK: Final = 5000
VALID, INVALID = "VALID", "INVALID"

SessionCheck = Callable[[Path, str], bool]
"""True when the handle can be resumed by, given the workspace of the attempt."""

Workspace = Callable[[int, int], Path]
"""Gives the workspace of a run's key and attempt."""


def changed_verdicts(
    db: Database, reach: Reach, checks: Mapping[str, SessionCheck], workspace: Workspace
) -> Iterator[dict[int, str]]:
    """Check the handles of every run that a restart decides on, and yield, in portions and by run
    key, each verdict that is not the one on record."""
    for engine, check in checks.items():
        after = 0
        while stored := converge.sessions_to_check(
            db, reach, engine=engine, after=after, limit=SESSIONS_PER_CHECK
        ):
            found = {one.run_key: _verdict(check, workspace, one) for one in stored}
            yield {one.run_key: v for one in stored if (v := found[one.run_key]) != one.verdict}
            after = stored[-1].run_key


def _verdict(check: SessionCheck, workspace: Workspace, stored: StoredSession) -> str:
    held = check(workspace(stored.run_key, stored.attempt), stored.handle)
    return VALID if held else INVALID
