"""What a commit announces reaches the running turns, at once and without needless reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from runrecovery_service.clock import Clock
from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.execution import dispatcher, record_watch
from runrecovery_service.storage import interactions, runs, turns
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.requests import Receipt

from .conftest import FAR_S, Floor, NewFloor, until

MANY = 40
OTHER_KEY = 999


@pytest.fixture(autouse=True)
def only_after_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no check come by itself."""
    monkeypatch.setattr(dispatcher, "CHECK_INTERVAL_S", FAR_S)
    monkeypatch.setattr(record_watch, "CHECK_INTERVAL_S", FAR_S)


def losing_its_answer(use: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a use so that its first commit stands, and is reported to have failed."""
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
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await floor.create("holds")
    await floor.until_tree(run_id, 1)
    monkeypatch.setattr(floor.storage, "_writer", None)  # each use is a commit of its own
    monkeypatch.setattr(runs, "cancel", losing_its_answer(runs.cancel))

    with pytest.raises(StorageUnavailable):
        await floor.cancel(run_id)

    assert (await floor.until_ended(run_id)).status is RunStatus.CANCELED


async def test_a_reply_whose_commit_was_reported_to_have_failed_is_delivered(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = await floor.create("asks")
    await floor.until_status(run_id, RunStatus.WAITING_USER)
    monkeypatch.setattr(floor.storage, "_writer", None)
    monkeypatch.setattr(interactions, "reply", losing_its_answer(interactions.reply))

    with pytest.raises(StorageUnavailable):
        await floor.reply(run_id, "yes")

    assert (await floor.until_ended(run_id)).status is RunStatus.SUCCEEDED


def same_request(floor: Floor, request_id: str | None) -> dict[str, Any]:
    """Return the arguments of a request that a caller may repeat."""
    receipt = (
        None
        if request_id is None
        else Receipt(request_id=request_id, method="SameMethod", fingerprint=b"same fields")
    )
    return {"owner": floor.owner, "etag": None, "receipt": receipt, "now": Clock().now()}


@pytest.mark.parametrize("request_id", [None, "the same"])
async def test_a_repeated_cancel_ends_a_process_that_the_first_has_not_reached(
    floor: Floor, request_id: str | None
) -> None:
    run_id = await floor.create("holds")
    await floor.until_tree(run_id, 1)
    same = same_request(floor, request_id)
    await floor.storage.write_own(runs.cancel, run_id, **same)  # announced to watchers only

    await floor.storage.write(runs.cancel, run_id, **same)

    assert (await floor.until_ended(run_id)).status is RunStatus.CANCELED


@pytest.mark.parametrize("request_id", [None, "the same"])
async def test_a_repeated_reply_is_delivered_to_a_process_that_the_first_has_not_reached(
    floor: Floor, request_id: str | None
) -> None:
    run_id = await floor.create("asks")
    await floor.until_status(run_id, RunStatus.WAITING_USER)
    same = same_request(floor, request_id)
    await floor.storage.write_own(interactions.reply, run_id, 1, "yes", **same)

    await floor.storage.write(interactions.reply, run_id, 1, "yes", **same)

    assert (await floor.until_ended(run_id)).status is RunStatus.SUCCEEDED


async def test_on_a_shared_store_all_records_are_read_in_time_although_other_runs_change(
    new_floor: NewFloor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_watch, "CHECK_INTERVAL_S", 0.2)
    monkeypatch.setattr(Storage, "is_shared", True)
    floor = await new_floor()
    run_id = await floor.create("holds")
    await floor.until_tree(run_id, 1)
    await floor.storage.write_own(runs.cancel, run_id, **same_request(floor, None))

    async def has_ended() -> bool:  # asked every few milliseconds
        floor.storage.changes.announce({OTHER_KEY})
        return (await floor.get(run_id)).status is RunStatus.CANCELED

    await until(has_ended)


async def test_a_run_that_cannot_be_read_keeps_no_other_from_its_cancel(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged, sound = await floor.create("holds"), await floor.create("holds")
    for run_id in (damaged, sound):
        await floor.until_tree(run_id, 1)
    read = turns.current_run

    def failing(db: Any, turn: Any, **named: Any) -> Any:
        if turn.run.run_id == damaged:
            raise StorageUnavailable
        return read(db, turn, **named)

    with monkeypatch.context() as patched:
        patched.setattr(turns, "current_run", failing)
        await floor.cancel(damaged)
        await floor.cancel(sound)
        floor.storage.changes.announce_doubt()  # the records of both are read

        async def is_passed_on() -> bool:
            (last,) = [s for s in floor.turns.supervisors if s.turn.run.run_id == sound]
            return last.state.is_canceled

        await until(is_passed_on)

    assert (await floor.until_ended(damaged)).status is RunStatus.CANCELED


async def test_a_run_whose_create_was_reported_to_have_failed_is_launched(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floor.storage, "_writer", None)
    monkeypatch.setattr(runs, "create", losing_its_answer(runs.create))

    with pytest.raises(StorageUnavailable):
        await floor.create("quick")
    (row,) = await floor.storage.read(lambda db: db.fetch_all("SELECT run_id FROM run"))

    assert (await floor.until_ended(row[0])).status is RunStatus.SUCCEEDED


async def test_changes_of_other_runs_make_no_record_read(floor: Floor, counted: list[str]) -> None:
    run_id = await floor.create("holds")
    await floor.until_tree(run_id, 1)
    await floor.until_ended(await floor.create("quick"))
    counted.clear()

    for _ in range(MANY):
        await floor.until_ended(await floor.create("quick"))

    assert run_id not in counted


async def test_a_queue_that_cannot_be_written_is_tried_once_with_each_change(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[None] = []

    def fail(*_: Any, **__: Any) -> None:
        tries.append(None)
        raise StorageUnavailable

    monkeypatch.setattr(turns, "take_next", fail)
    for number in range(5):
        await floor.create("quick")

        async def has_tried(so_often: int = number + 1) -> bool:
            return len(tries) >= so_often

        await until(has_tried)
    for _ in range(MANY):  # time enough for a loop that would wake itself
        await floor.storage.read(lambda db: db.fetch_one("SELECT 1"))

    assert len(tries) == 5
