"""A short campaign of failing database calls. `make campaign-faults` makes more, and mutants."""

from __future__ import annotations

from pathlib import Path

import pytest
from faults.database_faults import campaign
from faults.life import Database

from bench.postgres import ScratchPostgres


@pytest.mark.timeout(600)
@pytest.mark.parametrize("database_kind", ["sqlite", "postgresql"])
def test_no_failed_database_call_loses_anything_or_ends_the_service(
    request: pytest.FixtureRequest, tmp_path: Path, database_kind: Database
) -> None:
    server: ScratchPostgres | None = (
        request.getfixturevalue("_postgres") if database_kind == "postgresql" else None
    )
    with campaign(tmp_path, server, seed=1) as made:
        lives = [made.survey(), *made.lives(calls=20)]

    assert [life.violations for life in lives] == [[] for _ in lives], lives
    assert sum(len(life.failed) for life in lives) >= 20
