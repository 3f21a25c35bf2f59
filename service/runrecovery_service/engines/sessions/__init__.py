"""The sessions of the agent CLIs that this version knows, one module per CLI."""

from __future__ import annotations

from collections.abc import Mapping

from runrecovery_service.engines.sessions.files import CliSessions


def sessions_of(preset: str, env: Mapping[str, str]) -> CliSessions:
    """Return the sessions of a CLI.

    Args:
        preset: `codex`, `gemini` or `claude`.
        env: the variables that the CLI is launched with, not the service's own.

    Raises:
        KeyError: there is no such preset.
    """
    # Imported here: a start without an engine of the CLI does not wait for the imports.
    match preset:
        case "codex":
            from runrecovery_service.engines.sessions import codex

            return codex.sessions(env)
        case "gemini":
            from runrecovery_service.engines.sessions import gemini

            return gemini.sessions(env)
        case "claude":
            from runrecovery_service.engines.sessions import claude

            return claude.sessions(env)
    raise KeyError(preset)
