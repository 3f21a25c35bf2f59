"""The demo agent's tree is one that a sweep can end, whatever is left of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from runrecovery_service.engines import demo_agent, jsonl
from runrecovery_service.engines.jsonl import ProgressMessage, Task
from runrecovery_service.process import evidence
from runrecovery_service.process.evidence import COOKIE_VARIABLE, LeaseEvidence
from runrecovery_service.process.launch import LaunchedProcess, dispose, launch
from runrecovery_service.process.sweep import end_trees


@pytest.fixture
def holding(
    new_lease: Callable[[], LeaseEvidence], tmp_path: Path
) -> Iterator[tuple[LaunchedProcess, LeaseEvidence]]:
    """A demo agent that holds, with three children."""
    lease = new_lease()
    process = launch(
        [sys.executable, "-m", demo_agent.__name__, "--profile", "sticky"],
        cwd=tmp_path,
        env={COOKIE_VARIABLE: lease.token},
    )
    task = Task(
        run_id="r-1", attempt=1, input={"hold": True, "children": 3}, workspace=str(tmp_path)
    )
    process.stdin.write(jsonl.start_message(task))
    yield process, replace(lease, pid=process.pid, start_ticks=process.start_ticks)
    end_trees([lease], grace_s=0, deadline_s=10)
    dispose(process)


def test_all_its_children_are_found_after_a_crash(
    holding: tuple[LaunchedProcess, LeaseEvidence],
) -> None:
    process, lease = holding
    children: list[int] = []
    while len(children) < 3:
        message = jsonl.parse(process.stdout.readline())
        assert isinstance(message, ProgressMessage)
        if "child" in message.message:
            children.append(int(message.message.split()[-1]))
    process.popen.kill()
    process.popen.wait()

    ending = end_trees([lease], grace_s=5, deadline_s=20)[lease.lease_key]

    assert (ending.found, ending.ended, ending.gone) == (3, 3, True)
    assert all(proc.dead for proc in evidence.scan(children).values())
