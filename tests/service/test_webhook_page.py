"""The receiver of docs/webhooks.md does what the page says."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from runrecovery_service.config.values import EVERYWHERE
from runrecovery_service.domain.webhook import WebhookEvent, WebhookFilter
from runrecovery_service.storage.webhook_deliveries import Delivery
from runrecovery_service.webhooks import message
from runrecovery_service.webhooks.endpoint import Endpoint
from runrecovery_service.webhooks.http_post import post
from runrecovery_service.webhooks.signature import read_secret
from support.engines import REPOSITORY
from support.webhook_receiver import OTHER_SECRET, SECRET

DELIVERY = Delivery(
    key=1,
    webhook="chat",
    run=1,
    run_id="nightly-review",
    engine="reviewer",
    sequence=6,
    event=WebhookEvent.ENDED,
    status="FAILED",
    error_code="ENGINE_FAILED",
    created_at=datetime(2026, 11, 29, 22, 30, 0, 123456, tzinfo=UTC),
)
PAGE = (REPOSITORY / "docs" / "webhooks.md").read_text("utf-8")


def _answer(port: int, secret: str) -> int:
    content = message.body(DELIVERY)
    endpoint = Endpoint(
        filter=WebhookFilter(name="chat", events=frozenset(WebhookEvent)),
        host="127.0.0.1",
        port=port,
        target="/",
        tls=None,
        keys=(read_secret(secret),),
        private=EVERYWHERE,
        timeout_s=10.0,
        give_up_s=1.0,
    )
    headers = message.headers(DELIVERY, content, keys=endpoint.keys, now=datetime.now(UTC))
    return asyncio.run(_status(endpoint, headers, content))


async def _status(endpoint: Endpoint, headers: dict[str, str], content: bytes) -> int:
    return (await post(endpoint, headers, content)).status


def test_the_receiver_takes_an_event_once_and_refuses_a_wrong_signature(
    tmp_path: Path,
) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    file = tmp_path / "receiver.py"
    file.write_text(code, "utf-8")
    with subprocess.Popen(
        [sys.executable, str(file)],
        env={**os.environ, "WEBHOOK_SECRET": SECRET, "PORT": "0"},
        stdout=subprocess.PIPE,
        text=True,
    ) as receiver:
        try:
            assert receiver.stdout is not None
            port = int(receiver.stdout.readline().split()[-1])

            assert _answer(port, OTHER_SECRET) == 401
            assert _answer(port, SECRET) == 204
            assert _answer(port, SECRET) == 204
        finally:
            receiver.terminate()
        told = receiver.stdout.read()

    assert told == "nightly-review 6 ENDED FAILED\n"


def test_the_page_shows_the_body_as_it_is_sent() -> None:
    (shown,) = re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)

    assert shown.strip().encode() == message.body(DELIVERY)
