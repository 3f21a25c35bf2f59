"""Builds one part of the service for each key that a reload can change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from runrecovery_service import logs
from runrecovery_service.agents.session_checks import session_checks
from runrecovery_service.config.settings import RetentionSettings, Settings
from runrecovery_service.engines.catalog import Catalog
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.recovery.bulk_session_check import BulkSessionCheck
from runrecovery_service.reload import Apply, ReloadablePart
from runrecovery_service.setup.engines import build_catalog
from runrecovery_service.setup.entrance import Entrance
from runrecovery_service.setup.webhooks import prepare_webhooks
from runrecovery_service.webhooks.webhooks import Webhooks

if TYPE_CHECKING:
    from runrecovery_service.domain.retention import RetentionPolicy
    from runrecovery_service.retention.sweep import RetentionSweep


def reloadable_parts(
    *,
    entrance: Entrance,
    catalog: Catalog,
    sessions: BulkSessionCheck,
    dispatcher: Dispatcher,
    retention: RetentionSweep | None,
    webhooks: Webhooks,
) -> tuple[ReloadablePart, ...]:
    """Return one part for each key of `config.reloading.RELOADABLE`."""
    return (
        ReloadablePart(key="engines", prepare=_engines(catalog, sessions, dispatcher)),
        ReloadablePart(key="callers", prepare=entrance.prepare_callers, has_files=True),
        ReloadablePart(key="tls", prepare=entrance.prepare_tls),
        ReloadablePart(key="retention", prepare=partial(_prepare_retention, retention)),
        ReloadablePart(key="webhooks", prepare=partial(prepare_webhooks, webhooks), has_files=True),
        ReloadablePart(key="log_level", prepare=lambda new: partial(logs.set_level, new.log_level)),
    )


def retention_policy(settings: RetentionSettings) -> RetentionPolicy:
    """Return the policy of the table `[retention]`."""
    # Imported here: a start without retention needs none of it.
    from runrecovery_service.domain.retention import RetentionPolicy  # noqa: PLC0415

    return RetentionPolicy(**asdict(settings))


def _engines(
    catalog: Catalog, sessions: BulkSessionCheck, dispatcher: Dispatcher
) -> Callable[[Settings], Apply]:
    def prepare(settings: Settings) -> Apply:
        new = build_catalog(settings)
        checks = session_checks(new)

        def apply() -> None:
            catalog.replace(new)
            sessions.replace_checks(checks)
            dispatcher.check_queue()  # the limit of an engine may have been raised

        return apply

    return prepare


def _prepare_retention(sweep: RetentionSweep | None, settings: Settings) -> Apply | None:
    if sweep is None or settings.retention is None:
        return None
    return partial(setattr, sweep, "policy", retention_policy(settings.retention))
