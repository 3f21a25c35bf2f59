"""The session files of Claude Code: where they are, and what they contain.

The path is `<home>/projects/<folder>/<id>.jsonl`. `<folder>` is the workspace's path (without
links), in which a dash replaces everything but letters and digits. Every relevant line contains the
session id. Lines with messages also contain the workspace.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from pathlib import Path
from typing import Final

from runrecovery_service.domain.run import JsonObject
from runrecovery_service.domain.session_check import SessionReason, StoredHandle
from runrecovery_service.domain.usage import StoredUsage, Usage
from runrecovery_service.engines.cli_usage import claude_call
from runrecovery_service.engines.sessions.files import CliSessions
from runrecovery_service.engines.sessions.folders import home_of
from runrecovery_service.lazy_dataclass import dataclass

LONGEST_NAME: Final = 200
_OTHER: Final = re.compile("[^a-zA-Z0-9]")
_DIGITS: Final = "0123456789abcdefghijklmnopqrstuvwxyz"


def sessions(env: Mapping[str, str]) -> CliSessions:
    """Return the sessions of Claude Code with these environment variables."""
    home = home_of(env, "CLAUDE_CONFIG_DIR", ".claude")
    if home is None:
        return CliSessions(None, None, ClaudeLayout())
    return CliSessions(
        home, lambda: ClaudeFinder(home / "projects"), ClaudeLayout(), ledger=ClaudeLedger()
    )


def folder_of(workspace: str) -> str:
    """Return the name of a workspace's folder. A long name is cut and ends in a hash of the path.

    The path is not normalised: a letter with a separate accent becomes two dashes.
    """
    name = _OTHER.sub(lambda found: "-" if found[0] <= "\uffff" else "--", workspace)
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{_base36(abs(_hash(workspace)))}"


def _hash(text: str) -> int:
    """Return Java's 32-bit string hash, computed over UTF-16 code units as in JavaScript."""
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
    """Finds the only possible file of a session."""

    root: Path

    def paths(self, stored: StoredHandle) -> Iterator[Path]:
        """Yield the one path at which the session's file can be."""
        yield self.root / folder_of(str(stored.workspace)) / f"{stored.handle}.jsonl"


class ClaudeLayout:
    """The format of Claude Code's session files."""

    def identify(self, head: Iterator[JsonObject], stored: StoredHandle) -> SessionReason | None:
        """Return why the first lines are not of this session, or None."""
        fields: JsonObject = {}
        while not {"sessionId", "cwd"} <= fields.keys() and (line := next(head, None)) is not None:
            fields = line | fields
        if not isinstance(fields.get("sessionId"), str):
            return SessionReason.NOT_KNOWN
        workspace = str(stored.workspace)
        own = fields["sessionId"] == stored.handle and fields.get("cwd", workspace) == workspace
        return None if own else SessionReason.ELSEWHERE

    def may_follow_end(self, line: JsonObject) -> bool:
        """Return True for a result of a tool, which can follow a deferred call."""
        match line.get("message"):
            case {"content": [{"type": "tool_result"}, *_]}:
                return True
        return False

    def is_end_of_turn(self, line: JsonObject) -> bool | None:
        """Return whether a turn ends with the line; None for subagents and `isMeta` lines."""
        if line.get("isSidechain") or line.get("isMeta"):
            return None
        match line.get("type"), line.get("message"):
            case "attachment", _:
                return True if _is_deferral(line) else None
            case "user", dict():
                return False
            case "assistant", dict() as message:
                return message.get("stop_reason") != "tool_use" and not _calls_tool(message)
            case _:
                return None


def _is_deferral(line: JsonObject) -> bool:
    """Return whether the line says that a hook deferred a call, which ended the turn."""
    attachment = line.get("attachment")
    return isinstance(attachment, dict) and attachment.get("type") == "hook_deferred_tool"


def _calls_tool(message: JsonObject) -> bool:
    content = message.get("content")
    last = content[-1] if isinstance(content, list) and content else None
    return isinstance(last, dict) and last.get("type") == "tool_use"


class ClaudeLedger:
    """The calls in the session files of Claude Code, and in its output.

    Each line with a part of an answer has the id and the usage of this answer. In the file the
    usage is complete, but the file is written up to some seconds later than the output. In the
    output the usage has too few output tokens.
    """

    marks = (b'"usage"',)
    is_in_output = True

    def sum(self, lines: Iterable[JsonObject]) -> StoredUsage:
        """Return the sum over all answers. Of an answer's lines, the greatest numbers count."""
        calls: dict[str, Usage] = {}
        for line in lines:
            if (said := claude_call(line)) is not None:
                calls[said.call] = said.usage.at_least(calls.get(said.call, Usage()))
        return StoredUsage(calls=reduce(Usage.plus, calls.values(), Usage()), is_open=True)
