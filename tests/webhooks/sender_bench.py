"""A sender of one webhook with a store, a clock and a receiver that tests control."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runrecovery_service.domain.run import Run
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.webhooks.endpoint import Endpoint
from runrecovery_service.webhooks.http_post import Answer
from runrecovery_service.webhooks.sender import WebhookSender
from storage.service_store import ServiceStore
from support.clock import FakeClock
from support.waiting import until_async

from .samples import endpoint


@dataclass
class Receiving:
    """Replaces `post`: answers as `behave` says, and records the events that arrived.

    Attributes:
        behave: returns the status for a run and a sequence, or raises.
    """

    behave: Callable[[str], int] = lambda _: 204
    tried: list[str] = field(default_factory=list)
    arrived: list[str] = field(default_factory=list)
    headers: list[Mapping[str, str]] = field(default_factory=list)
    hanging: asyncio.Event | None = None
    at_once: int = 0
    most_at_once: int = 0

    async def post(self, _: Endpoint, headers: Mapping[str, str], __: bytes) -> Answer:
        event = headers["webhook-id"].rsplit("_", 1)[0]
        self.tried.append(event)
        self.headers.append(headers)
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if self.hanging is not None:
                await self.hanging.wait()
            code = self.behave(event)
        finally:
            self.at_once -= 1
        if 200 <= code < 300:
            self.arrived.append(event)
        return Answer(status=code, retry_after="7" if code == 429 else None)


@dataclass
class Bench:
    """A store with a webhook, the sender of the webhook, and its receiver.

    Attributes:
        pauses: the pauses of the sender, in seconds. Each one only advances the clock.
    """

    store: ServiceStore
    storage: Storage
    clock: FakeClock
    receiving: Receiving
    stop_signal: StopSignal
    pauses: list[float] = field(default_factory=list)

    def new_sender(self, **changes: Any) -> WebhookSender:
        given: dict[str, Any] = {
            "endpoint": endpoint(),
            "storage": self.storage,
            "owner": self.store.owner,
            "clock": self.clock,
            "stop_signal": self.stop_signal,
            "post": self.receiving.post,
            "pause": self.pause,
        }
        return WebhookSender(**(given | changes))

    async def pause(self, _: asyncio.Event, seconds: float) -> bool:
        self.pauses.append(seconds)
        self.clock.advance(seconds)
        await asyncio.sleep(0)
        return False

    async def until_arrived(self, count: int) -> list[str]:
        async def have_arrived() -> bool:
            return len(self.receiving.arrived) >= count

        await until_async(have_arrived, f"{count} deliveries arrive")
        return self.receiving.arrived

    def left(self) -> int:
        return len(self.store.rows("SELECT 1 FROM webhook_delivery"))

    async def until_left(self, count: int) -> None:
        async def are_left() -> bool:
            return self.left() == count

        await until_async(are_left, f"{count} deliveries are left")

    async def write(self, use: Callable[[], Run]) -> Run:
        """Change a run as callers do."""
        return await self.storage.write(lambda db: use())


def canceled(bench: Bench) -> Run:
    """Return a run with two deliveries: it has asked (event 3), and was canceled (event 4)."""
    return bench.store.cancel(bench.store.waiting())
