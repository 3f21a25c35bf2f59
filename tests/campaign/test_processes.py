"""A short campaign. `make campaign-processes` plays more trials, and detects every mutant."""

from __future__ import annotations

import secrets
from itertools import islice
from typing import Final

import pytest
from campaign.plans import UNENDED_EVERY, Kind, Plan, plan, seeds
from campaign.processes import (
    NO_RECHECK,
    SEEDS,
    Summary,
    is_detected,
    run_trials,
    take_over,
)

TRIALS: Final = 2


def is_unended(of: Plan) -> bool:
    """Return whether a trial has a process that cannot be killed."""
    return of.kind is Kind.UNENDED


def faults(summary: Summary) -> list[str]:
    """Return the faults, with the seeds that reproduce them."""
    return [f"{outcome}: {outcome.faults}" for outcome in summary.failed]


def test_no_process_survives_a_restart_and_no_innocent_is_signalled() -> None:
    summary = run_trials(range(first := secrets.randbelow(SEEDS), first + TRIALS))

    assert faults(summary) == []
    assert sum(outcome.grown for outcome in summary.outcomes) > 0


def test_an_innocent_process_that_takes_over_a_pid_is_spared() -> None:
    spared = take_over()

    if spared is None:
        pytest.skip("only root can say which pid comes next, in a pid namespace")
    assert spared
    assert all(spared.values()), spared


def test_a_service_that_does_not_read_the_proof_again_is_detected() -> None:
    detected = is_detected(NO_RECHECK, 0, 1)

    if detected is None:
        pytest.skip(f"only root can try {NO_RECHECK}")
    assert detected


def test_a_seed_determines_its_trial() -> None:
    assert plan(7_000, "m", root=True) == plan(7_000, "m", root=True)


def test_one_seed_in_40_is_a_trial_with_a_process_that_cannot_be_killed() -> None:
    first, second = islice(seeds(0, is_unended, root=True), 2)

    assert first < UNENDED_EVERY
    assert second == first + UNENDED_EVERY
