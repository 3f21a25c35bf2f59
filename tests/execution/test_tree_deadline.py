"""Processes live while heartbeats move the tree deadline, and end when it passes."""

from __future__ import annotations

import os
from typing import Any

import pytest
from runrecovery_service.domain.run import RestartPolicy, Run, RunStatus
from runrecovery_service.execution import (
    turn_state,
)
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.storage import launch_records

from .conftest import NewExecution, StoredLaunch, until

SHORT_S = 2.5
"""A tree deadline that tests wait for, long enough for their steps on a busy machine."""


def error_of(run: Run) -> str:
    assert run.error is not None
    return run.error.code


async def until_nothing_lives(launch: StoredLaunch) -> None:
    async def is_so() -> bool:
        return not launch.tree() and not launch.is_guarded

    await until(is_so)


async def test_a_tree_lives_while_heartbeats_come_and_ends_without_them(
    new_execution: NewExecution,
) -> None:
    execution = await new_execution()
    run_id = await execution.create("family")
    launch = await execution.until_tree(run_id, 2)
    tree, first_deadline = launch.tree(), boot_time_ns() + int(SHORT_S * 1e9)

    async def long_past_the_first() -> bool:
        execution.heartbeat(SHORT_S)
        return boot_time_ns() > first_deadline + int(SHORT_S * 1e9)

    await until(long_past_the_first)
    lived_on = launch.tree()
    run = await execution.until_ended(run_id)

    assert lived_on == tree
    assert error_of(run) == "ORCHESTRATOR_RESTART_INTERRUPTED"
    assert run.error is not None
    assert run.error.message == turn_state.SUSPENDED
    assert boot_time_ns() > execution.turns.tree_deadline.deadline_ns
    await until_nothing_lives(launch)


async def test_a_waiting_sticky_run_is_lost_at_the_tree_deadline(
    new_execution: NewExecution,
) -> None:
    execution = await new_execution(trees_live_s=SHORT_S)
    execution.heartbeat(SHORT_S)
    run_id = await execution.create("asks")

    run = await execution.until_ended(run_id)

    assert error_of(run) in {"INTERACTION_PROCESS_LOST", "ORCHESTRATOR_RESTART_INTERRUPTED"}
    await until_nothing_lives(await execution.launch(run_id))


async def test_a_run_that_may_start_over_does_so_after_the_tree_deadline_was_extended(
    new_execution: NewExecution,
) -> None:
    execution = await new_execution()
    run_id = await execution.create("holds", policy=RestartPolicy.REQUEUE)
    first = await execution.until_tree(run_id, 1)
    execution.heartbeat(SHORT_S)
    await until_nothing_lives(first)

    async def taken_again() -> bool:
        return (await execution.get(run_id)).attempt == 2

    await until(taken_again)
    before_the_heartbeat = (await execution.launch(run_id, attempt=2)).state
    execution.heartbeat(60)

    async def works_again() -> bool:
        return len((await execution.launch(run_id, attempt=2)).tree()) == 1

    await until(works_again)
    run = await execution.get(run_id)

    assert before_the_heartbeat == "INTENT"  # nothing is launched after the tree deadline
    assert (run.status, run.attempt) == (RunStatus.RUNNING, 2)
    assert (await execution.launch(run_id)).state == "CLOSED"


async def test_a_tree_deadline_that_passes_at_the_gate_interrupts_the_run(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch
) -> None:
    execution = await new_execution(trees_live_s=60)
    execution.heartbeat(SHORT_S)
    gated = launch_records.record_gated

    def gated_too_late(*args: Any, **named: Any) -> None:
        while boot_time_ns() < execution.turns.tree_deadline.deadline_ns:
            os.sched_yield()
        gated(*args, **named)

    monkeypatch.setattr(launch_records, "record_gated", gated_too_late)
    run = await execution.until_ended(await execution.create("holds"))

    assert error_of(run) == "ORCHESTRATOR_RESTART_INTERRUPTED"
