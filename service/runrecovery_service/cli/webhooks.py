"""`runrecovery webhooks`: shows the webhooks of a service, and tries their deliveries at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import click
from runrecovery.v1 import recovery_service_pb2

from runrecovery_service.cli.connection import ServiceConnection, with_service
from runrecovery_service.cli.printing import Columns, table, time


def _state(webhook: recovery_service_pb2.Webhook) -> str:
    if webhook.disabled:
        return "disabled"
    return "failing" if webhook.HasField("failing_since") else "ok"


def _oldest(webhook: recovery_service_pb2.Webhook) -> str:
    return time(webhook.oldest_due_at) if webhook.HasField("oldest_due_at") else "-"


COLUMNS: Final[Columns[recovery_service_pb2.Webhook]] = (
    ("NAME", lambda webhook: webhook.name),
    ("TO", lambda webhook: webhook.origin),
    ("STATE", _state),
    ("DUE", lambda webhook: str(webhook.due)),
    ("OLDEST DUE", _oldest),
    ("GIVEN UP", lambda webhook: str(webhook.given_up)),
    ("DELIVERED", lambda webhook: str(webhook.delivered)),
    ("FAILED", lambda webhook: str(webhook.failed)),
    ("LAST FAILURE", lambda webhook: webhook.last_failure or "-"),
)


@click.group()
def webhooks() -> None:
    """Show the webhooks of a service, and try their deliveries at once."""


@webhooks.command("list")
@with_service
def list_webhooks(service: ServiceConnection) -> None:
    """Show each webhook with its waiting deliveries."""
    answer = recovery_service_pb2.ListWebhooksResponse(webhooks=service.client.recovery.webhooks())
    service.show(answer, lambda shown: _described(shown.webhooks))


def _described(found: Sequence[recovery_service_pb2.Webhook]) -> str:
    return table(found, COLUMNS) if found else "the service has no [[webhooks]]"


@webhooks.command()
@with_service
@click.argument("name")
def retry(service: ServiceConnection, name: str) -> None:
    """Try all deliveries of a webhook at once, also those that were given up."""
    revived = service.client.recovery.retry_webhook(name)
    answer = recovery_service_pb2.RetryWebhookResponse(revived=revived)
    service.show(answer, lambda shown: f"tried at once; given up before: {shown.revived}")
