"""A short campaign of crash points. `make campaign-crash-points` tries more pairs of them."""

from __future__ import annotations

import pytest
from crash_points.campaign import play
from crash_points.kills import Kill
from crash_points.mutants import MUTANTS
from crash_points.scenario import BRIEF
from crash_points.snapshot import Row, Snapshot
from support.service_forker import can_be_forked

forked = pytest.mark.skipif(not can_be_forked({}), reason="only a forked service gets crash points")


@forked
@pytest.mark.parametrize(
    ("first", "second"),
    [
        # A launch that no turn follows, and a recovery that has closed its record.
        ("serving: commit of turn_starts.take_next#2", "start: commit of launch_records.close_all"),
        # Agents without shims, the first of which a recovery has just killed.
        ("serving: after input#2+shims", "start: after signal#2"),
    ],
)
def test_a_service_that_is_killed_at_two_points_keeps_every_promise(
    first: str, second: str
) -> None:
    kills = [Kill.parse(first), Kill.parse(second)]

    result = play(kills, size=BRIEF)

    assert result.reached == tuple(kills)
    assert result.broken == ()


@forked
def test_a_recovery_that_reports_before_it_has_decided_is_detected() -> None:
    mutant = MUTANTS["report-first"]

    result = play(mutant.kills, size=BRIEF, mutant="report-first")

    assert {violation.kind for violation in result.broken} == {"early report"}


def test_an_acknowledged_call_without_its_effect_is_a_violation() -> None:
    runs: list[Row] = [
        {"id": 1, "run_id": "ended", "status": "SUCCEEDED", "cancel_requested_at": None},
        {"id": 2, "run_id": "works", "status": "RUNNING", "cancel_requested_at": None},
    ]
    questions: list[Row] = [
        {"run": 1, "no": 1, "response": '"yes"'},
        {"run": 2, "no": 1, "response": None},
    ]
    store = Snapshot({"run": runs, "interaction": questions, "recovery_event": []})
    kept = [("create", "ended", 0), ("reply", "ended", 1), ("cancel", "ended", 0)]
    lost = [
        ("create", "gone", 0),
        ("reply", "works", 1),
        ("cancel", "works", 0),
        ("reopen", "ended", 0),
    ]

    found = list(store.lost([*kept, *lost], {"ended": "FAILED"}))

    assert [(each.kind, each.detail) for each in found] == [
        ("lost", "create gone: None"),
        ("lost", "reply works: RUNNING"),
        ("lost", "cancel works: RUNNING"),
        ("lost", "reopen ended: SUCCEEDED"),
        ("changed end", "ended was FAILED: SUCCEEDED"),
    ]
