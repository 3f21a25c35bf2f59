"""A sample endpoint and a sample delivery."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from runrecovery_service.config.values import EVERYWHERE
from runrecovery_service.domain.webhook import WebhookEvent, WebhookFilter
from runrecovery_service.storage.webhook_deliveries import Delivery
from runrecovery_service.webhooks.endpoint import Endpoint
from runrecovery_service.webhooks.signature import read_secret
from support.webhook_receiver import SECRET

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
