"""Run by test_scratch_postgres.py in a separate pytest session, on each of its workers."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from runrecovery_service.storage.database import Database


@pytest.mark.parametrize("database_kind", [pytest.param("postgresql", id="real")], indirect=True)
def test_a_worker_has_a_database(database: Database) -> None:
    row = database.fetch_one("SELECT current_setting('data_directory'), current_database()")
    assert row is not None

    with Path(os.environ["REPORT"]).open("a", encoding="utf-8") as report:
        report.write(f"{os.environ['PYTEST_XDIST_WORKER']} {row[0]} {row[1]}\n")
