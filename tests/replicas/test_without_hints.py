"""What a peer changes is found by a poll where no hint by NOTIFY arrives."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

import pytest
from replicas.dead_instance import Pair
from runrecovery_service.clock import wait_within
from runrecovery_service.config.values import EVERYWHERE
from runrecovery_service.domain.webhook import WebhookEvent, WebhookFilter
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.webhooks import sender as sender_module
from runrecovery_service.webhooks.endpoint import Endpoint
from runrecovery_service.webhooks.http_post import Answer
from runrecovery_service.webhooks.sender import WebhookSender
from runrecovery_service.webhooks.signature import read_secret
from support.clock import FakeClock
from support.waiting import patience_s, until_async
from support.webhook_receiver import SECRET

ENDED = WebhookFilter(name="chat", events=frozenset({WebhookEvent.ENDED}))


async def test_an_event_that_a_peer_has_caused_is_delivered_without_a_hint(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    arrived: list[str] = []

    async def noted(event: asyncio.Event, seconds: float) -> bool:
        pauses.append(seconds)
        return await wait_within(event, seconds)

    async def post(_: Endpoint, headers: Mapping[str, str], __: bytes) -> Answer:
        arrived.append(headers["webhook-id"])
        return Answer(status=204, retry_after=None)

    async def sleeps() -> bool:
        return bool(pauses)

    async def has_arrived() -> bool:
        return bool(arrived)

    monkeypatch.setattr(sender_module, "wait_within", noted)
    monkeypatch.setattr(sender_module, "SHARED_POLL_S", 0.05)
    monkeypatch.setattr(sender_module, "POLL_S", 100 * patience_s())
    pair.dead.db.webhooks = (ENDED,)
    storage = Storage(pair.dead.db)
    sender = WebhookSender(
        endpoint=Endpoint(
            filter=ENDED,
            host="127.0.0.1",
            port=9,
            target="/",
            tls=None,
            keys=(read_secret(SECRET),),
            private=EVERYWHERE,
            timeout_s=10.0,
            give_up_s=60.0,
        ),
        storage=storage,
        owner=pair.dead.owner,
        clock=FakeClock(wall=pair.dead.now),
        stop_signal=StopSignal(),
        post=post,
    )
    run = pair.dead.create()
    sender.start()
    try:
        await until_async(sleeps, "the sender has found nothing")
        canceled = pair.dead.cancel(run, owner=pair.owner)  # not by the storage of the sender
        await until_async(has_arrived, "the delivery arrives")
    finally:
        await sender.stop()
        await asyncio.to_thread(storage.close)

    assert [event.rsplit("_", 1)[0] for event in arrived] == [f"{canceled.run_id}_2"]
