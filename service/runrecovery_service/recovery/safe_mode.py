"""Safe mode: after several unfinished starts in a row, the next start launches no process.

The report of the start stores its mode. In safe mode, `background_work.py` starts neither the
dispatcher, nor the deadlines, nor a sweep whose `in_safe_mode` is False.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from runrecovery_service.storage import reports
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner


def needs_safe_mode(
    db: Database, owner: Owner, *, after: int, window_s: float, now: datetime
) -> bool:
    """Return whether a start must be in safe mode.

    Args:
        after: how many unfinished starts in a row cause safe mode; 0: never safe mode.
        window_s: unfinished starts that are older than this are not counted.
    """
    if not after:
        return False
    since = now - timedelta(seconds=window_s)
    return reports.count_unfinished_starts(db, owner, since) >= after
