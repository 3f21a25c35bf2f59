"""Refuses values of `[[webhooks]]` that are valid alone but contradict each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from runrecovery_service.config.settings import WebhookSettings
from runrecovery_service.config.values import InvalidValue

MAX_WEBHOOKS: Final = 16
"""The most webhooks. Each webhook has its own connections, and adds a row to the transaction of
each event."""


def webhook_contradictions(settings: WebhookSettings) -> Iterator[InvalidValue]:
    """Yield the contradictions between the values of one webhook."""
    if not settings.url.startswith("http:"):
        return
    if not settings.allow_private and not settings.insecure_http:
        yield InvalidValue("needs https://, allow_private or insecure_http = true", below="url")
    if settings.ca_file is not None:
        yield InvalidValue("has no effect with http://", below="ca_file")


def webhooks_together(webhooks: Sequence[WebhookSettings]) -> Iterator[InvalidValue]:
    """Yield the problems of the list of webhooks, such as a repeated name."""
    names = [webhook.name for webhook in webhooks]
    for _ in {name for name in names if names.count(name) > 1}:
        yield InvalidValue("two webhooks have the same name")
    if len(names) > MAX_WEBHOOKS:
        yield InvalidValue(f"must be at most {MAX_WEBHOOKS}, not {len(names)}")
