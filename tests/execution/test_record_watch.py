"""Changes that a commit announces reach the running turns at once and without needless reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import structlog
from runrecovery_service.clock import Clock
from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.execution import dispatcher, record_watch
from runrecovery_service.storage import interactions, runs, turn_starts, turns
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.requests import Receipt

from .conftest import FAR_S, Execution, NewExecution, until

MANY = 40
OTHER_KEY = 999


@pytest.fixture(autouse=True)
def only_after_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the periodic checks off."""
    monkeypatch.setattr(dispatcher, "CHECK_INTERVAL_S", FAR_S)
    monkeypatch.setattr(record_watch, "CHECK_INTERVAL_S", FAR_S)


def losing_its_answer(use: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `use` so that its first call commits and is reported to have failed."""
    left = [1]

    def call(*args: Any, **named: Any) -> Any:
        result = use(*args, **named)
        if left:
            left.clear()
            raise StorageUnavailable
        return result

    return call


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The run_ids whose records were read."""
    read: list[str] = []
    look = turns.current_run

    def counting(db: Any, turn: Any, **named: Any) -> Any:
        read.append(turn.run.run_id)
        return look(db, turn, **named)

    monkeypatch.setattr(turns, "current_run", counting)
    return read


async def test_a_cancel_whose_commit_was_reported_to_have_failed_is_carried_out(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await execution.create("holds")
    await execution.until_tree(run_id, 1)
    monkeypatch.setattr(execution.storage, "_writer", None)  # each use is a commit of its own
    monkeypatch.setattr(runs, "cancel", losing_its_answer(runs.cancel))

    with pytest.raises(StorageUnavailable):
        await execution.cancel(run_id)

    assert (await execution.until_ended(run_id)).status is RunStatus.CANCELED


async def test_a_reply_whose_commit_was_reported_to_have_failed_is_delivered(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await execution.create("asks")
    await execution.until_status(run_id, RunStatus.WAITING_USER)
    monkeypatch.setattr(execution.storage, "_writer", None)
    monkeypatch.setattr(interactions, "reply", losing_its_answer(interactions.reply))

    with pytest.raises(StorageUnavailable):
        await execution.reply(run_id, "yes")

    assert (await execution.until_ended(run_id)).status is RunStatus.SUCCEEDED


def same_request(execution: Execution, request_id: str | None) -> dict[str, Any]:
    """Return the arguments of a request that a caller may repeat."""
    receipt = (
        None
        if request_id is None
        else Receipt(request_id=request_id, method="SameMethod", fingerprint=b"same fields")
    )
    return {"owner": execution.owner, "etag": None, "receipt": receipt, "now": Clock().now()}


@pytest.mark.parametrize("request_id", [None, "the same"])
async def test_a_repeated_cancel_ends_a_process_that_the_first_has_not_reached(
    execution: Execution, request_id: str | None
) -> None:
    run_id = await execution.create("holds")
    await execution.until_tree(run_id, 1)
    same = same_request(execution, request_id)
    await execution.storage.write_own(runs.cancel, run_id, **same)  # announced to watchers only

    await execution.storage.write(runs.cancel, run_id, **same)

    assert (await execution.until_ended(run_id)).status is RunStatus.CANCELED


@pytest.mark.parametrize("request_id", [None, "the same"])
async def test_a_repeated_reply_is_delivered_to_a_process_that_the_first_has_not_reached(
    execution: Execution, request_id: str | None
) -> None:
    run_id = await execution.create("asks")
    await execution.until_status(run_id, RunStatus.WAITING_USER)
    same = same_request(execution, request_id)
    await execution.storage.write_own(interactions.reply, run_id, 1, "yes", **same)

    await execution.storage.write(interactions.reply, run_id, 1, "yes", **same)

    assert (await execution.until_ended(run_id)).status is RunStatus.SUCCEEDED


async def test_on_a_shared_store_all_records_are_read_in_time_although_other_runs_change(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_watch, "CHECK_INTERVAL_S", 0.2)
    monkeypatch.setattr(Storage, "is_shared", True)
    execution = await new_execution()
    run_id = await execution.create("holds")
    await execution.until_tree(run_id, 1)
    await execution.storage.write_own(runs.cancel, run_id, **same_request(execution, None))

    async def has_ended() -> bool:  # asked every few milliseconds
        execution.storage.changes.announce({OTHER_KEY})
        return (await execution.get(run_id)).status is RunStatus.CANCELED

    await until(has_ended)


async def test_on_a_shared_store_a_run_that_a_peer_has_queued_is_launched_in_time(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher, "SHARED_CHECK_INTERVAL_S", 0.2)
    monkeypatch.setattr(Storage, "is_shared", True)
    execution = await new_execution()
    run_id = await execution.create("resumable", {"questions": [{"prompt": "So?"}]})
    await execution.until_status(run_id, RunStatus.WAITING_USER)

    # Announced to watchers only, as by another process.
    await execution.storage.write_own(
        interactions.reply, run_id, 1, "yes", **same_request(execution, None)
    )

    assert (await execution.until_ended(run_id)).status is RunStatus.SUCCEEDED


async def test_a_run_that_cannot_be_read_does_not_keep_another_from_its_cancel(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, sound = await execution.create("holds"), await execution.create("holds")
    for run_id in (damaged, sound):
        await execution.until_tree(run_id, 1)
    read = turns.current_run

    def failing(db: Any, turn: Any, **named: Any) -> Any:
        if turn.run.run_id == damaged:
            raise StorageUnavailable
        return read(db, turn, **named)

    with monkeypatch.context() as patched:
        patched.setattr(turns, "current_run", failing)
        await execution.cancel(damaged)
        await execution.cancel(sound)
        execution.storage.changes.announce_doubt()  # the records of both are read

        async def is_passed_on() -> bool:
            (last,) = [s for s in execution.turns.supervisors if s.turn.run.run_id == sound]
            return last.state.is_canceled

        await until(is_passed_on)

    assert (await execution.until_ended(damaged)).status is RunStatus.CANCELED


async def test_a_run_whose_create_was_reported_to_have_failed_is_launched(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution.storage, "_writer", None)
    monkeypatch.setattr(runs, "create", losing_its_answer(runs.create))

    with pytest.raises(StorageUnavailable):
        await execution.create("quick")
    (row,) = await execution.storage.read(lambda db: db.fetch_all("SELECT run_id FROM run"))

    assert (await execution.until_ended(row[0])).status is RunStatus.SUCCEEDED


async def test_changes_of_other_runs_cause_no_read_of_a_record(
    execution: Execution, counted: list[str]
) -> None:
    run_id = await execution.create("holds")
    await execution.until_tree(run_id, 1)
    await execution.until_ended(await execution.create("quick"))
    counted.clear()

    for _ in range(10):
        await execution.until_ended(await execution.create("quick"))

    assert run_id not in counted


async def test_a_queue_that_cannot_be_written_is_tried_once_after_each_change_and_logged_once(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[None] = []

    def fail(*_: Any, **__: Any) -> None:
        tries.append(None)
        raise StorageUnavailable

    monkeypatch.setattr(turn_starts, "take_next", fail)
    with structlog.testing.capture_logs() as logs:
        for number in range(5):
            await execution.create("quick")

            async def has_tried(so_often: int = number + 1) -> bool:
                return len(tries) >= so_often

            await until(has_tried)
        for _ in range(MANY):  # enough time for a loop that would wake itself
            await execution.storage.read(lambda db: db.fetch_one("SELECT 1"))

    assert len(tries) == 5
    assert [line["event"] for line in logs] == ["execution.queue_unreadable"]
