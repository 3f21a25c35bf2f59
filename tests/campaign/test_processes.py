"""A short campaign. CAMPAIGN_TRIALS=200 pytest tests/campaign, or processes.py, for more."""

from __future__ import annotations

import os
import secrets
from itertools import islice
from typing import Final

import pytest
from campaign.home import is_root
from campaign.plans import UNENDED_EVERY, Kind, Plan, plan, seeds
from campaign.processes import (
    MUTANTS,
    SEEDS,
    Summary,
    is_found_out,
    run_trials,
    take_over,
)

TRIALS: Final = int(os.environ.get("CAMPAIGN_TRIALS", "8"))
MUTANT_TRIALS: Final = 3

only_root = pytest.mark.skipif(not is_root(), reason="only root can make unkillable processes")


def is_unended(of: Plan) -> bool:
    """Return whether a trial has a process that cannot be killed."""
    return of.kind is Kind.UNENDED


def faults(summary: Summary) -> list[str]:
    """Return the faults, with the seeds that reproduce them."""
    return [f"{outcome}: {outcome.faults}" for outcome in summary.failed]


@pytest.mark.timeout(120 + 10 * TRIALS)
def test_no_process_survives_a_restart_and_no_innocent_is_signalled() -> None:
    summary = run_trials(range(first := secrets.randbelow(SEEDS), first + TRIALS))

    assert faults(summary) == []
    assert sum(outcome.grown for outcome in summary.outcomes) > 0


@only_root
def test_a_process_that_cannot_be_killed_is_reported_until_it_is_gone() -> None:
    summary = run_trials([next(seeds(secrets.randbelow(SEEDS), is_unended, root=True))])

    assert faults(summary) == []


def test_an_innocent_process_that_takes_over_a_pid_is_spared() -> None:
    spared = take_over()

    if spared is None:
        pytest.skip("only root can say which pid comes next, in a pid namespace")
    assert spared
    assert all(spared.values()), spared


@pytest.mark.parametrize("mutant", MUTANTS)
def test_each_mutant_of_the_service_is_found_out(mutant: str) -> None:
    found_out = is_found_out(mutant, secrets.randbelow(SEEDS), MUTANT_TRIALS)

    if found_out is None:
        pytest.skip(f"only root can try {mutant}")
    assert found_out


def test_a_seed_determines_its_trial() -> None:
    assert plan(7_000, "m", root=True) == plan(7_000, "m", root=True)


def test_one_seed_in_40_is_a_trial_with_a_process_that_cannot_be_killed() -> None:
    first, second = islice(seeds(0, is_unended, root=True), 2)

    assert first < UNENDED_EVERY
    assert second == first + UNENDED_EVERY
