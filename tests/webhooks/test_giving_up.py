"""Deliveries that a sender gives up, tries again, and deletes."""

from __future__ import annotations

import asyncio
from datetime import timedelta

import pytest
from runrecovery_service.storage import webhook_deliveries
from runrecovery_service.webhooks.sender import WebhookSender
from support.waiting import until_async

from .samples import DELIVERY
from .sender_bench import Bench, canceled

HOUR = 3600.0


async def test_gone_disables_the_webhook_until_it_is_told_to_try_again(
    bench: Bench, sender: WebhookSender
) -> None:
    bench.receiving.behave = lambda _: 410
    canceled(bench)
    sender.start()

    async def is_disabled() -> bool:
        return sender.state.is_disabled and not sender._runs

    await until_async(is_disabled, "the webhook is disabled")
    waiting = await bench.write(bench.store.waiting)
    await bench.write(lambda: bench.store.cancel(waiting))
    assert (bench.receiving.tried, bench.left()) == (["run-0001_3"], 4)

    bench.receiving.behave = lambda _: 200
    assert await sender.try_again() == 0
    assert len(await bench.until_arrived(4)) == 4


async def test_deliveries_of_a_dead_endpoint_are_given_up_after_their_time_and_kept(
    bench: Bench, sender: WebhookSender
) -> None:
    canceled(bench)
    sender._note_failure(DELIVERY, "Connection refused")

    async def left_due(hours: float) -> int:
        bench.clock.advance(hours * HOUR)
        await sender.tidy()
        backlog = webhook_deliveries.backlogs(bench.store.db, "default")["chat"]
        return backlog.due

    assert [await left_due(hours) for hours in (71, 0.9, 0.2)] == [2, 2, 0]
    assert (sender.state.given_up, bench.left()) == (2, 2)
    bench.receiving.behave = lambda _: 204
    sender.start()
    assert await sender.try_again() == 2
    assert await bench.until_arrived(2) == ["run-0001_3", "run-0001_4"]


async def test_after_days_without_the_service_each_delivery_is_tried_for_an_hour(
    bench: Bench, sender: WebhookSender
) -> None:
    canceled(bench)
    bench.clock.advance(100 * HOUR)

    await sender.tidy()
    sender._note_failure(DELIVERY, "Connection refused")
    bench.clock.advance(0.9 * HOUR)
    await sender.tidy()

    assert sender.state.given_up == 0
    bench.clock.advance(0.2 * HOUR)
    await sender.tidy()
    assert sender.state.given_up == 2


async def test_a_wall_clock_that_jumps_does_not_end_the_hour(
    bench: Bench, sender: WebhookSender
) -> None:
    failing = canceled(bench)
    sender._note_failure(DELIVERY, "Connection refused")
    sender._failing_runs[failing.key] = bench.clock.steady().us
    bench.clock.wall += timedelta(hours=100)

    await sender.tidy()

    assert sender.state.given_up == 0
    bench.clock.wall -= timedelta(hours=20)
    bench.clock.advance(1.1 * HOUR)
    await sender.tidy()
    assert sender.state.given_up == 2


async def test_an_endpoint_that_is_gone_is_given_up_after_the_hour_too(
    bench: Bench, sender: WebhookSender
) -> None:
    bench.receiving.behave = lambda _: 410
    canceled(bench)
    bench.clock.advance(100 * HOUR)
    sender.start()

    async def is_disabled() -> bool:
        return sender.state.is_disabled and not sender._runs

    await until_async(is_disabled, "the webhook is disabled")
    await sender.tidy()
    assert sender.state.given_up == 0

    bench.clock.advance(1.1 * HOUR)
    await sender.tidy()
    assert sender.state.given_up == 2


async def test_many_deliveries_are_given_up_revived_and_forgotten_in_short_transactions(
    bench: Bench, sender: WebhookSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webhook_deliveries, "ROWS", 1)
    for _ in range(3):
        canceled(bench)
    sender._note_failure(DELIVERY, "Connection refused")
    bench.clock.advance(73 * HOUR)

    await sender.tidy()
    assert sender.state.given_up == 6
    assert await sender.try_again() == 6
    await sender.tidy()
    bench.clock.advance(31 * 24 * HOUR)
    await sender.tidy()
    assert bench.left() == 0


async def test_a_run_that_fails_alone_is_given_up_alone(
    bench: Bench, sender: WebhookSender
) -> None:
    first, second = canceled(bench), canceled(bench)
    sender._failing_runs[first.key] = bench.clock.steady().us
    bench.clock.advance(100 * HOUR)

    await sender.tidy()

    due = bench.store.rows("SELECT DISTINCT run FROM webhook_delivery WHERE given_up_at IS NULL")
    assert due == [(second.key,)]


async def test_a_run_that_fails_again_after_a_success_is_tried_for_another_hour(
    bench: Bench, sender: WebhookSender
) -> None:
    codes = iter([500, 204, 500])
    bench.receiving.behave = lambda _: next(codes)
    canceled(bench)
    bench.clock.advance(100 * HOUR)
    paused: list[float] = []

    async def pause(_: asyncio.Event, seconds: float) -> bool:
        paused.append(seconds)
        bench.clock.advance(0.9 * HOUR)
        if len(paused) == 2:
            await asyncio.Event().wait()
        return False

    async def fails_again() -> bool:
        return len(paused) == 2

    sender.pause = pause
    sender.start()
    await until_async(fails_again, "the second delivery has failed")
    await sender.tidy()
    assert sender.state.given_up == 0

    bench.clock.advance(0.2 * HOUR)
    await sender.tidy()
    assert sender.state.given_up == 1


async def test_what_was_given_up_is_deleted_after_thirty_days(
    bench: Bench, sender: WebhookSender
) -> None:
    canceled(bench)
    sender._note_failure(DELIVERY, "Connection refused")
    bench.clock.advance(73 * HOUR)
    await sender.tidy()
    bench.clock.advance(29.9 * 24 * HOUR)
    await sender.tidy()
    assert bench.left() == 2

    bench.clock.advance(0.2 * 24 * HOUR)
    await sender.tidy()
    assert bench.left() == 0
