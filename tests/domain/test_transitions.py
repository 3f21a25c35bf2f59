"""Which status may follow which."""

from __future__ import annotations

import pytest
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.domain.transitions import is_legal

AFTER = {
    "QUEUED": {"QUEUED", "RUNNING", "FAILED", "CANCELED"},
    "RUNNING": {"QUEUED", "WAITING_USER", "SUCCEEDED", "FAILED", "CANCELED"},
    "WAITING_USER": {"WAITING_USER", "QUEUED", "RUNNING", "FAILED", "CANCELED"},
    "SUCCEEDED": set(),
    "FAILED": set(),
    "CANCELED": set(),
}


@pytest.mark.parametrize("status", RunStatus)
def test_an_ended_run_stays_ended_and_a_live_one_changes_as_documented(status: RunStatus) -> None:
    assert {after.value for after in RunStatus if is_legal(status, after)} == AFTER[status.value]
