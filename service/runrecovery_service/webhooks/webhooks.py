"""All webhooks of this instance: starts, replaces and stops their senders; reports their status.

The modules of senders are imported only if a webhook is configured, to keep other starts fast.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import field
from datetime import datetime
from typing import TYPE_CHECKING

from runrecovery_service.clock import Clock
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.metric_counters import Meters
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner

if TYPE_CHECKING:
    from runrecovery_service.storage.webhook_deliveries import Backlog
    from runrecovery_service.webhooks.endpoint import Endpoint
    from runrecovery_service.webhooks.sender import SenderState, WebhookSender


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookStatus:
    """A webhook, the results of its tries, and the deliveries that it has not received yet."""

    endpoint: Endpoint
    state: SenderState
    backlog: Backlog


@dataclass(slots=True, kw_only=True, eq=False)
class Webhooks:
    """The configured webhooks, with a sender for each.

    Attributes:
        endpoints: the configured webhooks.
        meters: the counters to update.
        senders: by webhook name: its sender. Empty until `start`.
    """

    db: Database
    storage: Storage
    owner: Owner
    clock: Clock
    stop_signal: StopSignal
    endpoints: Sequence[Endpoint]
    meters: Meters = field(default_factory=Meters)
    senders: dict[str, WebhookSender] = field(default_factory=dict, init=False)
    _is_started: bool = field(default=False, init=False)
    _adjusting: asyncio.Task[None] | None = field(default=None, init=False)
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock, init=False)

    def start(self) -> None:
        """Start a sender for each webhook."""
        self._is_started = True
        self._start_missing()

    def follows(self, endpoints: Sequence[Endpoint]) -> bool:
        """Return whether these webhooks equal the present ones, and none is disabled."""
        return tuple(endpoints) == tuple(self.endpoints) and not any(
            sender.state.is_disabled for sender in self.senders.values()
        )

    def replace(self, endpoints: Sequence[Endpoint]) -> None:
        """Replace the webhooks. A disabled webhook that is still configured starts again."""
        self.endpoints = endpoints
        self.db.webhooks = tuple(endpoint.filter for endpoint in endpoints)
        if self._is_started:
            self._adjusting = asyncio.create_task(self._adjust(), name="webhooks")
            self._adjusting.add_done_callback(self.stop_signal.task_ended)

    async def statuses(self) -> list[WebhookStatus]:
        """Return the status of every webhook, in the order of the configuration."""
        if not self.senders:
            return []
        from runrecovery_service.storage import webhook_deliveries  # noqa: PLC0415 - see above

        found = await self.storage.read(webhook_deliveries.backlogs, self.owner.instance)
        return [
            WebhookStatus(
                endpoint=endpoint,
                state=sender.state,
                backlog=found.get(endpoint.name) or webhook_deliveries.Backlog(),
            )
            for endpoint in self.endpoints
            if (sender := self.senders.get(endpoint.name)) is not None
        ]

    @property
    def failing_since(self) -> dict[str, datetime | None]:
        """By webhook name: since when its tries fail; None: its latest try succeeded."""
        return {name: sender.state.failing_since for name, sender in self.senders.items()}

    async def retry(self, name: str) -> int | None:
        """Try the deliveries of a webhook at once; return how many given-up ones are due again.

        Return None if no webhook has this name.
        """
        sender = self.senders.get(name)
        return None if sender is None else await sender.try_again()

    async def stop(self) -> None:
        """Stop every sender."""
        self._is_started = False
        async with self._lock:
            await self._stop(self.senders)

    async def _adjust(self) -> None:
        """Stop senders that do not match the webhooks, then start the missing ones.

        This order matters, because two senders of one webhook would break the order of deliveries.
        """
        async with self._lock:
            wanted = {endpoint.name: endpoint for endpoint in self.endpoints}
            await self._stop(
                {
                    name: sender
                    for name, sender in self.senders.items()
                    if sender.state.is_disabled or wanted.get(name) != sender.endpoint
                }
            )
            if self._is_started:
                self._start_missing()

    async def _stop(self, senders: dict[str, WebhookSender]) -> None:
        await asyncio.gather(*(sender.stop() for sender in senders.values()))
        for name in list(senders):
            del self.senders[name]

    def _start_missing(self) -> None:
        for endpoint in self.endpoints:
            if endpoint.name not in self.senders:
                self.senders[endpoint.name] = sender = self._new_sender(endpoint)
                sender.start()

    def _new_sender(self, endpoint: Endpoint) -> WebhookSender:
        from runrecovery_service.webhooks.sender import WebhookSender  # noqa: PLC0415 - see above

        return WebhookSender(
            endpoint=endpoint,
            storage=self.storage,
            owner=self.owner,
            clock=self.clock,
            stop_signal=self.stop_signal,
            meters=self.meters,
        )
