"""The sessions of the agent CLIs that this version knows, one module per CLI."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from runrecovery_service.engines.sessions import claude, codex, gemini
from runrecovery_service.engines.sessions.files import CliSessions

_SESSIONS: Final[Mapping[str, Callable[[Mapping[str, str]], CliSessions]]] = MappingProxyType(
    {
        "codex": codex.sessions,
        "gemini": gemini.sessions,
        "claude": claude.sessions,
    }
)


def sessions_of(preset: str, env: Mapping[str, str]) -> CliSessions:
    """Return the sessions of a CLI.

    Args:
        preset: `codex`, `gemini` or `claude`.
        env: the variables that the CLI is launched with, not the service's own.

    Raises:
        KeyError: there is no such preset.
    """
    return _SESSIONS[preset](env)
