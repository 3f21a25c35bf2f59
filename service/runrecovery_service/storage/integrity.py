"""The full check of a SQLite file. The service need not run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Final

from runrecovery_service.domain.start_errors import DatabaseRefused
from runrecovery_service.storage import quick_check
from runrecovery_service.storage.driver_errors import REPAIR_HINT
from runrecovery_service.storage.migrate import APPLIED_SQL, describe_misfit, known_migrations
from runrecovery_service.storage.refusals import refusing
from runrecovery_service.storage.sqlite_file import connect_read_only, lost_commits
from runrecovery_service.storage.sqlite_header import check_header

NO_TABLES: Final = "has none of the service's tables; restore a backup"


def integrity_problems(path: Path) -> list[str]:
    """Return every problem of a SQLite store, one sentence each. The store is only read."""
    try:
        with refusing(str(path)):
            check_header(path)
            if reason := lost_commits(path):
                return [f"{path}: {reason}"]
            with contextlib.closing(connect_read_only(path)) as connection:
                found = [row[0] for row in connection.execute("PRAGMA integrity_check(20)")]
                if quick_check.lacks_tables(connection):
                    return [f"{path}: {NO_TABLES}"]
                if found == ["ok"]:
                    applied = dict(connection.execute(APPLIED_SQL).fetchall())
                    reason = describe_misfit(applied, known_migrations(), has_runs=True)
                    return [f"{path}: {reason}"] if reason else []
    except DatabaseRefused as error:
        return [str(error)]
    return [f"{path}: is damaged ({quick_check.one_line(one)}); {REPAIR_HINT}" for one in found]
