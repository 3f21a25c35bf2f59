"""`runrecovery demo`, where a step of it fails."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from runrecovery_service.cli.demo import steps
from runrecovery_service.cli.demo.scenario import DemoFailed
from runrecovery_service.cli.demo.steps import Stage


def test_a_demo_that_fails_while_shims_are_suspended_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    alive: list[int] = []

    def fail(stage: Stage) -> None:
        alive.extend(stage.find_processes()["process-tree"])
        raise DemoFailed("on purpose")

    monkeypatch.setattr(steps, "_check_orphans", fail)
    printed = io.StringIO()
    assert steps.run_demo(Console(file=printed, width=120)) == 1
    assert len(alive) == 4
    assert "✗ the demo could continue: on purpose" in printed.getvalue()
    assert "✓ no process is left behind" in printed.getvalue()
