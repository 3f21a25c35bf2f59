"""Gemini CLI as an engine. Its events and exit codes: docs/agents.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from runrecovery_service.domain.run import JsonObject
from runrecovery_service.engines.cli import (
    Acted,
    Broke,
    CliDialect,
    Doomed,
    Finished,
    Named,
    Said,
    Warned,
    Wrote,
)

_OUTPUT: Final = ("--output-format", "stream-json")
_BAD_INPUT: Final = 42
_SESSION_LOST: Final = "Error resuming session"
_STOPPED: Final = ("Loop detected", "Agent execution")
"""How warnings begin after which it ends as if all were well."""


def read(event: JsonObject) -> Iterator[Said]:
    """Tell what an event says."""
    match event:
        case {"type": "init", "session_id": str(handle)}:
            yield Named(handle)
        case {"type": "message", "role": "assistant", "content": str(text)}:
            yield Wrote(text, piece=event.get("delta") is True)
        case {"type": "tool_use" | "tool_result"}:
            yield Acted()
        case {"type": "error", "severity": severity, "message": str(message)}:
            ends = severity == "error" or message.startswith(_STOPPED)
            yield Doomed(message) if ends else Warned(message)
        case {"type": "result", "status": "success"}:
            yield Finished()
        case {"type": "result", "error": {"message": str(message)}}:
            yield Broke(message)
        case {"type": "result"}:
            yield Broke(None)
        case _:
            return


def says_lost(exit_code: int | None, told: str) -> bool:
    """Tell a lost session: its exit code stands for any input that it does not like."""
    return exit_code == _BAD_INPUT and _SESSION_LOST in told


GEMINI: Final = CliDialect(
    session_type="gemini",
    first=lambda _: _OUTPUT,
    resume=lambda handle: ("--resume", handle, *_OUTPUT),
    read=read,
    says_lost=says_lost,
)
