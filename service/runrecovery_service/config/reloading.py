"""Decides which changes of the configuration a running service takes over."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Final

from runrecovery_service.config.reading import ConfigError, contradictions
from runrecovery_service.config.settings import Settings, TlsSettings

RELOADABLE: Final = frozenset({"log_level", "tls", "callers", "retention", "engines", "webhooks"})
"""The keys that a reload takes over. All others need a restart."""
NEVER_EMPTIED: Final = frozenset({"callers", "engines"})
"""A reload does not remove the last caller or engine: a file without any is mostly half written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadPlan:
    """What a reload does.

    Attributes:
        settings: the settings from now on.
        changed: the keys that differ from the present settings.
        needs_restart: the keys with another value in the configuration, which a running service
            does not take over.
    """

    settings: Settings
    changed: tuple[str, ...]
    needs_restart: tuple[str, ...]


def plan_reload(present: Settings, read: Settings) -> ReloadPlan:
    """Return what a reload does with the configuration that was read.

    Raises:
        ConfigError: what it would take over contradicts what needs a restart.
    """
    differ = [key.name for key in fields(Settings) if _differ(present, read, key.name)]
    needs_restart = {key: name for key in differ if (name := _needs_restart(key, present, read))}
    changed = tuple(key for key in differ if key not in needs_restart)
    settings = replace(present, **{key: getattr(read, key) for key in changed})
    # `insecure_listen` as it is read: tokens must not be sent in plaintext because the TLS that
    # comes with them waits for a restart.
    judged = replace(settings, insecure_listen=read.insecure_listen)
    if problems := list(contradictions(judged, {})):
        waits = ", ".join(needs_restart.values())
        raise ConfigError((*problems, f"a reload leaves these as they are: {waits}; restart"))
    return ReloadPlan(
        settings=settings, changed=changed, needs_restart=tuple(needs_restart.values())
    )


def _differ(present: Settings, read: Settings, key: str) -> bool:
    return bool(getattr(present, key) != getattr(read, key))


def _needs_restart(key: str, present: Settings, read: Settings) -> str:
    """Return the name of what needs a restart, empty if nothing does."""
    if key not in RELOADABLE or (key in NEVER_EMPTIED and not getattr(read, key)):
        return key
    if getattr(present, key) is None or getattr(read, key) is None:
        return key  # a table that is added or removed
    return _tls_needs_restart(present.tls, read.tls) if key == "tls" else ""


def _tls_needs_restart(present: TlsSettings | None, read: TlsSettings | None) -> str:
    is_same = present is None or read is None or present.client_auth is read.client_auth
    return "" if is_same else "tls.client_auth"
