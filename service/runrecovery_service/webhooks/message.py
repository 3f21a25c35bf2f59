"""Builds the request of a delivery: id, body, and headers with the signature."""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Final

from runrecovery_service.storage.webhook_deliveries import Delivery
from runrecovery_service.webhooks.signature import sign

USER_AGENT: Final = "runrecovery"


def message_id(delivery: Delivery) -> str:
    """Return the id of the event, which is the same in every try.

    It includes the time, because a store that was restored from a backup assigns the same sequence
    numbers again.
    """
    created_us = round(delivery.created_at.timestamp() * 1e6)
    return f"{delivery.run_id}_{delivery.sequence}_{created_us}"


def body(delivery: Delivery) -> bytes:
    """Return the JSON of a delivery.

    It has no text of an agent or a user, and no session handle.
    """
    facts = {
        "type": delivery.event.value,
        "sequence": delivery.sequence,
        "run_id": delivery.run_id,
        "engine": delivery.engine,
        "status": delivery.status,
        "error_code": delivery.error_code,
        "created_at": delivery.created_at.isoformat(timespec="microseconds"),
    }
    return json.dumps(facts, separators=(",", ":")).encode()


def headers(
    delivery: Delivery, content: bytes, *, keys: Iterable[bytes], now: datetime
) -> dict[str, str]:
    """Return the headers of one try.

    Args:
        content: the body of the request.
        keys: the keys of the webhook's secrets, each of which makes a signature.
    """
    identity, timestamp = message_id(delivery), int(now.timestamp())
    return {
        "content-type": "application/json",
        "user-agent": USER_AGENT,
        "webhook-id": identity,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": sign(keys, identity, timestamp, content),
    }
