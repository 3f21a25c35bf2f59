"""One webhook's deliveries: order, retries, bounds, faults of the endpoint and of the store."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from runrecovery_service.clock import Clock
from runrecovery_service.domain.errors import Fenced, StorageUnavailable
from runrecovery_service.domain.start_errors import LeaseLost
from runrecovery_service.storage import webhook_deliveries
from runrecovery_service.storage.webhook_deliveries import Delivery
from runrecovery_service.webhooks import sender as sender_module
from runrecovery_service.webhooks.http_post import PostFailed
from runrecovery_service.webhooks.sender import WebhookSender
from standardwebhooks import Webhook
from structlog.testing import capture_logs
from support.waiting import patience_s, until_async
from support.webhook_receiver import SECRET, status

from .conftest import NewReceiver
from .samples import EVERY, endpoint
from .sender_bench import Bench, Receiving, canceled

HOUR = 3600.0
MORE = (
    "INSERT INTO webhook_delivery (webhook, instance, run, run_id, engine, sequence, event, status,"
    " created_at) WITH RECURSIVE n(i) AS (SELECT 100 UNION ALL SELECT i + 1 FROM n WHERE i < 699)"
    " SELECT webhook, instance, run, run_id, engine, i, event, status, created_at"
    " FROM webhook_delivery, n WHERE run = ? AND sequence = 3"
)
"""SQL that gives a run 600 more deliveries."""


async def test_what_was_due_at_the_start_and_what_comes_later_is_delivered_in_order(
    bench: Bench, sender: WebhookSender
) -> None:
    canceled(bench)
    sender.start()
    await bench.until_arrived(2)
    waiting = await bench.write(bench.store.waiting)
    await bench.until_arrived(3)
    await bench.write(lambda: bench.store.cancel(waiting))

    assert await bench.until_arrived(4) == [
        "run-0001_3", "run-0001_4", "run-0002_3", "run-0002_4",
    ]  # fmt: skip
    await bench.until_left(0)
    assert sender.state.tries == Counter(delivered=4)


async def test_a_failed_delivery_is_tried_again_with_its_id_before_later_ones_of_its_run(
    bench: Bench, sender: WebhookSender
) -> None:
    codes = iter([500, 302, 404, 100, 204, 204])
    bench.receiving.behave = lambda _: next(codes)
    canceled(bench)
    sender.start()

    assert await bench.until_arrived(2) == ["run-0001_3", "run-0001_4"]
    assert bench.receiving.tried == [*["run-0001_3"] * 5, "run-0001_4"]
    assert len({headers["webhook-id"] for headers in bench.receiving.headers[:5]}) == 1
    assert sender.meters.webhook_tries.values == {("chat", "failed"): 4, ("chat", "delivered"): 2}
    assert [0.5 * 2**n <= pause <= 2**n for n, pause in enumerate(bench.pauses)] == [True] * 4


async def test_the_pause_begins_anew_with_each_delivery_and_honours_retry_after(
    bench: Bench, sender: WebhookSender
) -> None:
    codes = iter([500, 500, 500, 204, 500, 429, 204])
    bench.receiving.behave = lambda _: next(codes)
    canceled(bench)
    sender.start()
    await bench.until_arrived(2)

    assert (len(bench.pauses), bench.pauses[4]) == (5, 7.0)
    assert 0.5 <= bench.pauses[3] <= 1.0


async def test_a_request_to_try_again_during_a_failing_try_ends_the_pause_after_it(
    bench: Bench, sender: WebhookSender
) -> None:
    is_asked: list[bool] = []

    async def pause(at_once: asyncio.Event, _: float) -> bool:
        is_asked.append(at_once.is_set())
        return True

    codes = iter([500, 204, 204])
    bench.receiving.behave = lambda _: next(codes)
    bench.receiving.hanging = asyncio.Event()
    sender.pause = pause
    canceled(bench)
    sender.start()

    async def hangs() -> bool:
        return bench.receiving.at_once == 1

    await until_async(hangs, "a try is under way")
    await sender.try_again()
    bench.receiving.hanging.set()
    await bench.until_arrived(2)

    assert is_asked == [True]


async def test_an_endpoint_that_was_away_for_an_hour_gets_everything_in_order(
    bench: Bench, sender: WebhookSender
) -> None:
    back_at = bench.clock.wall + timedelta(hours=1)

    def away(_: str) -> int:
        if bench.clock.wall < back_at:
            raise PostFailed("Connection refused")
        return 200

    bench.receiving.behave = away
    for _ in range(3):
        canceled(bench)
    sender.start()

    arrived = await bench.until_arrived(6)
    for run in ("run-0001", "run-0002", "run-0003"):
        assert [event for event in arrived if event.startswith(run)] == [f"{run}_3", f"{run}_4"]
    assert sender.state.tries["failed"] < 200
    assert (sender.state.failing_since, sender.state.last_failure) == (None, "Connection refused")


async def test_a_run_whose_delivery_fails_does_not_delay_other_runs(
    bench: Bench, sender: WebhookSender
) -> None:
    bench.receiving.behave = lambda event: 500 if event.startswith("run-0001") else 204
    for _ in range(3):
        canceled(bench)
    sender.start()

    assert set(await bench.until_arrived(4)) == {
        "run-0002_3", "run-0002_4", "run-0003_3", "run-0003_4",
    }  # fmt: skip
    assert set(bench.receiving.tried) & {"run-0001_4"} == set()


async def test_when_too_many_runs_fail_the_others_wait_until_one_gets_through(
    bench: Bench, sender: WebhookSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender_module, "RUNS_AT_ONCE", 2)
    paused = asyncio.Event()

    async def pause(_: asyncio.Event, __: float) -> bool:
        return await paused.wait()

    sender.pause = pause
    bench.receiving.behave = lambda event: 500 if not paused.is_set() else 204
    for _ in range(3):
        canceled(bench)
    sender.start()

    async def have_failed() -> bool:
        return sender.state.tries["failed"] == 2

    await until_async(have_failed, "two runs have failed")
    assert bench.receiving.tried == ["run-0001_3", "run-0002_3"]
    paused.set()
    assert len(await bench.until_arrived(6)) == 6


async def test_tries_at_one_time_are_bounded(bench: Bench, sender: WebhookSender) -> None:
    bench.receiving.hanging = asyncio.Event()
    for _ in range(20):
        canceled(bench)
    sender.start()

    async def hang() -> bool:
        return bench.receiving.at_once == 8

    await until_async(hang, "eight tries hang")
    bench.receiving.hanging.set()
    await bench.until_arrived(40)
    assert bench.receiving.most_at_once == 8


async def test_a_dead_endpoint_does_not_delay_another_webhook(
    bench: Bench, sender: WebhookSender
) -> None:
    other = replace(EVERY, name="other")
    bench.store.db.webhooks = (EVERY, other)
    well = Receiving()
    second = bench.new_sender(endpoint=endpoint(filter=other), post=well.post)
    bench.receiving.hanging = asyncio.Event()
    canceled(bench)
    sender.start()
    second.start()

    async def has_arrived() -> bool:
        return len(well.arrived) == 2

    try:
        await until_async(has_arrived, "the other webhook has its deliveries")
        assert bench.receiving.arrived == []
    finally:
        bench.receiving.hanging.set()
        await second.stop()


async def test_a_run_with_new_deliveries_queues_behind_runs_that_wait(
    bench: Bench, sender: WebhookSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sender_module, "RUNS_AT_ONCE", 1)
    first, _, _ = (canceled(bench) for _ in range(3))
    sender._latest_run = first.key  # served last, with new deliveries since
    sender.start()

    assert [event[:8] for event in await bench.until_arrived(6)] == [
        "run-0002", "run-0002", "run-0003", "run-0003", "run-0001", "run-0001",
    ]  # fmt: skip
    assert sender._latest_run == first.key


async def test_runs_with_many_deliveries_leave_room_for_others(
    bench: Bench, sender: WebhookSender
) -> None:
    bench.receiving.hanging = asyncio.Event()
    first = canceled(bench)
    with bench.store.db.transaction():
        bench.store.db.execute(MORE, (first.key,))
    for _ in range(7):
        canceled(bench)
    sender.start()

    async def hang() -> bool:
        return bench.receiving.at_once == 8

    await until_async(hang, "a try of each run is under way")
    assert sorted(bench.receiving.tried) == [f"run-000{n}_3" for n in range(1, 9)]
    bench.receiving.hanging.set()
    await bench.until_arrived(20)


async def test_a_delivery_whose_removal_fails_is_not_sent_again(
    bench: Bench, sender: WebhookSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, failed = webhook_deliveries.remove_delivered, list[Delivery]()

    def fail_at_first(db: Any, delivery: Delivery) -> None:
        if len(failed) < 5:
            failed.append(delivery)
            raise StorageUnavailable
        remove(db, delivery)

    monkeypatch.setattr(webhook_deliveries, "remove_delivered", fail_at_first)
    canceled(bench)
    with capture_logs() as logs:
        sender.start()
        await bench.until_left(0)

    assert bench.receiving.tried == ["run-0001_3", "run-0001_4"]
    assert sender.state.tries == Counter(delivered=2)
    assert bench.pauses == [1, 2, 4, 8, 16]
    assert [line["event"] for line in logs].count("webhook.store_failed") == 1


async def ended(sender: WebhookSender) -> None:
    """Wait until the sender has ended by itself."""
    assert sender._task is not None
    async with asyncio.timeout(patience_s()):
        await asyncio.gather(sender._task, *sender._runs.values())


async def test_a_superseded_instance_stops_and_tries_nothing_more(
    bench: Bench, sender: WebhookSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(db: Any, delivery: Delivery) -> None:
        raise Fenced("instance 'default'")

    monkeypatch.setattr(webhook_deliveries, "remove_delivered", refuse)
    for _ in range(10):
        canceled(bench)
    sender.start()
    await ended(sender)

    assert isinstance(bench.stop_signal.failure, Fenced)
    assert len(set(bench.receiving.tried)) == len(bench.receiving.tried)


async def test_a_service_that_fails_starts_no_more_tries(
    bench: Bench, sender: WebhookSender
) -> None:
    bench.receiving.hanging = asyncio.Event()
    for _ in range(20):
        canceled(bench)
    sender.start()

    async def hang() -> bool:
        return len(sender._runs) == 20 and bench.receiving.at_once == 8

    await until_async(hang, "eight tries hang, and more wait for their turn")
    bench.stop_signal.fail(LeaseLost("default", 15.0))
    bench.receiving.hanging.set()
    await ended(sender)

    assert len(bench.receiving.tried) == 8


async def test_an_unexpected_error_of_a_try_is_a_failed_try_with_its_pause(
    bench: Bench, sender: WebhookSender
) -> None:
    outcomes = iter([ValueError("hidden"), OverflowError("hidden")])

    def fail_twice(_: str) -> int:
        if (error := next(outcomes, None)) is not None:
            raise error
        return 204

    bench.receiving.behave = fail_twice
    canceled(bench)
    with capture_logs() as logs:
        sender.start()
        await bench.until_arrived(2)

    assert sender.state.tries == Counter(failed=2, delivered=2)
    assert len(bench.pauses) == 2
    assert sender.state.last_failure == "the service failed: OverflowError"
    assert "hidden" not in str(logs)


@pytest.mark.parametrize(
    ("column", "damage", "reason"),
    [
        ("event", "'?'", "event is not known"),
        ("run_id", "CAST(x'61ff62' AS TEXT)", "run_id is damaged"),
        ("engine", "CAST(x'61ff62' AS TEXT)", "engine is damaged"),
        ("status", "''", "status is damaged"),
        ("error_code", "char(0)", "error_code is damaged"),
    ],
)
async def test_a_damaged_delivery_is_given_up_and_later_ones_of_its_run_follow(
    bench: Bench, sender: WebhookSender, column: str, damage: str, reason: str
) -> None:
    canceled(bench)
    with bench.store.db.transaction():
        bench.store.db.execute(
            f"UPDATE webhook_delivery SET {column} = {damage} WHERE sequence = 3"  # noqa: S608
        )
    with capture_logs() as logs:
        sender.start()
        assert await bench.until_arrived(1) == ["run-0001_4"]
        await bench.until_left(1)

    assert [line for line in logs if line["event"] == "webhook.delivery_damaged"] == [
        {
            "event": "webhook.delivery_damaged",
            "log_level": "error",
            "webhook": "chat",
            "reason": reason,
        }
    ]
    assert bench.store.rows("SELECT given_up_at IS NULL FROM webhook_delivery") == [(0,)]
    assert sender.state.given_up == 1


async def test_a_stop_lets_a_try_end_and_cuts_one_that_hangs(
    bench: Bench, sender: WebhookSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.receiving.hanging = asyncio.Event()
    canceled(bench)
    sender.start()

    async def hangs() -> bool:
        return bench.receiving.at_once == 1

    await until_async(hangs, "a try is under way")
    stopping = asyncio.create_task(sender.stop())
    await asyncio.sleep(0)
    bench.receiving.hanging.set()
    await stopping
    assert (bench.receiving.arrived, bench.left()) == (["run-0001_3"], 1)

    monkeypatch.setattr(sender_module, "STOP_S", 0.01)
    bench.receiving.hanging = asyncio.Event()
    second = bench.new_sender()
    second.start()
    await until_async(hangs, "another try is under way")
    await second.stop()
    assert (bench.receiving.at_once, bench.left()) == (0, 1)


async def test_a_stopped_sender_leaves_no_task(bench: Bench, sender: WebhookSender) -> None:
    canceled(bench)
    sender.start()
    await bench.until_arrived(2)

    await sender.stop()

    names = [task.get_name() for task in asyncio.all_tasks()]
    assert [name for name in names if name.startswith("webhook")] == []


async def test_a_real_receiver_gets_what_the_library_verifies(
    bench: Bench, new_receiver: NewReceiver
) -> None:
    receiver = new_receiver(status(200))
    given: dict[str, Any] = {"endpoint": endpoint(receiver.port)}
    sender = WebhookSender(
        storage=bench.storage,
        owner=bench.store.owner,
        clock=Clock(),
        stop_signal=bench.stop_signal,
        **given,
    )
    canceled(bench)
    sender.start()
    try:
        await bench.until_left(0)
    finally:
        await sender.stop()

    facts = [Webhook(SECRET).verify(got.body, dict(got.headers)) for got in receiver.received]
    assert [(fact["type"], fact["status"]) for fact in facts] == [
        ("WAITING_USER", "WAITING_USER"),
        ("ENDED", "CANCELED"),
    ]
