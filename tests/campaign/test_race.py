"""A short race. `make campaign-replicas` plays a longer one, and detects its mutant."""

from __future__ import annotations

from pathlib import Path

from campaign.race import play


def test_no_run_has_two_owners_and_none_is_lost_in_a_race_of_processes_that_are_killed(
    postgresql_url: str, tmp_path: Path
) -> None:
    result = play(tmp_path, url=postgresql_url, count=150, processes=4, kills=1)

    assert [*map(str, result.violations)] == []
    assert result.moves > 0
