"""One agent CLI, real or pretended, as the engine of a service."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from support.engines import EngineSpec
from support.service import Home

TRUST_FILE: Final[Mapping[str, str]] = {
    "codex": "config.toml",
    "gemini": ".gemini/trustedFolders.json",
    "claude": ".claude.json",
}
"""The file of each CLI that trust entries go into, below its home."""
SESSION_FILES: Final[Mapping[str, str]] = {
    "codex": "sessions/*/*/*/rollout-*.jsonl",
    "gemini": ".gemini/tmp/*/chats/session-*.jsonl",
    "claude": "projects/*/*.jsonl",
}
"""Where each CLI keeps its sessions: a pattern below its home."""


class AgentCliSetup:
    """A service that is not started yet, the CLI that is its engine, and the home of that CLI."""

    def __init__(
        self,
        cli: str,
        command: Sequence[str],
        agent_home: Path,
        new_home: Callable[..., Home],
        **keys: object,
    ) -> None:
        """Configure the engine with more `keys` than its preset, command and `agent_home`."""
        self.agent_home = agent_home
        self.trust_file = agent_home / TRUST_FILE[cli]
        self._session_files = SESSION_FILES[cli]
        more = {"preset": cli, "agent_home": str(agent_home), **keys}
        self.home = new_home(engines={cli: EngineSpec(command=command, more=more)})

    @property
    def sessions(self) -> list[Path]:
        """The session files of the CLI, the oldest first."""
        return sorted(self.agent_home.glob(self._session_files))

    def trusts(self) -> bool:
        """Return whether the trust file names a folder of this service."""
        return str(self.home.data) in self.trust_file.read_text("utf-8")
