"""Endpoints, deliveries and receivers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, TypeAlias

import pytest
from runrecovery_service.config.values import EVERYWHERE
from runrecovery_service.domain.webhook import WebhookEvent, WebhookFilter
from runrecovery_service.storage.webhook_deliveries import Delivery
from runrecovery_service.webhooks.endpoint import Endpoint
from runrecovery_service.webhooks.signature import read_secret
from support.webhook_receiver import SECRET, Behave, Receiver

NewReceiver: TypeAlias = Callable[..., Receiver]

EVERY = WebhookFilter(name="chat", events=frozenset(WebhookEvent))
DELIVERY = Delivery(
    key=1,
    webhook="chat",
    run=1,
    run_id="run-1",
    engine="demo",
    sequence=4,
    event=WebhookEvent.ENDED,
    status="FAILED",
    error_code="ENGINE_FAILED",
    created_at=datetime(2026, 11, 24, 12, 0, 0, 123, tzinfo=UTC),
)


def endpoint(port: int = 9, **changes: Any) -> Endpoint:
    """Return an endpoint on 127.0.0.1."""
    given: dict[str, Any] = {
        "filter": EVERY,
        "host": "127.0.0.1",
        "port": port,
        "target": "/hook?key=hidden",
        "tls": None,
        "keys": (read_secret(SECRET),),
        "private": EVERYWHERE,
        "timeout_s": 10.0,
        "give_up_s": 259_200.0,
    }
    return Endpoint(**(given | changes))


@pytest.fixture
def new_receiver() -> Iterator[NewReceiver]:
    """Make receivers, and close them at the end of the test."""
    made: list[Receiver] = []

    def make(*behave: Behave, **named: Any) -> Receiver:
        made.append(Receiver(*behave, **named))
        return made[-1]

    yield make
    for receiver in made:
        receiver.close()
