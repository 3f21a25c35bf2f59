"""Decides which changes of the configuration a reload applies."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Final

from runrecovery_service.config.contradictions import contradictions
from runrecovery_service.config.reading import ConfigError
from runrecovery_service.config.settings import Settings, TlsSettings
from runrecovery_service.lazy_dataclass import dataclass

RELOADABLE: Final = frozenset({"log_level", "tls", "callers", "retention", "engines", "webhooks"})
"""The keys that a reload applies. All others need a restart."""
NEVER_EMPTIED: Final = frozenset({"callers", "engines"})
"""The keys whose last table a reload never removes. A file without such a table is probably still
being written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadPlan:
    """The result of comparing a new configuration with the present one.

    Attributes:
        settings: the settings after the reload.
        changed: the keys that the reload changes.
        needs_restart: the changed keys that the reload leaves as they are, until a restart.
    """

    settings: Settings
    changed: tuple[str, ...]
    needs_restart: tuple[str, ...]


def plan_reload(present: Settings, read: Settings) -> ReloadPlan:
    """Return the plan for a reload from the present settings to the settings that were `read`.

    Raises:
        ConfigError: the keys to apply contradict the present values of keys that need a restart.
    """
    differ = [key.name for key in fields(Settings) if _differ(present, read, key.name)]
    needs_restart = {key: name for key in differ if (name := _needs_restart(key, present, read))}
    changed = tuple(key for key in differ if key not in needs_restart)
    settings = replace(present, **{key: getattr(read, key) for key in changed})
    # Checked with the new `insecure_listen`: if new callers come with new TLS, which needs a
    # restart, a reload of the callers alone would send their tokens in plaintext.
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
    """Return the name of the key that needs a restart; empty if a reload can apply the change."""
    if key not in RELOADABLE or (key in NEVER_EMPTIED and not getattr(read, key)):
        return key
    if getattr(present, key) is None or getattr(read, key) is None:
        return key  # a table that is added or removed
    return _tls_needs_restart(present.tls, read.tls) if key == "tls" else ""


def _tls_needs_restart(present: TlsSettings | None, read: TlsSettings | None) -> str:
    is_same = present is None or read is None or present.client_auth is read.client_auth
    return "" if is_same else "tls.client_auth"
