"""Ties folders of runs to their store: only the integer key of a run says which folder is its own.

With another database, the folders of living runs would be those of ended or unknown runs.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Final

from runrecovery_service.domain.start_errors import DataDirRefused
from runrecovery_service.process.safe_open import read_start
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.durable_files import durably_write
from runrecovery_service.storage.refusals import refusing
from runrecovery_service.storage.store_identity import store_id

STORE_FILE: Final = ".store"
ANOTHER: Final = (
    "names another database: `data_dir` and `database` do not belong together. Configure the pair"
    " that belongs together, or move runs/ away. If they do belong together, because a backup of"
    " an older version was restored, remove this file"
)


def demand_own_store(db: Database, runs: Path) -> None:
    """Record in the folder of the runs which store they are in, or check that.

    Raises:
        DataDirRefused: the folders of runs belong to another store, or the system refuses access.
        DatabaseRefused: the database cannot be used.
    """
    with refusing(db.name):
        own = store_id(db, new=secrets.token_hex(16))
    place = runs / STORE_FILE
    try:
        found = _read(place)
        if not found:
            place.parent.mkdir(mode=0o700, exist_ok=True)
            durably_write(place, f"{own}\n".encode())
    except OSError as error:
        raise DataDirRefused(str(place), error.strerror or "cannot be used") from error
    if found and found != own:
        raise DataDirRefused(str(place), ANOTHER)


def foreign_folders(store: str | None, runs: Path) -> str | None:
    """Return why a start would find the folders of another store, None if it would not.

    Args:
        store: the id of the store; None: it has none yet.
    """
    place = runs / STORE_FILE
    try:
        found = _read(place)
    except OSError as error:
        return f"{place}: {error.strerror or 'cannot be used'}"
    return f"{place}: {ANOTHER}" if found and found != store else None


def _read(place: Path) -> str:
    """Return the id in the file; nothing if the file was not written to its end."""
    if not os.path.lexists(place):
        return ""
    text = read_start(place).decode("ascii", "replace")
    return text.strip() if text.endswith("\n") else ""
