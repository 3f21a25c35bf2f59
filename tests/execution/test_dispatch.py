"""Launches and supervision keep working whatever fails around them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import peewee as pw
import pytest
from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.execution import dispatcher
from runrecovery_service.process import processes, tree_ending
from runrecovery_service.storage import turn_ends, turn_starts

from .conftest import Execution, until

MANY = 48


def failing_first(times: int, error: Exception, use: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its first calls fail."""
    left = [times]

    def call(*args: Any, **kwargs: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise error
        return use(*args, **kwargs)

    return call


async def test_many_short_runs_at_once_all_succeed(execution: Execution) -> None:
    made = [await execution.create("quick") for _ in range(MANY)]

    ended = [await execution.until_ended(run_id) for run_id in made]

    assert {run.status for run in ended} == {RunStatus.SUCCEEDED}
    assert [run.error for run in ended if run.error] == []


async def test_a_held_dispatcher_launches_nothing_until_it_is_released(
    execution: Execution,
) -> None:
    working = await execution.create("holds")
    await execution.until_status(working, RunStatus.RUNNING)
    execution.dispatcher.hold(held=True)
    waiting = await execution.create("quick")
    for _ in range(3):
        await execution.dispatcher._launch_what_fits()
    assert (await execution.get(waiting)).status is RunStatus.QUEUED

    execution.dispatcher.hold(held=False)

    assert (await execution.until_ended(waiting)).status is RunStatus.SUCCEEDED
    assert (await execution.get(working)).status is RunStatus.RUNNING


@pytest.mark.parametrize(
    "error", [pw.InternalError("never seen"), StorageUnavailable(), OSError(24, "EMFILE")]
)
async def test_an_end_that_could_not_be_recorded_is_recorded_by_a_retry(
    execution: Execution, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(turn_ends, "record_end", failing_first(2, error, turn_ends.record_end))

    run = await execution.until_ended(await execution.create("quick"))

    assert run.status is RunStatus.SUCCEEDED


async def test_a_tree_that_could_not_be_searched_for_is_searched_for_again(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(24, "too many open files")
    monkeypatch.setattr(processes, "end_trees", failing_first(2, error, tree_ending.end_trees))

    run = await execution.until_ended(await execution.create("quick"))

    assert run.status is RunStatus.SUCCEEDED


async def test_a_defect_while_taking_a_run_does_not_end_the_dispatcher(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OverflowError("a damaged row")
    monkeypatch.setattr(turn_starts, "take_next", failing_first(1, error, turn_starts.take_next))
    first = await execution.create("quick")
    second = await execution.create("quick")

    ended = [await execution.until_ended(first), await execution.until_ended(second)]

    assert [run.status for run in ended] == [RunStatus.SUCCEEDED] * 2


async def test_the_dispatcher_reports_for_how_long_the_queue_cannot_be_read(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[None] = []
    time_s = [100.0]
    fails = [True]
    take = turn_starts.take_next

    def take_next(*args: Any, **kwargs: Any) -> Any:
        looks.append(None)
        if fails[0]:
            raise StorageUnavailable
        return take(*args, **kwargs)

    async def failing_s_after_a_look() -> float:
        before = len(looks)
        execution.dispatcher.check_queue()

        async def has_looked_twice() -> bool:  # so that the first of the two is noted
            if len(looks) == before + 1:
                execution.dispatcher.check_queue()
            return len(looks) > before + 1

        await until(has_looked_twice)
        return execution.dispatcher.failing_s

    monkeypatch.setattr(dispatcher, "loop_time_s", lambda: time_s[0])
    monkeypatch.setattr(turn_starts, "take_next", take_next)

    within_a_moment = await failing_s_after_a_look()
    time_s[0] = 107.0
    later = await failing_s_after_a_look()
    fails[0] = False
    at_last = await failing_s_after_a_look()
    fails[0], time_s[0] = True, 120.0
    anew = await failing_s_after_a_look()

    assert (within_a_moment, later, at_last, anew) == (0.0, 7.0, 0.0, 0.0)


async def test_a_run_whose_take_was_committed_without_an_answer_is_taken_again(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = turn_starts.take_next
    lost: list[Any] = []

    def take_and_lose_the_answer(*args: Any, **kwargs: Any) -> Any:
        turn = take(*args, **kwargs)
        if turn is not None and not lost:
            lost.append(turn)
        return turn

    def write_and_lose_the_answer(write: Callable[..., Any]) -> Callable[..., Any]:
        async def call(use: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            answer = await write(use, *args, **kwargs)
            if lost == [answer]:
                lost.append(None)
                raise StorageUnavailable
            return answer

        return call

    monkeypatch.setattr(turn_starts, "take_next", take_and_lose_the_answer)
    write_own = write_and_lose_the_answer(execution.storage.write_own)
    monkeypatch.setattr(execution.storage, "write_own", write_own)
    run = await execution.until_ended(await execution.create("quick"))

    assert (run.status, run.attempt, run.turn) == (RunStatus.SUCCEEDED, 1, 1)
    assert len(lost) > 1


async def test_a_launch_that_the_system_refuses_fails_its_run(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("a step of the launch is refused")

    monkeypatch.setattr(processes, "prepare", refuse)

    run = await execution.until_ended(await execution.create("quick"))

    assert run.error is not None
    assert run.error.code == "LAUNCH_FAILED"


async def test_a_system_that_refuses_more_threads_fails_no_run(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool has one thread by then, and the system refuses every other."""
    start = threading.Thread.start
    refused: list[str] = []

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("process"):
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    ids = [await execution.create("quick") for _ in range(3)]
    runs = [await execution.until_ended(run_id) for run_id in ids]

    assert [(run.status, run.error) for run in runs] == [(RunStatus.SUCCEEDED, None)] * 3
    assert refused


async def test_a_cancel_ends_a_process_that_does_not_read_its_reply(execution: Execution) -> None:
    run_id = await execution.create("deaf")
    await execution.until_status(run_id, RunStatus.WAITING_USER)
    await execution.reply(run_id, "x" * 300_000)

    await execution.cancel(run_id)
    run = await execution.until_ended(run_id)

    assert run.status is RunStatus.CANCELED


async def test_a_reply_that_was_not_read_is_not_recorded_as_delivered(execution: Execution) -> None:
    run_id = await execution.create("deaf")
    await execution.until_status(run_id, RunStatus.WAITING_USER)
    await execution.reply(run_id, "x" * 300_000)
    await execution.until_status(run_id, RunStatus.RUNNING)

    rows = await execution.storage.read(lambda db: db.fetch_all("SELECT state FROM interaction"))

    assert rows == [("ANSWERED",)]


async def test_a_paused_dispatcher_takes_no_run_from_the_queue(execution: Execution) -> None:
    busy = [await execution.create("sticky", {"hold": True}) for _ in range(8)]
    for run_id in busy:
        await execution.until_status(run_id, RunStatus.RUNNING)
    queued = await execution.create("quick")

    execution.dispatcher.pause()
    await execution.cancel(busy[0])
    await execution.until_ended(busy[0])
    await execution.until_free(1)

    assert (await execution.get(queued)).status is RunStatus.QUEUED


async def test_a_resumable_run_holds_no_slot_while_it_waits(execution: Execution) -> None:
    question = {"questions": [{"kind": "confirm", "prompt": "Go on?"}]}
    run_id = await execution.create("resumable", question)

    waiting = await execution.until_status(run_id, RunStatus.WAITING_USER)
    await execution.until_free(execution.dispatcher.capacity)
    await execution.reply(run_id, "yes")
    run = await execution.until_ended(run_id)

    assert not waiting.holds_slot
    assert run.output == {"answers": ["yes"]}


async def test_a_stop_ends_every_tree_and_does_not_change_the_runs(execution: Execution) -> None:
    run_id = await execution.create("resumable", {"hold": True, "children": 3})
    await execution.until_status(run_id, RunStatus.RUNNING)

    await execution.dispatcher.stop()

    assert execution.dispatcher.slots_in_use == 0
    assert (await execution.get(run_id)).status is RunStatus.RUNNING
