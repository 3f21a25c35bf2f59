"""Two versions on one PostgreSQL database: the newer one migrates it while the older one runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import runrecovery_service
from runrecovery.v1 import run_pb2
from runrecovery_service.storage import migrate
from support.engines import GOOD_ENGINES
from support.service import Home
from support.stores import change, query

STEP = """
from typing import Final

COMPATIBLE_SINCE: Final = "{since}"


def up(migrator: object, db: object) -> None:
    db.execute_sql("ALTER TABLE run ADD COLUMN mood TEXT NOT NULL DEFAULT 'calm'")
"""


ASKS: dict[str, list[object]] = {"questions": [{}]}


def newer_version(folder: Path) -> dict[str, str]:
    """Copy this version and add a compatible step; return the environment that starts the copy."""
    package = Path(runrecovery_service.__file__).parent
    copied = folder / package.name
    shutil.copytree(package, copied, ignore=shutil.ignore_patterns("__pycache__"))
    step = STEP.format(since=max(migrate.known_migrations()))
    (copied / "storage" / "migrations" / "9999_newer.py").write_text(step)
    return {"PYTHONPATH": str(folder)}


def test_an_older_version_works_on_and_restarts_beside_a_newer_one(
    new_home: Callable[..., Home], postgresql_url: str, tmp_path: Path
) -> None:
    older = new_home(database=postgresql_url, instance="older", engines=GOOD_ENGINES)
    newer = new_home(
        database=postgresql_url,
        instance="newer",
        engines=GOOD_ENGINES,
        env=newer_version(tmp_path),
        may_fork=False,
    )
    service, api = older.start()
    answered, waits = api.create("resumable", ASKS), api.create("resumable", ASKS)
    for run in (answered, waits):
        api.until_status(run.run_id, "WAITING_USER")

    newer_service, newer_api = newer.start()
    of_newer = newer_api.create("resumable", ASKS)
    newer_api.until_status(of_newer.run_id, "WAITING_USER")
    assert query(older, "SELECT DISTINCT mood FROM run") == [("calm",)]
    api.reply(answered.run_id, 1, "yes")
    api.until_status(answered.run_id, "SUCCEEDED")

    newer_service.kill()
    change(older, "UPDATE run SET status = 'PAUSED' WHERE owner = 'newer'")
    before = query(older, "SELECT * FROM run WHERE owner = 'newer'")
    service.kill()
    service, api = older.start()
    assert [event["steps"] for event in service.events("storage.newer_version")] == [["9999_newer"]]
    api.reply(waits.run_id, 1, "yes")
    api.until_status(waits.run_id, "SUCCEEDED")
    assert api.get(of_newer.run_id).status == run_pb2.RUN_STATUS_UNSPECIFIED
    assert service.stop() == 0
    assert before == query(older, "SELECT * FROM run WHERE owner = 'newer'")
    assert query(older, "SELECT count(*) FROM quarantine") == [(0,)]


def test_an_older_version_is_refused_for_an_instance_whose_runs_a_newer_one_has_written(
    new_home: Callable[..., Home], postgresql_url: str, tmp_path: Path
) -> None:
    home = new_home(database=postgresql_url, engines=GOOD_ENGINES, may_fork=False)
    home.env = newer_version(tmp_path)
    service, api = home.start()
    run = api.create("resumable", ASKS)
    api.until_status(run.run_id, "WAITING_USER")
    service.kill()
    change(home, "UPDATE run SET status = 'PAUSED'")
    before = query(home, "SELECT * FROM run")

    home.env = {}
    service = home.spawn()

    assert service.exit_code() == 4
    assert (
        "error: the PostgreSQL database: has runs of instance 'default' of a newer version;"
        " start that version\n"
    ) in service.text
    assert before == query(home, "SELECT * FROM run")
