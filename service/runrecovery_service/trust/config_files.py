"""The path of each agent CLI's file with its trusted folders."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path

from runrecovery_service.trust.entry import Editor
from runrecovery_service.trust.errors import HomeUnknown


class AgentCli(Enum):
    """An agent CLI whose trust entries can be edited."""

    CODEX = "codex"
    GEMINI = "gemini"
    CLAUDE = "claude"


def editor_of(cli: AgentCli) -> Editor:
    """Return the editor of the file of a CLI."""
    # Imported here: a start without trust entries of the CLI does not wait for the imports.
    match cli:
        case AgentCli.CODEX:
            from runrecovery_service.trust import codex

            return codex.EDITOR
        case AgentCli.GEMINI:
            from runrecovery_service.trust import gemini

            return gemini.EDITOR
        case AgentCli.CLAUDE:
            from runrecovery_service.trust import claude

            return claude.EDITOR


def config_file(cli: AgentCli, env: Mapping[str, str]) -> Path:
    """Return the file that a CLI with this environment reads. The file need not exist.

    Args:
        env: the environment that the CLI is launched with, not the service's own.

    Raises:
        HomeUnknown: a needed variable is not set, or is a relative path, which would depend on the
            CLI's working directory.
    """
    match cli:
        case AgentCli.CODEX:
            home = _folder(env, "CODEX_HOME") or _home(env) / ".codex"
            return home / "config.toml"
        case AgentCli.GEMINI:
            named = _folder(env, "GEMINI_CLI_TRUSTED_FOLDERS_PATH")
            if named is not None:
                return named
            home = _folder(env, "GEMINI_CLI_HOME") or _home(env)
            return home / ".gemini" / "trustedFolders.json"
        case AgentCli.CLAUDE:
            return (_folder(env, "CLAUDE_CONFIG_DIR") or _home(env)) / ".claude.json"


def _home(env: Mapping[str, str]) -> Path:
    home = _folder(env, "HOME")
    if home is None:
        raise HomeUnknown("HOME")
    return home


def _folder(env: Mapping[str, str], variable: str) -> Path | None:
    """Return the path in a variable; None if the variable is not set or empty."""
    value = env.get(variable, "")
    if not value:
        return None
    if not value.startswith("/"):
        raise HomeUnknown(variable)
    return Path(value)
