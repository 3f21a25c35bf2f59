"""Finds values of the configuration that are valid alone but contradict each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from runrecovery_service.config import values
from runrecovery_service.config.settings import (
    CallerSettings,
    ClientAuth,
    Settings,
    WebhookSettings,
)


def contradictions(settings: Settings, places: Mapping[str, str]) -> Iterator[str]:
    """Yield the problems of values that are valid alone but contradict each other.

    Args:
        places: how a message names a key and its source, by key. Any other key is named without a
            source.
    """
    yield from _reachable_addresses(settings, places)
    yield from _http_contradictions(settings, places)
    if settings.database_direct and not settings.database.startswith("postgresql://"):
        place = places.get("database_direct", "database_direct")
        yield f"{place}: needs a postgresql://… URL as `database`"
    named: dict[str, Sequence[CallerSettings | WebhookSettings]] = {
        "callers": settings.callers,
        "webhooks": settings.webhooks,
    }
    for key, tables in named.items():
        for index, table in enumerate(tables):
            for name in set(table.engines or ()) - settings.engines.keys():
                place = f"{places.get(key, key)}[{index}].engines"
                yield f"{place}: no engine {values.quote(name)} is configured"
    for index, caller in enumerate(settings.callers):
        place = f"{places.get('callers', 'callers')}[{index}]"
        has_certificates = settings.tls and settings.tls.client_auth is ClientAuth.REQUIRE
        if caller.certificate_name is not None and not has_certificates:
            yield f'{place}.certificate_name: needs tls.client_auth = "require"'
    if settings.shared_workspaces and not (
        settings.runs_dir and settings.database.startswith("postgres")
    ):
        place = places.get("shared_workspaces", "shared_workspaces")
        yield f"{place}: needs runs_dir, which all instances share, and a PostgreSQL database"
    if settings.orphan_deadline_s < settings.orphan_grace_s:
        place = places.get("orphan_deadline_s") or places.get("orphan_grace_s", "orphan_grace_s")
        yield (
            f"{place}: orphan_deadline_s ({settings.orphan_deadline_s:g}) must not be less than"
            f" orphan_grace_s ({settings.orphan_grace_s:g})"
        )


def _reachable_addresses(settings: Settings, places: Mapping[str, str]) -> Iterator[str]:
    missing = [] if settings.tls else ["[tls]"]
    missing += [] if settings.callers else ["[[callers]]"]
    if not missing or settings.insecure_listen:
        return
    for key, address in (("listen", settings.listen), ("http_listen", settings.http_listen)):
        if address and not values.is_loopback(address):
            yield (
                f"{places.get(key, key)}: {address} can be reached from other machines, and there"
                f" is no {' and no '.join(missing)}; add what is missing, listen on 127.0.0.1, or"
                " set insecure_listen = true"
            )


def _http_contradictions(settings: Settings, places: Mapping[str, str]) -> Iterator[str]:
    if settings.http_listen:
        return
    for key in ("http_origins", "http_hosts"):
        if getattr(settings, key):
            yield f"{places.get(key, key)}: has no effect without http_listen"
