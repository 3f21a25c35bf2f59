"""A few kills under load. `make campaign-kills` plays many, and detects its mutants."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Final

from campaign.kills import play

KILLS: Final = 5


def test_nothing_acknowledged_is_lost_by_kills_under_load(
    new_database_url: Callable[[], str], tmp_path: Path
) -> None:
    seed = secrets.randbelow(2**32)

    *_, last = play(tmp_path / "home", seed, KILLS, database=new_database_url())

    assert [*map(str, last.violations)] == [], f"seed {seed}"
    assert last.load.journal.runs
    assert any(last.load.journal.seen.values())
