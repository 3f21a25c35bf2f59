"""The session files of Gemini CLI: where they are, and what they contain.

The path is `<home>/.gemini/tmp/<project>/chats/session-<time>-<first 8 of id>.jsonl`. The file
`projects.json` contains the project of each folder, and so does the project's `.project_root`. A
resumed turn continues the first file and leaves a newer, nearly empty file with the same id.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import field
from functools import reduce
from pathlib import Path
from typing import Final

from runrecovery_service.domain.run import JsonObject
from runrecovery_service.domain.session_check import SessionReason, StoredHandle
from runrecovery_service.domain.usage import StoredUsage, Usage
from runrecovery_service.engines.cli_usage import gemini_call
from runrecovery_service.engines.sessions.files import CliSessions
from runrecovery_service.engines.sessions.folders import (
    Cache,
    NotKnown,
    home_of,
    names_in,
    read_small,
)
from runrecovery_service.engines.sessions.gemini_history import GeminiHistory
from runrecovery_service.engines.sessions.lines import is_folder_name
from runrecovery_service.lazy_dataclass import dataclass

MOST_PROJECTS_BYTES: Final = 4 * 1024**2
MOST_PATH_BYTES: Final = 8192


def sessions(env: Mapping[str, str]) -> CliSessions:
    """Return the sessions of Gemini CLI with these environment variables."""
    home = home_of(env, "GEMINI_CLI_HOME", "")
    if home is None:
        return CliSessions(None, None, GeminiLayout())
    own = home if env.get("GEMINI_CLI_HOME") else home / ".gemini"
    layout, history = GeminiLayout(), GeminiHistory()
    return CliSessions(own, lambda: GeminiFinder(home / ".gemini"), layout, history, GeminiLedger())


def is_of_session(name: str, session_id: str) -> bool:
    """Return True for the name of a file that can contain this session."""
    return name.startswith("session-") and name.endswith(f"-{session_id[:8]}.jsonl")


@dataclass(frozen=True, slots=True)
class GeminiFinder:
    """Finds session files by the list of projects, else by `.project_root`. Reads each once."""

    home: Path
    _listed: Cache[dict[str, str] | None] = field(default_factory=Cache)
    _marked: Cache[dict[str, str]] = field(default_factory=Cache)
    _chats: Cache[list[str]] = field(default_factory=Cache)

    def paths(self, stored: StoredHandle) -> Iterator[Path]:
        """Yield the files that can contain the session, the oldest first."""
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
        """Return the project of each listed folder; None: the list is too long to read."""
        text = read_small(self.home / "projects.json", MOST_PROJECTS_BYTES + 1)
        return None if len(text) > MOST_PROJECTS_BYTES else projects_of(text)

    def _read_marks(self) -> dict[str, str]:
        found: dict[str, str] = {}
        for project in filter(is_folder_name, names_in(self.home / "tmp")):
            with suppress(PermissionError):  # other projects can still be readable
                root = read_small(self.home / "tmp" / project / ".project_root", MOST_PATH_BYTES)
                found[os.fsdecode(root.strip())] = project
        return found


def projects_of(text: bytes) -> dict[str, str]:
    """Return the project of each folder. Like the CLI, take a damaged list as empty."""
    try:
        listed = json.loads(text).get("projects")
        return {place: name for place, name in listed.items() if is_folder_name(name)}
    except (ValueError, RecursionError, AttributeError):
        return {}


class GeminiLayout:
    """The format of Gemini CLI's session files."""

    def identify(self, head: Iterator[JsonObject], stored: StoredHandle) -> SessionReason | None:
        """Return why the first lines are not of this session, or None.

        The files contain only a hash of the workspace.
        """
        first = next(head)
        session_id, project = first.get("sessionId"), first.get("projectHash")
        if not isinstance(session_id, str) or not isinstance(project, str):
            return SessionReason.NOT_KNOWN
        own = (session_id, project) == (stored.handle, hash_of(stored.workspace))
        return None if own else SessionReason.ELSEWHERE

    def may_follow_end(self, line: JsonObject) -> bool:
        """Return False: Gemini CLI has no such lines."""
        return False

    def is_end_of_turn(self, line: JsonObject) -> bool | None:
        """Return whether a turn ends with the line, or None if the line does not show it.

        A line can also contain all messages so far.
        """
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
    """Return the hash that stands for a folder in a session."""
    return hashlib.sha256(os.fsencode(folder)).hexdigest()


class GeminiLedger:
    """The calls in the session files of Gemini CLI: the messages of the model.

    Lines with the same `id`, also in several files, are the same message, which is one call.
    """

    marks = (b'"tokens"',)
    is_in_output = False

    def sum(self, lines: Iterable[JsonObject]) -> StoredUsage:
        """Return the sum over all messages, also those that the CLI removed from the history."""
        calls: dict[str, Usage] = {}
        for message in _messages(lines):
            key, used = message.get("id"), gemini_call(message)
            if isinstance(key, str) and used is not None:
                calls[key] = used
        return StoredUsage(calls=reduce(Usage.plus, calls.values(), Usage()))


def _messages(lines: Iterable[JsonObject]) -> Iterator[JsonObject]:
    for line in lines:
        changed = line.get("$set")
        within = changed.get("messages") if isinstance(changed, dict) else line.get("messages")
        yield line
        if isinstance(within, list):
            yield from (each for each in within if isinstance(each, dict))
