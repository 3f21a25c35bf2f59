"""Gemini CLI as an engine. docs/agents.md describes its events and exit codes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from runrecovery_service.domain.run import JsonObject
from runrecovery_service.engines import cli_usage
from runrecovery_service.engines.cli_dialect import CliDialect
from runrecovery_service.engines.cli_events import (
    REFUSED,
    CliEvent,
    OtherActivity,
    SessionNamed,
    TextWritten,
    TurnFailed,
    TurnFinished,
    WarningShown,
)

_OUTPUT: Final = ("--output-format", "stream-json")
_BAD_INPUT: Final = 42
_REFUSED: Final = frozenset(status & 0xFF for status in REFUSED)
_SESSION_LOST: Final = "Error resuming session"
_STOPPED_BY_HOOK: Final = "A hook stopped the agent in the middle of its turn."
_STOPPED: Final = ("Loop detected", "Agent execution")
"""Beginnings of warnings after which Gemini CLI stops but reports success."""
_RETRY: Final = re.compile(r"Attempt \d+ failed(?: with (?:status )?(\d{3}|5xx)\b|(?=[.:]))")


def read(event: JsonObject) -> Iterator[CliEvent]:
    """Yield the meaning of an event."""
    match event:
        case {"type": "init", "session_id": str(handle)}:
            yield SessionNamed(handle)
        case {"type": "message", "role": "assistant", "content": str(text)}:
            yield TextWritten(text, is_piece=event.get("delta") is True)
        # A hook told the CLI to stop. The CLI reports success afterwards.
        case {"type": "tool_result", "error": {"type": "stop_execution", "message": str(message)}}:
            yield TurnFailed(message, is_final=True)
        case {"type": "tool_result", "error": {"type": "stop_execution"}}:
            yield TurnFailed(_STOPPED_BY_HOOK, is_final=True)
        case {"type": "tool_use" | "tool_result"}:
            yield OtherActivity()
        case {"type": "error", "severity": severity, "message": str(message)}:
            failed = severity == "error" or message.startswith(_STOPPED)
            yield TurnFailed(message, is_final=True) if failed else WarningShown(message)
        case {"type": "result", "status": "success"}:
            yield TurnFinished()
        case {"type": "result", "error": {"message": str(message)}}:
            yield TurnFailed(message)
        case {"type": "result"}:
            yield TurnFailed(None)
        case _:
            return


def says_lost(exit_code: int | None, text: str) -> bool:
    """Return True for a lost session, by exit code and text: other bad input has the same code."""
    return exit_code == _BAD_INPUT and _SESSION_LOST in text


def says_refused(exit_code: int | None, _: str) -> bool:
    """Return True for refused credentials, by the low eight bits of the HTTP status."""
    return exit_code in _REFUSED


GEMINI: Final = CliDialect(
    session_type="gemini",
    first=lambda _: _OUTPUT,
    resume=lambda handle: ("--resume", handle, *_OUTPUT),
    read=read,
    read_usage=cli_usage.gemini,
    says_lost=says_lost,
    says_refused=says_refused,
    retry_on_stderr=_RETRY,
)
