"""The id, the body and the signature of a delivery."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from runrecovery_service.webhooks import message
from runrecovery_service.webhooks.signature import read_secret
from standardwebhooks import Webhook, WebhookVerificationError
from support.webhook_receiver import OTHER_SECRET, SECRET

from .samples import DELIVERY

KEYS = (read_secret(SECRET), read_secret(OTHER_SECRET))


def test_the_body_has_the_facts_of_the_event_and_nothing_else() -> None:
    assert message.body(DELIVERY) == (
        b'{"type":"ENDED","sequence":4,"run_id":"run-1","engine":"demo","status":"FAILED",'
        b'"error_code":"ENGINE_FAILED","created_at":"2026-11-24T12:00:00.000123+00:00"}'
    )


def test_the_id_differs_between_events_and_not_between_tries() -> None:
    now = datetime.now(UTC)
    first = message.headers(DELIVERY, b"{}", keys=KEYS, now=now)
    again = message.headers(DELIVERY, b"{}", keys=KEYS, now=now + timedelta(hours=1))

    assert first["webhook-id"] == again["webhook-id"] == "run-1_4_1795521600000123"
    assert first["webhook-timestamp"] != again["webhook-timestamp"]
    assert message.message_id(replace(DELIVERY, sequence=5)) == "run-1_5_1795521600000123"
    later = replace(DELIVERY, created_at=DELIVERY.created_at + timedelta(microseconds=1))
    assert message.message_id(later) == "run-1_4_1795521600000124"


@pytest.mark.parametrize("secret", [SECRET, OTHER_SECRET])
def test_the_library_of_standard_webhooks_accepts_the_signature_of_each_secret(
    secret: str,
) -> None:
    content = message.body(DELIVERY)
    headers = message.headers(DELIVERY, content, keys=KEYS, now=datetime.now(UTC))

    assert Webhook(secret).verify(content, headers)["run_id"] == "run-1"
    with pytest.raises(WebhookVerificationError):
        Webhook(secret).verify(content.replace(b"run-1", b"run-2"), headers)
    with pytest.raises(WebhookVerificationError):
        Webhook("whsec_" + "YWxpZW4h" * 4).verify(content, headers)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("c2VjcmV0" * 4, "must be whsec_ and base64"),
        ("whsec_", "must be whsec_ and base64"),
        ("whsec_not base64!", "must be whsec_ and base64"),
        ("whsec_ü", "must be whsec_ and base64"),
        ("whsec_c2VjcmV0", "must have 24 to 64 bytes, not 6"),
        ("whsec_" + "c2VjcmV0" * 11, "must have 24 to 64 bytes, not 66"),
    ],
)
def test_a_weak_or_malformed_secret_is_refused_and_not_quoted(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as refused:
        read_secret(text)

    assert text.removeprefix("whsec_") == "" or text not in str(refused.value)
