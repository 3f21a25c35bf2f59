"""What must hold of launching and following, whatever goes wrong around it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import peewee as pw
import pytest
from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.execution import dispatcher, launcher
from runrecovery_service.process import sweep
from runrecovery_service.storage import turns

from .conftest import Floor, until

MANY = 150


def failing_first(times: int, error: Exception, use: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its first calls fail."""
    left = [times]

    def call(*args: Any, **kwargs: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            raise error
        return use(*args, **kwargs)

    return call


async def test_many_short_runs_at_once_all_end_well(floor: Floor) -> None:
    made = [await floor.create("quick") for _ in range(MANY)]

    ended = [await floor.until_ended(run_id) for run_id in made]

    assert {run.status for run in ended} == {RunStatus.SUCCEEDED}
    assert [run.error for run in ended if run.error] == []


@pytest.mark.parametrize(
    "error", [pw.InternalError("never seen"), StorageUnavailable(), OSError(24, "EMFILE")]
)
async def test_an_end_that_could_not_be_recorded_is_recorded_later(
    floor: Floor, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr(turns, "record_end", failing_first(2, error, turns.record_end))

    run = await floor.until_ended(await floor.create("quick"))

    assert run.status is RunStatus.SUCCEEDED


async def test_a_tree_that_could_not_be_looked_for_is_looked_for_again(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OSError(24, "too many open files")
    monkeypatch.setattr(launcher, "end_trees", failing_first(2, error, sweep.end_trees))

    run = await floor.until_ended(await floor.create("quick"))

    assert run.status is RunStatus.SUCCEEDED


async def test_a_defect_while_taking_a_run_does_not_end_the_dispatcher(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = OverflowError("a damaged row")
    monkeypatch.setattr(turns, "take_next", failing_first(1, error, turns.take_next))
    first = await floor.create("quick")
    second = await floor.create("quick")

    ended = [await floor.until_ended(first), await floor.until_ended(second)]

    assert [run.status for run in ended] == [RunStatus.SUCCEEDED] * 2


async def test_looks_that_fail_are_counted_by_time(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[None] = []
    time_s = [100.0]
    fails = [True]
    take = turns.take_next

    def take_next(*args: Any, **kwargs: Any) -> Any:
        looks.append(None)
        if fails[0]:
            raise StorageUnavailable
        return take(*args, **kwargs)

    async def failing_s_after_a_look() -> float:
        before = len(looks)
        floor.dispatcher.check_queue()

        async def has_looked_twice() -> bool:  # so that the first of the two is noted
            if len(looks) == before + 1:
                floor.dispatcher.check_queue()
            return len(looks) > before + 1

        await until(has_looked_twice)
        return floor.dispatcher.failing_s

    monkeypatch.setattr(dispatcher, "monotonic", lambda: time_s[0])
    monkeypatch.setattr(turns, "take_next", take_next)

    within_a_moment = await failing_s_after_a_look()
    time_s[0] = 107.0
    later = await failing_s_after_a_look()
    fails[0] = False
    at_last = await failing_s_after_a_look()

    assert (within_a_moment, later, at_last) == (0.0, 7.0, 0.0)


async def test_a_run_that_was_taken_without_an_answer_is_taken_again(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = turns.take_next
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

    monkeypatch.setattr(turns, "take_next", take_and_lose_the_answer)
    write_own = write_and_lose_the_answer(floor.storage.write_own)
    monkeypatch.setattr(floor.storage, "write_own", write_own)
    run = await floor.until_ended(await floor.create("quick"))

    assert (run.status, run.attempt, run.turn) == (RunStatus.SUCCEEDED, 1, 1)
    assert len(lost) > 1


async def test_a_launch_that_the_system_refuses_fails_the_run(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("a step of the launch is refused")

    monkeypatch.setattr(launcher, "prepare", refuse)

    run = await floor.until_ended(await floor.create("quick"))

    assert run.error is not None
    assert run.error.code == "LAUNCH_FAILED"


async def test_a_system_without_threads_ends_no_run(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool has one thread by then; here the system gives it no other."""
    start = threading.Thread.start
    refused: list[str] = []

    def refuse(thread: threading.Thread) -> None:
        if thread.name.startswith("process"):
            refused.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse)
    ids = [await floor.create("quick") for _ in range(3)]
    runs = [await floor.until_ended(run_id) for run_id in ids]

    assert [(run.status, run.error) for run in runs] == [(RunStatus.SUCCEEDED, None)] * 3
    assert refused


async def test_a_cancel_is_heard_while_the_process_does_not_read_its_reply(floor: Floor) -> None:
    run_id = await floor.create("deaf")
    await floor.until_status(run_id, RunStatus.WAITING_USER)
    await floor.reply(run_id, "x" * 300_000)

    await floor.cancel(run_id)
    run = await floor.until_ended(run_id)

    assert run.status is RunStatus.CANCELED


async def test_a_reply_that_was_not_read_is_not_called_delivered(floor: Floor) -> None:
    run_id = await floor.create("deaf")
    await floor.until_status(run_id, RunStatus.WAITING_USER)
    await floor.reply(run_id, "x" * 300_000)
    await floor.until_status(run_id, RunStatus.RUNNING)

    rows = await floor.storage.read(lambda db: db.fetch_all("SELECT state FROM interaction"))

    assert rows == [("ANSWERED",)]


async def test_nothing_is_taken_from_the_queue_after_a_pause(floor: Floor) -> None:
    busy = [await floor.create("sticky", {"hold": True}) for _ in range(8)]
    for run_id in busy:
        await floor.until_status(run_id, RunStatus.RUNNING)
    queued = await floor.create("quick")

    floor.dispatcher.pause()
    await floor.cancel(busy[0])
    await floor.until_ended(busy[0])
    await floor.until_free(1)

    assert (await floor.get(queued)).status is RunStatus.QUEUED


async def test_a_resumable_run_leaves_its_slot_while_it_waits(floor: Floor) -> None:
    question = {"questions": [{"kind": "confirm", "prompt": "Go on?"}]}
    run_id = await floor.create("resumable", question)

    waiting = await floor.until_status(run_id, RunStatus.WAITING_USER)
    await floor.until_free(floor.dispatcher.capacity)
    await floor.reply(run_id, "yes")
    run = await floor.until_ended(run_id)

    assert not waiting.holds_slot
    assert run.output == {"answers": ["yes"]}


async def test_a_stop_ends_every_tree_and_leaves_the_runs_on_record(floor: Floor) -> None:
    run_id = await floor.create("resumable", {"hold": True, "children": 3})
    await floor.until_status(run_id, RunStatus.RUNNING)

    await floor.dispatcher.stop()

    assert floor.dispatcher.slots_in_use == 0
    assert (await floor.get(run_id)).status is RunStatus.RUNNING
