"""Where Claude Code keeps a session, and how it writes it.

`<home>/projects/<folder>/<id>.jsonl`, where `<folder>` is the workspace's path (without links) with
a dash for whatever is no letter or digit. Each line that tells something names the session; those
of messages also the workspace.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runrecovery_service.domain.run import JsonObject
from runrecovery_service.domain.session_check import SessionReason, StoredHandle
from runrecovery_service.engines.sessions.files import CliSessions
from runrecovery_service.engines.sessions.folders import home_of

LONGEST_NAME: Final = 200
_OTHER: Final = re.compile("[^a-zA-Z0-9]")
_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


def sessions(env: Mapping[str, str]) -> CliSessions:
    """Return the sessions of a Claude Code that runs with these variables."""
    home = home_of(env, "CLAUDE_CONFIG_DIR", ".claude")
    if home is None:
        return CliSessions(None, None, ClaudeLayout())
    return CliSessions(home, lambda: ClaudeFinder(home / "projects"), ClaudeLayout())


def folder_of(workspace: str) -> str:
    """Return the name of a workspace's folder. A long one ends in a hash of the whole. Nothing is
    normalized: a letter and its accent may be two dashes."""
    name = _OTHER.sub(lambda found: "-" if found[0] <= "\uffff" else "--", workspace)
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{_base36(abs(_hash(workspace)))}"


def _hash(text: str) -> int:
    """The hash of 32 bits that Java made popular, of the units that JavaScript's strings are of."""
    units = text.encode("utf-16-le", "surrogatepass")
    value = 0
    for at in range(0, len(units), 2):
        value = (value * 31 + int.from_bytes(units[at : at + 2], "little")) & 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


def _base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
    return digits or "0"


@dataclass(frozen=True, slots=True)
class ClaudeFinder:
    """Knows the one place of a session by its workspace."""

    root: Path

    def places(self, stored: StoredHandle) -> Iterator[Path]:
        """Yield it."""
        yield self.root / folder_of(str(stored.workspace)) / f"{stored.handle}.jsonl"


class ClaudeLayout:
    """How Claude Code writes a session."""

    def identify(self, head: Iterator[JsonObject], stored: StoredHandle) -> SessionReason | None:
        """Say what is wrong with the first lines."""
        told: JsonObject = {}
        while not {"sessionId", "cwd"} <= told.keys() and (line := next(head, None)) is not None:
            told = line | told
        if not isinstance(told.get("sessionId"), str):
            return SessionReason.NOT_KNOWN
        place = str(stored.workspace)
        own = told["sessionId"] == stored.handle and told.get("cwd", place) == place
        return None if own else SessionReason.ELSEWHERE

    def is_end_of_turn(self, line: JsonObject) -> bool | None:
        """Tell the end of a turn. Helpers (`isSidechain`) and notes (`isMeta`) tell nothing."""
        if line.get("isSidechain") or line.get("isMeta"):
            return None
        match line.get("type"), line.get("message"):
            case "user", dict():
                return False
            case "assistant", dict() as message:
                return message.get("stop_reason") != "tool_use" and not _calls_tool(message)
            case _:
                return None


def _calls_tool(message: JsonObject) -> bool:
    content = message.get("content")
    last = content[-1] if isinstance(content, list) and content else None
    return isinstance(last, dict) and last.get("type") == "tool_use"
