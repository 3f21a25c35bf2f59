"""A sweep can kill the tree of the demo agent."""

from __future__ import annotations

import sys
from pathlib import Path

from process.trees import Start
from runrecovery_service.engines import demo_agent, jsonl
from runrecovery_service.engines.dialect import ProgressMessage, RunContext
from runrecovery_service.process import procfs
from runrecovery_service.process.tree_ending import end_trees


def test_its_whole_tree_is_found_after_a_crash_of_service_and_shim(
    start: Start, tmp_path: Path
) -> None:
    tree = start([sys.executable, "-m", demo_agent.__name__, "--profile", "sticky"])
    task = RunContext(
        run_id="r-1", attempt=1, input={"hold": True, "children": 3}, workspace=str(tmp_path)
    )
    tree.process.stdin.write(jsonl.start_message(task))
    children: list[int] = []
    while len(children) < 3:
        message = jsonl.parse(tree.process.stdout.readline())
        assert isinstance(message, ProgressMessage)
        if "child" in message.message:
            children.append(int(message.message.split()[-1]))
    tree.kill_shim()

    ending = end_trees([tree.lease], why="test", grace_s=5, deadline_s=20)[tree.lease.launch_key]

    assert (ending.found, ending.ended, ending.gone) == (4, 4, True)
    assert all(proc.dead for proc in procfs.scan(children).values())
    assert tree.nobody_alive()
