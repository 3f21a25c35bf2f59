"""The webhooks of an instance while a reload replaces them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from runrecovery_service.clock import Clock
from runrecovery_service.domain.webhook import WebhookFilter
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import instances, webhook_deliveries
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.webhook_deliveries import Backlog
from runrecovery_service.webhooks.webhooks import Webhooks
from storage.service_store import ServiceStore, boot
from support.waiting import until_async
from support.webhook_receiver import Receiver, status

from .conftest import NewReceiver
from .samples import EVERY, endpoint


@pytest.fixture
def store(database: Database) -> ServiceStore:
    owner = instances.claim(database, boot(), now=datetime(2026, 11, 24, 11, tzinfo=UTC))
    return ServiceStore(db=database, owner=owner)


@pytest.fixture
async def webhooks(store: ServiceStore) -> AsyncIterator[Webhooks]:
    """The webhooks of an instance: none is configured, and `start` was not called."""
    storage = Storage(store.db)
    webhooks = Webhooks(
        db=store.db,
        storage=storage,
        owner=store.owner,
        clock=Clock(),
        stop_signal=StopSignal(),
        endpoints=(),
    )
    yield webhooks
    await webhooks.stop()
    await asyncio.to_thread(storage.close)


async def until_received(receiver: Receiver, count: int) -> list[str]:
    """Wait until a receiver has had so many requests, and return the names of their runs."""

    async def has_received() -> bool:
        return len(receiver.received) >= count

    await until_async(has_received, f"{count} requests")
    return [request.facts["run_id"] for request in receiver.received]


async def test_a_webhook_that_is_added_while_the_service_runs_gets_events_from_then_on(
    store: ServiceStore, webhooks: Webhooks, new_receiver: NewReceiver
) -> None:
    receiver = new_receiver()
    webhooks.start()
    store.waiting()

    webhooks.replace((endpoint(receiver.port),))
    await webhooks.storage.write(lambda db: store.waiting())

    assert await until_received(receiver, 1) == ["run-0002"]


async def test_waiting_deliveries_follow_a_changed_url(
    store: ServiceStore, webhooks: Webhooks, new_receiver: NewReceiver
) -> None:
    old, new = new_receiver(status(500)), new_receiver()
    webhooks.replace((endpoint(old.port),))
    store.waiting()
    webhooks.start()
    await until_received(old, 1)

    webhooks.replace((endpoint(new.port),))

    assert await until_received(new, 1) == ["run-0001"]
    assert new.received[0].id == old.received[0].id


async def test_a_removed_webhook_gets_nothing_more_and_its_deliveries_are_kept(
    store: ServiceStore, webhooks: Webhooks, new_receiver: NewReceiver
) -> None:
    removed, kept = new_receiver(status(500)), new_receiver()
    other = endpoint(kept.port, filter=replace(EVERY, name="kept"))
    webhooks.replace((endpoint(removed.port), other))
    webhooks.start()
    await webhooks.storage.write(lambda db: store.waiting())
    await until_received(removed, 1)
    await until_received(kept, 1)
    sender = webhooks.senders["kept"]

    webhooks.replace((other,))

    async def is_gone() -> bool:
        return "chat" not in webhooks.senders

    await until_async(is_gone, "its sender is gone")
    await webhooks.storage.write(lambda db: store.waiting())
    await until_received(kept, 2)
    assert webhooks.senders["kept"] is sender
    left = "SELECT run_id FROM webhook_delivery WHERE webhook = 'chat'"
    assert store.rows(left) == [("run-0001",)]


async def test_a_disabled_webhook_is_tried_anew(
    store: ServiceStore, webhooks: Webhooks, new_receiver: NewReceiver
) -> None:
    receiver = new_receiver(status(410))
    webhooks.replace((endpoint(receiver.port),))
    store.waiting()
    webhooks.start()

    async def is_disabled() -> bool:
        return webhooks.senders["chat"].state.is_disabled

    assert webhooks.follows((endpoint(receiver.port),))
    await until_async(is_disabled, "it is disabled")
    assert not webhooks.follows((endpoint(receiver.port),))
    receiver.behave = status(204)
    webhooks.replace((endpoint(receiver.port),))

    assert await until_received(receiver, 2) == ["run-0001"] * 2


async def test_several_replacements_at_once_leave_one_sender_of_each_webhook(
    store: ServiceStore, webhooks: Webhooks, new_receiver: NewReceiver
) -> None:
    receivers = [new_receiver() for _ in range(3)]
    webhooks.start()
    for receiver in receivers:
        webhooks.replace((endpoint(receiver.port),))
    await webhooks.storage.write(lambda db: store.waiting())

    assert await until_received(receivers[2], 1) == ["run-0001"]
    assert [receiver.received for receiver in receivers[:2]] == [[], []]
    assert list(webhooks.senders) == ["chat"]


def test_webhooks_are_the_same_only_with_the_same_filter_url_and_secrets() -> None:
    same = endpoint()

    assert endpoint() == same
    assert endpoint(authorities="PEM") != same
    assert endpoint(keys=(b"other",)) != same
    assert endpoint(target="/other") != same
    assert endpoint(filter=WebhookFilter(name="chat", events=frozenset())) != same


async def test_an_operator_sees_what_a_webhook_lacks_and_has_it_tried_at_once(
    store: ServiceStore, webhooks: Webhooks, new_receiver: NewReceiver
) -> None:
    receiver = new_receiver(status(500))
    webhooks.replace((endpoint(receiver.port),))
    run = store.waiting()
    webhooks.start()
    await until_received(receiver, 1)

    async def has_failed() -> bool:
        return webhooks.senders["chat"].state.tries["failed"] > 0

    await until_async(has_failed, "a try has failed")
    await webhooks.storage.write(
        webhook_deliveries.give_up, "default", "chat", before=store.tick(), runs=None, now=store.now
    )
    (lacking,) = await webhooks.statuses()
    assert webhooks.failing_since == {"chat": lacking.state.failing_since}
    assert lacking.state.failing_since is not None
    receiver.behave = status(204)

    assert await webhooks.retry("chat") == 1
    await until_received(receiver, 2)

    async def has_arrived() -> bool:
        return webhooks.senders["chat"].state.tries["delivered"] == 1

    await until_async(has_arrived, "the delivery has arrived")
    assert lacking.backlog == Backlog(due=0, oldest_at=None, given_up=1)
    assert lacking.endpoint.origin == f"http://127.0.0.1:{receiver.port}"
    assert receiver.received[-1].facts["run_id"] == run.run_id
    assert await webhooks.retry("other") is None
