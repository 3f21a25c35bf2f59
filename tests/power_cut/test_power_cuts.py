"""A short campaign of power cuts. `make campaign-power-cuts` makes more, and detects mutants."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

import pytest
from power_cut.power_cuts import Campaign
from power_cut.recording import record


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may read a service that hides itself")
def test_no_power_cut_loses_an_answered_call_or_damages_a_file(tmp_path: Path) -> None:
    seed = secrets.randbelow(10**6)
    campaign = Campaign(recording=record(tmp_path, seed=seed, runs=1), cuts=40, starts=0, seed=seed)

    assert list(campaign.run(tmp_path / "cut")) == [], f"seed {seed}"
    assert len(campaign.recording.answered) >= 8
