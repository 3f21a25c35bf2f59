"""Deadlines, carried out beside the sessions: one that cannot be stops none of the others."""

from __future__ import annotations

from typing import Any

import pytest
from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.domain.run import Run, RunStatus
from runrecovery_service.storage import deadlines, runs

from .conftest import Floor, NewFloor, until

ASKS = {"questions": [{"prompt": "So?"}]}


async def asks(floor: Floor) -> str:
    """A run that decides automatically, 0.3 s after it has asked."""
    run_id = await floor.create("resumable", ASKS, require_user_reply=False, session_timeout_s=0.3)
    await floor.until_status(run_id, RunStatus.WAITING_USER, RunStatus.SUCCEEDED)
    return run_id


async def test_a_run_that_cannot_be_read_holds_up_no_deadline_but_its_own(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, end_wait, bad = runs.get_by_key, deadlines.end_wait, list[int]()

    def refuse(use: Any) -> Any:
        def refused(db: Any, run_key: int, **named: Any) -> Any:
            if run_key in bad or not bad:
                bad[:] = [run_key]
                raise RecursionError
            return use(db, run_key, **named)

        return refused

    monkeypatch.setattr(deadlines, "end_wait", refuse(end_wait))
    monkeypatch.setattr(runs, "get_by_key", lambda db, key: _unless(bad, key, read, db))
    first = await asks(floor)
    await until(lambda: _true(bool(bad)))

    second = await floor.until_ended(await asks(floor))

    assert (second.status, second.auto_decided_count) == (RunStatus.SUCCEEDED, 1)
    assert (await floor.get(first)).status is RunStatus.WAITING_USER


async def _true(answer: bool) -> bool:  # noqa: FBT001 - a condition to wait on
    return answer


def _unless(bad: list[int], key: int, read: Any, db: Any) -> Run:
    if key in bad:
        raise RecursionError
    run: Run = read(db, key)
    return run


async def test_a_decision_whose_answer_was_lost_is_carried_on(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_wait, lost = deadlines.end_wait, list[int]()

    def commit_and_lose(db: Any, run_key: int, **named: Any) -> Any:
        answer = end_wait(db, run_key, **named)
        if answer is not None and not lost:
            lost.append(run_key)
            raise StorageUnavailable
        return answer

    monkeypatch.setattr(floor.storage, "_writer", None)  # each use is a commit of its own
    monkeypatch.setattr(deadlines, "end_wait", commit_and_lose)
    run_id = await floor.create("sticky", ASKS, require_user_reply=False, session_timeout_s=0.3)

    run = await floor.until_ended(run_id)

    assert lost == [run.key]
    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"answers": [None]})
    assert run.auto_decided_count == 1


async def test_a_run_out_of_time_is_ended_wherever_it_stands(new_floor: NewFloor) -> None:
    floor = await new_floor()
    run_id = await floor.create("holds", max_run_s=0.5)
    lease = await floor.until_tree(run_id, 1)

    run = await floor.until_ended(run_id)

    assert run.error is not None
    assert (run.status, run.error.code) == (RunStatus.FAILED, "RUN_TIMEOUT")
    assert lease.tree() == []
