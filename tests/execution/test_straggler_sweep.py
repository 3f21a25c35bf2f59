"""The sweep ends and records processes that outlived their launch."""

from __future__ import annotations

import subprocess
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from runrecovery_service.domain.run import RestartPolicy, RunStatus
from runrecovery_service.execution import (
    dispatcher,
)
from runrecovery_service.process import processes
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.process.tree_ending import end_trees
from runrecovery_service.storage import launch_records
from support.processes import living_process

from .conftest import Execution, NewExecution, StoredLaunch

SHORT_S = 2.5
"""A tree deadline that tests wait for, long enough for their steps on a busy machine."""

# The shim of a launch that could not be ended is reaped by the next launch.
LEFT_ALONE = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")


@contextmanager
def straggler(launch: StoredLaunch) -> Iterator[subprocess.Popen[bytes]]:
    """A process with the cookie of a launch, which the service has not started."""
    popen = subprocess.Popen(
        ["/bin/sleep", "600"],
        env={"RUNRECOVERY_LEASE": launch.token},
        start_new_session=True,  # the sweep spares the session of the service
    )
    try:
        yield popen
    finally:
        popen.kill()
        popen.wait()


def not_at_first(use: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `end_trees` so that its first call ends nothing, and reports that."""
    left = [1]

    def call(launches: Any, **named: Any) -> Any:
        if left[0]:
            left[0] -= 1
            return {
                launch.launch_key: Ending(refused=("stuck",), gone=False) for launch in launches
            }
        return use(launches, **named)

    return call


async def test_the_sweep_ends_and_records_a_straggler(execution: Execution) -> None:
    run_id = await execution.create("quick")
    await execution.until_ended(run_id)
    before = await execution.launch(run_id)
    with straggler(before) as left:
        await execution.straggler_sweep.sweep()

        assert living_process(left.pid) is None
    after = await execution.launch(run_id)
    assert (before.state, after.state) == ("CLOSED", "CLOSED")
    assert after.processes_ended == before.processes_ended + 1
    assert (await execution.get(run_id)).status is RunStatus.SUCCEEDED


async def test_a_sweep_that_finds_nothing_writes_nothing(execution: Execution) -> None:
    run_id = await execution.create("quick")
    await execution.until_ended(run_id)
    await execution.until_free(execution.dispatcher.capacity)

    def rows() -> Awaitable[list[Any]]:
        return execution.storage.read(lambda db: db.fetch_all("SELECT * FROM process_lease"))

    before = await rows()
    await execution.straggler_sweep.sweep()

    assert await rows() == before


async def test_the_sweep_does_not_touch_a_launch_that_has_a_supervisor(
    execution: Execution,
) -> None:
    run_id = await execution.create("holds")
    launch = await execution.until_tree(run_id, 1)
    await execution.set_launch_state("KILL_PENDING")

    await execution.straggler_sweep.sweep()

    assert len(launch.tree()) == 1
    assert (await execution.launch(run_id)).state == "KILL_PENDING"


@LEFT_ALONE
async def test_the_sweep_frees_a_run_that_waits_for_a_tree_that_could_not_be_ended(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch
) -> None:
    execution = await new_execution(trees_live_s=SHORT_S)
    execution.heartbeat(SHORT_S)
    monkeypatch.setattr(processes, "end_trees", not_at_first(end_trees))
    monkeypatch.setattr(dispatcher, "CHECK_INTERVAL_S", 600.0)  # only after a change
    run_id = await execution.create("holds", policy=RestartPolicy.REQUEUE)
    run = await execution.until(run_id, lambda run: run.attempt == 1 and run.status == "QUEUED")
    execution.heartbeat(60)
    await execution.until_ended(await execution.create("quick"))  # the queue continues
    held_back = [await execution.get(run_id), (await execution.launch(run_id)).state]

    await execution.straggler_sweep.sweep()
    again = await execution.until(run_id, lambda run: run.attempt == 2)

    assert held_back == [run, "KILL_PENDING"]
    assert again.status is RunStatus.RUNNING
    assert (await execution.launch(run_id)).state == "CLOSED"


@LEFT_ALONE
async def test_a_stuck_tree_of_a_canceled_run_is_listed_until_the_sweep_has_ended_it(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "end_trees", not_at_first(end_trees))
    run_id = await execution.create("family")
    launch = await execution.until_tree(run_id, 2)
    await execution.cancel(run_id)
    run = await execution.until_ended(run_id)
    pending = (await execution.launch(run_id)).state

    async def unended() -> list[Any]:
        return await execution.storage.read(
            launch_records.unended_launches, execution.owner, limit=10
        )

    named = await unended()
    await execution.straggler_sweep.sweep()

    assert (run.status, pending) == (RunStatus.CANCELED, "KILL_PENDING")
    assert [one.run_id for one in named] == [run_id]
    assert await unended() == []
    assert launch.tree() == []
