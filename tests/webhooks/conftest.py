"""Receivers, and a sender with its store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from typing import Any, TypeAlias

import pytest
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import instances
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.webhooks.sender import WebhookSender
from storage.service_store import ServiceStore, boot
from support.clock import FakeClock
from support.webhook_receiver import Behave, Receiver

from .samples import EVERY
from .sender_bench import Bench, Receiving

NewReceiver: TypeAlias = Callable[..., Receiver]


@pytest.fixture
def new_receiver() -> Iterator[NewReceiver]:
    """A function that creates receivers, which are closed at the end of the test."""
    made: list[Receiver] = []

    def make(*behave: Behave, **named: Any) -> Receiver:
        made.append(Receiver(*behave, **named))
        return made[-1]

    yield make
    for receiver in made:
        receiver.close()


@pytest.fixture
def database_kind() -> str:
    """Return only SQLite, because tests/storage runs the queries on both databases."""
    return "sqlite"


@pytest.fixture
async def bench(database: Database) -> AsyncIterator[Bench]:
    database.webhooks = (EVERY,)
    owner = instances.claim(database, boot(), now=datetime(2026, 11, 24, 11, tzinfo=UTC))
    storage = Storage(database)
    clock = FakeClock(wall=datetime(2026, 11, 24, 12, tzinfo=UTC))
    yield Bench(ServiceStore(db=database, owner=owner), storage, clock, Receiving(), StopSignal())
    await asyncio.to_thread(storage.close)


@pytest.fixture
async def sender(bench: Bench) -> AsyncIterator[WebhookSender]:
    """A sender that a test starts."""
    sender = bench.new_sender()
    yield sender
    await sender.stop()
