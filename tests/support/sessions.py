"""Write session files as the agent CLIs do, without a CLI.

Paths and lines are those of codex-cli 0.171.0, gemini-cli 0.61.0 and claude-code 2.1.197.
"""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self, TypeAlias

from runrecovery_service.domain.session_check import (
    SessionFinding,
    SessionFingerprint,
    SessionReason,
    StoredHandle,
)
from runrecovery_service.engines.sessions import sessions_of
from runrecovery_service.engines.sessions.files import CliSessions
from runrecovery_service.engines.sessions.lines import VERDICT_OF

Line: TypeAlias = dict[str, Any]
PRESETS: Final = ("codex", "gemini", "claude")
BEGUN_MS: Final = 1_795_871_924_059
"""The time at which the sessions began: 2026-11-28 13:18:44 UTC."""
AT: Final = "2026-11-28T13:18:44.180Z"
INSTRUCTIONS: Final = "You are a coding agent. " * 850
"""As long as the instructions at the beginning of a Codex session."""
HOME_VARIABLE: Final[Mapping[str, str]] = {
    "codex": "CODEX_HOME", "gemini": "GEMINI_CLI_HOME", "claude": "CLAUDE_CONFIG_DIR"
}  # fmt: skip


def session_id(number: int, *, version: int = 7, begun_ms: int = BEGUN_MS) -> str:
    """Return a session id: a UUID of version 4, or of 7 with its time, as Codex makes them."""
    noise = hashlib.sha256(str(number).encode()).hexdigest()
    head = f"{begun_ms:012x}" if version == 7 else noise[:12]
    return str(uuid.UUID(f"{head}{version}{noise[12:15]}8{noise[15:30]}"))


@dataclass(frozen=True, slots=True)
class SessionHome:
    """The agent home of one CLI, and the sessions in it."""

    preset: str
    path: Path
    projects: dict[str, str] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        """The environment variable that leads the CLI to its home."""
        return {HOME_VARIABLE[self.preset]: str(self.path)}

    @property
    def store(self) -> CliSessions:
        """The code under test, which checks the sessions of this home."""
        return sessions_of(self.preset, self.env)

    def new_id(self, number: int) -> str:
        """Return a session id of the version that the CLI makes."""
        return session_id(number, version=7 if self.preset == "codex" else 4)

    def file(self, handle: str, workspace: Path) -> Path:
        """Return where the CLI keeps a session of a workspace, whose path has no symlinks."""
        match self.preset:
            case "codex":
                name = f"rollout-2026-11-28T13-18-44-{handle}.jsonl"
                return self.path / "sessions/2026/11/28" / name
            case "gemini":
                project = self._project(workspace)
                name = f"session-2026-11-28T13-18-{handle[:8]}.jsonl"
                return self.path / ".gemini/tmp" / project / "chats" / name
            case _:
                folder = re.sub("[^a-zA-Z0-9]", "-", str(workspace))
                return self.path / "projects" / folder / f"{handle}.jsonl"

    def write(self, handle: str, workspace: Path, *, turns: int = 1, filler: int = 0) -> Path:
        """Write a session of whole turns, each with `filler` bytes of a tool's output."""
        file = self.file(handle, workspace)
        file.parent.mkdir(parents=True, exist_ok=True)
        turn = self.turn(handle, workspace, filler)
        file.write_bytes(text_of([*self.beginning(handle, workspace), *(turn * turns)]))
        return file

    def add_turn(self, file: Path, handle: str, workspace: Path) -> None:
        """Append a turn, as a resumed process does."""
        with file.open("ab") as opened:
            opened.write(text_of(self.turn(handle, workspace, 0)))

    def beginning(self, handle: str, workspace: Path) -> list[Line]:
        """Return the lines before the first turn."""
        match self.preset:
            case "codex":
                return _codex_beginning(handle, workspace)
            case "gemini":
                return _gemini_beginning(handle, workspace)
            case _:
                return _claude_beginning(handle)

    def turn(self, handle: str, workspace: Path, filler: int) -> list[Line]:
        """Return the lines of a whole turn."""
        match self.preset:
            case "codex":
                return _codex_turn(filler)
            case "gemini":
                return _gemini_turn(filler)
            case _:
                return _claude_turn(handle, workspace, filler)

    def _project(self, workspace: Path) -> str:
        if str(workspace) not in self.projects:
            number = len(self.projects)
            slug = re.sub("[^a-z0-9]+", "-", workspace.name.lower())
            slug += f"-{number}" if number else ""
            self.projects[str(workspace)] = slug
            folder = self.path / ".gemini/tmp" / slug
            folder.mkdir(parents=True, exist_ok=True)
            (folder / ".project_root").write_text(str(workspace))
            self.list_projects()
        return self.projects[str(workspace)]

    def list_projects(self) -> None:
        """Write Gemini CLI's list of projects."""
        listed = json.dumps({"projects": self.projects}, indent=2)
        (self.path / ".gemini/projects.json").write_text(listed)

    # -- checking ------------------------------------------------------------------------------

    def check(
        self, handle: str, workspace: Path, fingerprint: SessionFingerprint | None = None
    ) -> SessionFinding:
        """Return the finding of the check of one session."""
        stored = StoredHandle(handle=handle, workspace=workspace, fingerprint=fingerprint)
        (finding,) = self.store.check([stored])
        return finding

    def fingerprint(self, handle: str, workspace: Path) -> SessionFingerprint | None:
        """Return the fingerprint of one session."""
        return self.store.observe(StoredHandle(handle=handle, workspace=workspace)).fingerprint


@dataclass(frozen=True, slots=True)
class StoredSession:
    """One session of one workspace in the home of a CLI."""

    home: SessionHome
    workspace: Path
    handle: str
    file: Path

    @classmethod
    def write(cls, preset: str, folder: Path) -> Self:
        """Make an agent home and a workspace in a folder, and write a whole session of 100 KiB."""
        home, workspace = (
            SessionHome(preset, folder / "home"),
            folder / "workspaces" / "work space.1",
        )
        workspace.mkdir(parents=True)
        handle = home.new_id(1)
        return cls(home, workspace, handle, home.write(handle, workspace, filler=100 * 1024))

    def check(self, fingerprint: SessionFingerprint | None = None) -> SessionReason:
        """Return what the check found; assert that its verdict is that of its reason."""
        finding = self.home.check(self.handle, self.workspace, fingerprint)
        assert finding.reason is not None
        assert finding.verdict is VERDICT_OF[finding.reason]
        return finding.reason

    def fingerprint(self) -> SessionFingerprint:
        """Return the fingerprint of the session file as it is."""
        fingerprint = self.home.fingerprint(self.handle, self.workspace)
        assert fingerprint is not None
        return fingerprint

    @property
    def lines(self) -> list[bytes]:
        """The lines of the session file, each with its line end."""
        return self.file.read_bytes().splitlines(keepends=True)


def text_of(lines: list[Line]) -> bytes:
    """Return the bytes of lines as the CLIs write them."""
    return b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)


# -- Codex -------------------------------------------------------------------------------------


def _codex(kind: str, payload: Line) -> Line:
    return {"timestamp": AT, "type": kind, "payload": payload}


def _codex_message(role: str, text: str) -> Line:
    kind = "output_text" if role == "assistant" else "input_text"
    content = [{"type": kind, "text": text}]
    return _codex("response_item", {"type": "message", "role": role, "content": content})


def _codex_beginning(handle: str, workspace: Path) -> list[Line]:
    meta = {
        "session_id": handle, "id": handle, "timestamp": AT, "cwd": str(workspace),
        "originator": "codex_exec", "cli_version": "0.171.0", "source": "exec",
        "base_instructions": {"text": INSTRUCTIONS},
    }  # fmt: skip
    return [_codex("session_meta", meta)]


def _codex_turn(filler: int) -> list[Line]:
    context = {"turn_id": "t", "cwd": "/w", "approval_policy": "never", "model": "gpt-test"}
    usage = {"type": "token_count", "info": {"total_token_usage": {"total_tokens": 15}}}
    return [
        _codex("event_msg", {"type": "task_started", "turn_id": "t"}),
        _codex("turn_context", context),
        _codex_message("user", "THE-EARLIER-TURN"),
        _codex("response_item", {"type": "function_call", "name": "shell", "arguments": "{}"}),
        _codex("response_item", {"type": "function_call_output", "output": "x" * filler}),
        _codex_message("assistant", '{"ask_user": {"prompt": "Deploy?"}}'),
        _codex("event_msg", usage),
        _codex("event_msg", {"type": "task_complete", "turn_id": "t", "last_agent_message": "…"}),
    ]


# -- Gemini ------------------------------------------------------------------------------------


def _gemini_message(kind: str, **more: object) -> Line:
    return {"id": "442db8e8", "timestamp": AT, "type": kind, **more}


def _gemini_beginning(handle: str, workspace: Path) -> list[Line]:
    project = hashlib.sha256(str(workspace).encode()).hexdigest()
    context = _gemini_message("user", content=[{"text": "<session_context>"}])
    return [
        {
            "sessionId": handle, "projectHash": project, "startTime": AT, "lastUpdated": AT,
            "kind": "main",
        },
        {"$set": {"messages": [context], "lastUpdated": AT}},
    ]  # fmt: skip


def _gemini_turn(filler: int) -> list[Line]:
    touched = {"$set": {"lastUpdated": AT}}
    call = {"name": "shell", "result": [{"text": "x" * filler}], "status": "success"}
    return [
        _gemini_message("user", content=[{"text": "THE-EARLIER-TURN"}]),
        touched,
        _gemini_message("gemini", content="", toolCalls=[call]),
        _gemini_message("gemini", content='{"ask_user": {"prompt": "Deploy?"}}', thoughts=[]),
        touched,
    ]


# -- Claude Code -------------------------------------------------------------------------------


def _claude_beginning(handle: str) -> list[Line]:
    return [
        {"type": "queue-operation", "operation": word, "timestamp": AT, "sessionId": handle}
        for word in ("enqueue", "dequeue")
    ]


def _claude_turn(handle: str, workspace: Path, filler: int) -> list[Line]:
    def message(kind: str, content: object, stop: str | None = None) -> Line:
        told = {"role": kind, "content": content} | ({"stop_reason": stop} if stop else {})
        return {
            "parentUuid": None, "isSidechain": False, "type": kind, "message": told, "uuid": "u",
            "timestamp": AT, "cwd": str(workspace), "sessionId": handle, "version": "2.1.197",
        }  # fmt: skip

    use = {"type": "tool_use", "id": "t", "name": "Bash", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": "x" * filler}
    answer = {"type": "text", "text": '{"ask_user": {"prompt": "Deploy?"}}'}
    return [
        message("user", "THE-EARLIER-TURN"),
        {"type": "attachment", "attachment": {"type": "skill_listing"}, "sessionId": handle},
        message("assistant", [use], "tool_use"),
        message("user", [result]),
        message("assistant", [answer], "end_turn"),
        {"type": "last-prompt", "lastPrompt": "THE-EARLIER-TURN", "sessionId": handle},
    ]
