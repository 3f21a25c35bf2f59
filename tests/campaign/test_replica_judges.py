"""The judges of the campaign of replicas find what they are for, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from campaign.judges import lost_writes
from campaign.load import Journal
from campaign.replica_judges import violations_now


def test_an_acknowledged_write_that_is_not_in_the_store_is_lost() -> None:
    journal = Journal()
    for run_id in ("kept", "gone", "other", "lives"):
        journal.add_run(run_id, "quick", f"nonce of {run_id}")
    for run_id in ("kept", "lives"):
        journal.add_cancel(run_id)
    journal.add_reply("kept", 1, "yes")
    journal.add_reply("kept", 2, "no")

    def rows(sql: str) -> list[tuple[Any, ...]]:
        if "FROM interaction" in sql:
            return [("kept", 1, '"yes"'), ("kept", 2, '"yes"')]
        return [
            ("kept", "quick", '{"nonce":"nonce of kept"}', "CANCELED", None),
            ("other", "works", '{"nonce":"nonce of other"}', "FAILED", None),
            ("lives", "quick", '{"nonce":"nonce of lives"}', "SUCCEEDED", None),
        ]

    assert [str(found) for found in lost_writes(journal, rows)] == [
        "lost write: create of gone",
        "lost write: create of other became another run",
        "lost write: cancel of lives",
        "lost write: reply to kept 2",
    ]


def test_an_agent_that_lives_when_its_instance_is_taken_over_has_outlived_its_lease(
    tmp_path: Path,
) -> None:
    (tmp_path / "alive-1").write_text("99.900")
    (tmp_path / "alive-2").write_text("100.250")

    def rows(sql: str) -> list[tuple[Any, ...]]:
        # Launch 3 never had an agent.
        return [(1, 100.0), (2, 100.0), (3, 100.0)] if "FROM process_lease l" in sql else []

    assert [str(found) for found in violations_now(rows, tmp_path)] == [
        "agent outlived its lease: launch 2 by at least 0.250 s"
    ]


def test_two_agents_that_lived_at_a_time_are_found(tmp_path: Path) -> None:
    (tmp_path / "overlaps").write_text("run-1\n")

    assert [str(found) for found in violations_now(lambda _: [], tmp_path)] == [
        "two agents at a time: run-1"
    ]
