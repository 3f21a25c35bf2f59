"""Binds the folder of the runs to one database, by an id in a file.

The folder of a run is named by the integer key of its row. In another database the same key belongs
to another run, and the service would use or remove the wrong folders.
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
    """Check the store id in the folder of the runs; record it if the folder has none.

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
    """Return the problem if the folders of runs belong to another store; None if they do not.

    Args:
        store: the id of the store; None: the store has no id yet.
    """
    place = runs / STORE_FILE
    try:
        found = _read(place)
    except OSError as error:
        return f"{place}: {error.strerror or 'cannot be used'}"
    return f"{place}: {ANOTHER}" if found and found != store else None


def _read(place: Path) -> str:
    """Return the id in the file; empty if the file is missing or was cut short."""
    if not os.path.lexists(place):
        return ""
    text = read_start(place).decode("ascii", "replace")
    return text.strip() if text.endswith("\n") else ""
