"""Builds the webhooks from the settings, for a start, a reload and `runrecovery check`.

Modules that only webhooks need are imported when one is configured, so that other starts stay fast.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING

from runrecovery_service.config.reading import ConfigError
from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.start_errors import WebhooksRefused
from runrecovery_service.webhooks.webhooks import Webhooks

if TYPE_CHECKING:
    from runrecovery_service.webhooks.endpoint import Endpoint


def build_endpoints(settings: Settings) -> tuple[Endpoint, ...]:
    """Return the configured webhooks. Reads their secrets and certificates.

    Raises:
        WebhooksRefused: a webhook has a problem; the error lists all problems.
    """
    if not settings.webhooks:
        return ()
    if find_spec("h11") is None:
        raise WebhooksRefused(("webhooks need `pip install runrecovery-service[webhooks]`",))
    from runrecovery_service.webhooks.read_endpoint import FileRefused, read_endpoint  # noqa: PLC0415

    found, problems = [], []
    for webhook in settings.webhooks:
        try:
            found.append(read_endpoint(webhook))
        except FileRefused as error:
            problems.append(f"webhook {webhook.name!r}: {error}")
    if problems:
        raise WebhooksRefused(tuple(problems))
    return tuple(found)


def prepare_webhooks(webhooks: Webhooks, settings: Settings) -> Callable[[], None] | None:
    """Return a function that replaces the webhooks by those of new settings; None: no change.

    Raises:
        ConfigError: the webhooks cannot be used.
    """
    try:
        endpoints = build_endpoints(settings)
    except WebhooksRefused as error:
        raise ConfigError(error.problems) from error
    return None if webhooks.follows(endpoints) else partial(webhooks.replace, endpoints)


def webhook_problems(settings: Settings) -> Sequence[str]:
    """Return the problems for which a start would refuse the webhooks."""
    try:
        build_endpoints(settings)
    except WebhooksRefused as error:
        return error.problems
    return ()
