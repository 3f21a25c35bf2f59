"""Runs typical statements for the health check, and rolls their changes back.

A successful renewal of the lease proves little, because its row is on one page of a SQLite file. A
damaged page elsewhere can make it impossible to take any run from the queue.
"""

from __future__ import annotations

import secrets
from contextlib import suppress
from datetime import datetime
from typing import Final

import structlog

from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.domain.run import NewRun, Profile, RestartPolicy, RunFilter
from runrecovery_service.domain.steady_time import DueIn, SteadyTime
from runrecovery_service.storage import run_pages, runs, turn_starts
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchSite
from runrecovery_service.storage.postgresql_rights import missing_for_work

_NOWHERE: Final = LaunchSite(host_id="trial", boot_id="", pid_namespace=0)
_UNBOUNDED: Final = 2**40

log = structlog.get_logger()


class _Undo(Exception):
    """Raised to roll the trial back."""


def read_newest_run(db: Database) -> None:
    """Read the newest run, as ListRuns does."""
    run_pages.page(db, RunFilter(), after=None, limit=1)


def demand_rights(db: Database) -> None:
    """Raise if the role lacks a privilege on any table, even on one that is seldom used.

    Raises:
        StorageUnavailable: a privilege or a table is missing.
    """
    if reason := missing_for_work(db):
        log.warning("storage.failed", error=reason, meaning=StorageUnavailable.__name__)
        raise StorageUnavailable


def try_create_and_take(
    db: Database, *, owner: Owner, due_in: DueIn, steady: SteadyTime, now: datetime
) -> None:
    """Create a run and take a run from the queue, as CreateRun and the dispatcher do; roll back."""
    new = NewRun(
        run_id=f"trial-{secrets.token_hex(16)}",
        engine="trial",
        labels={"trial": ""},
        profile=Profile.RESUMABLE,
        restart_policy=RestartPolicy.FAIL,
        max_attempts=1,
        input={},
    )
    with suppress(_Undo), db.transaction():
        runs.create(db, new, owner=owner, max_queued=_UNBOUNDED, receipt=None, now=now)
        turn_starts.take_next(
            db,
            owner=owner,
            busy_engines=(),
            site=_NOWHERE,
            due_in=due_in,
            steady=steady,
            now=now,
        )
        raise _Undo
    db.take_changed_runs()  # a rolled-back trial must not be announced
