"""Deadlines are carried out while turns run, each independently of the others."""

from __future__ import annotations

from typing import Any

import pytest
from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.domain.run import Run, RunStatus
from runrecovery_service.storage import passed_deadlines, runs

from .conftest import Execution, NewExecution, until

ASKS = {"questions": [{"prompt": "So?"}]}


async def asks(execution: Execution) -> str:
    """Create a run that is decided automatically 0.3 s after its question; return its id."""
    run_id = await execution.create(
        "resumable", ASKS, require_user_reply=False, session_timeout_s=0.3
    )
    await execution.until_status(run_id, RunStatus.WAITING_USER, RunStatus.SUCCEEDED)
    return run_id


async def test_a_deadline_that_cannot_be_carried_out_does_not_delay_others(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, end_wait, bad = runs.get_by_key, passed_deadlines.end_wait, list[int]()

    def refuse(use: Any) -> Any:
        def refused(db: Any, run_key: int, **named: Any) -> Any:
            if run_key in bad or not bad:
                bad[:] = [run_key]
                raise RecursionError
            return use(db, run_key, **named)

        return refused

    monkeypatch.setattr(passed_deadlines, "end_wait", refuse(end_wait))
    monkeypatch.setattr(runs, "get_by_key", lambda db, key: _unless(bad, key, read, db))
    first = await asks(execution)
    await until(lambda: _true(bool(bad)))

    second = await execution.until_ended(await asks(execution))

    assert (second.status, second.auto_decided_count) == (RunStatus.SUCCEEDED, 1)
    assert (await execution.get(first)).status is RunStatus.WAITING_USER


async def _true(answer: bool) -> bool:  # noqa: FBT001 - a condition to wait on
    return answer


def _unless(bad: list[int], key: int, read: Any, db: Any) -> Run:
    if key in bad:
        raise RecursionError
    run: Run = read(db, key)
    return run


async def test_an_automatic_decision_whose_commit_answer_was_lost_is_delivered(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_wait, lost = passed_deadlines.end_wait, list[int]()

    def commit_and_lose(db: Any, run_key: int, **named: Any) -> Any:
        answer = end_wait(db, run_key, **named)
        if answer is not None and not lost:
            lost.append(run_key)
            raise StorageUnavailable
        return answer

    monkeypatch.setattr(execution.storage, "_writer", None)  # each use is a commit of its own
    monkeypatch.setattr(passed_deadlines, "end_wait", commit_and_lose)
    run_id = await execution.create("sticky", ASKS, require_user_reply=False, session_timeout_s=0.3)

    run = await execution.until_ended(run_id)

    assert lost == [run.key]
    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"answers": [None]})
    assert run.auto_decided_count == 1


async def test_a_run_that_is_out_of_time_fails_and_its_processes_end(
    new_execution: NewExecution,
) -> None:
    execution = await new_execution()
    run_id = await execution.create("holds", max_run_s=0.5)
    launch = await execution.until_tree(run_id, 1)

    run = await execution.until_ended(run_id)

    assert run.error is not None
    assert (run.status, run.error.code) == (RunStatus.FAILED, "RUN_TIMEOUT")
    assert launch.tree() == []


async def test_deadlines_that_a_peer_has_set_are_converted_and_then_carried_out(
    execution: Execution,
) -> None:
    run_id = await execution.create(
        "resumable", ASKS, require_user_reply=False, session_timeout_s=600.0
    )
    run = await execution.until_status(run_id, RunStatus.WAITING_USER)

    def as_a_peer_leaves_it(db: Any) -> None:
        db.execute(
            "UPDATE run SET wait_due_us = 0, due_clock = NULL, version = version + 1 WHERE id = ?",
            (run.key,),
        )
        db.execute("UPDATE interaction SET wait_deadline_at = 1 WHERE run = ?", (run.key,))

    await execution.storage.write(as_a_peer_leaves_it)

    assert (await execution.until_ended(run_id)).auto_decided_count == 1
