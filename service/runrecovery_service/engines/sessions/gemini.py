"""Where Gemini CLI keeps a session, and how it writes it.

`<home>/.gemini/tmp/<project>/chats/session-<time>-<first 8 of id>.jsonl`. What `<project>` is of a
folder stands in `projects.json`, and in the project's `.project_root`. A resumed turn goes on in
the first file, and leaves a newer one of the same id with hardly anything in it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from runrecovery_service.domain.run import JsonObject
from runrecovery_service.domain.session_check import SessionReason, StoredHandle
from runrecovery_service.engines.sessions.files import CliSessions
from runrecovery_service.engines.sessions.folders import (
    NotKnown,
    Once,
    home_of,
    names_in,
    read_small,
)
from runrecovery_service.engines.sessions.lines import is_folder_name

MOST_PROJECTS_BYTES: Final = 4 * 1024**2
MOST_PATH_BYTES: Final = 8192


def sessions(env: Mapping[str, str]) -> CliSessions:
    """Return the sessions of a Gemini CLI that runs with these variables."""
    home = home_of(env, "GEMINI_CLI_HOME", "")
    if home is None:
        return CliSessions(None, None, GeminiLayout())
    own = home if env.get("GEMINI_CLI_HOME") else home / ".gemini"
    return CliSessions(own, lambda: GeminiFinder(home / ".gemini"), GeminiLayout())


def is_of_session(name: str, session_id: str) -> bool:
    """True for the name of a file that may hold this session."""
    return name.startswith("session-") and name.endswith(f"-{session_id[:8]}.jsonl")


@dataclass(frozen=True, slots=True)
class GeminiFinder:
    """Reads the list of projects once a bulk, and the projects' own words where it says nothing."""

    home: Path
    _listed: Once[dict[str, str] | None] = field(default_factory=Once)
    _marked: Once[dict[str, str]] = field(default_factory=Once)
    _chats: Once[list[str]] = field(default_factory=Once)

    def places(self, stored: StoredHandle) -> Iterator[Path]:
        """Yield the files that may hold the session, the oldest first."""
        place = str(stored.workspace)
        listed = self._listed.get("all", self._read_list)
        project = (listed or {}).get(place) or self._marked.get("all", self._read_marks).get(place)
        if project is None and listed is None:
            raise NotKnown
        if project is None:
            return
        folder = self.home / "tmp" / project / "chats"
        for name in self._chats.get(project, lambda: names_in(folder)):
            if is_of_session(name, stored.handle):
                yield folder / name

    def _read_list(self) -> dict[str, str] | None:
        """Return the projects that are listed; None: the list is longer than we read."""
        text = read_small(self.home / "projects.json", MOST_PROJECTS_BYTES + 1)
        return None if len(text) > MOST_PROJECTS_BYTES else projects_of(text)

    def _read_marks(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for project in filter(is_folder_name, names_in(self.home / "tmp")):
            with suppress(PermissionError):  # of one project; it says nothing of the others
                root = read_small(self.home / "tmp" / project / ".project_root", MOST_PATH_BYTES)
                found[os.fsdecode(root.strip())] = project
        return found


def projects_of(text: bytes) -> dict[str, str]:
    """Return the project of each folder; none where the list cannot be read, as the CLI does."""
    try:
        listed = json.loads(text).get("projects")
        return {place: name for place, name in listed.items() if is_folder_name(name)}
    except (ValueError, RecursionError, AttributeError):
        return {}


class GeminiLayout:
    """How Gemini CLI writes a session."""

    def identify(self, head: Iterator[JsonObject], stored: StoredHandle) -> SessionReason | None:
        """Say what is wrong with the first lines. The folder stands there as a hash only."""
        first = next(head)
        session_id, project = first.get("sessionId"), first.get("projectHash")
        if not isinstance(session_id, str) or not isinstance(project, str):
            return SessionReason.NOT_KNOWN
        own = (session_id, project) == (stored.handle, hash_of(stored.workspace))
        return None if own else SessionReason.ELSEWHERE

    def is_end_of_turn(self, line: JsonObject) -> bool | None:
        """Tell the end of a turn; a line may also hold all messages so far."""
        changed = line.get("$set")
        messages = changed.get("messages") if isinstance(changed, dict) else None
        if isinstance(messages, list) and messages and isinstance(messages[-1], dict):
            line = messages[-1]
        match line.get("type"):
            case "user":
                return False
            case "gemini":
                return not line.get("toolCalls")
            case _:
                return None


def hash_of(folder: Path) -> str:
    """Return what a folder is called in a session."""
    return hashlib.sha256(os.fsencode(folder)).hexdigest()
