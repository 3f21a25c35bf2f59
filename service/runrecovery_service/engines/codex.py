"""Codex (`codex exec`) as an engine. docs/agents.md describes its events and exit codes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

from runrecovery_service.domain.run import JsonObject
from runrecovery_service.engines import cli_usage
from runrecovery_service.engines.cli_dialect import CliDialect
from runrecovery_service.engines.cli_events import (
    CliEvent,
    OtherActivity,
    RetryReported,
    SessionNamed,
    TextWritten,
    TurnFailed,
    TurnFinished,
    WarningShown,
)

_SESSION_LOST: Final = "thread/resume failed"
_RETRY: Final = "Reconnecting"
_REFUSED: Final = re.compile(r"\b(?:401 Unauthorized|403 Forbidden)\b")


def read(event: JsonObject) -> Iterator[CliEvent]:
    """Yield the meaning of an event."""
    match event:
        case {"type": "thread.started", "thread_id": str(handle)}:
            yield SessionNamed(handle)
        case {"type": "item.completed", "item": {"type": "agent_message", "text": str(text)}}:
            yield TextWritten(text)
        case {"type": "turn.started" | "item.started" | "item.updated" | "item.completed"}:
            yield OtherActivity()
        case {"type": "turn.completed"}:
            yield TurnFinished()
        case {"type": "turn.failed", "error": {"message": str(message)}}:
            yield TurnFailed(message)
        case {"type": "turn.failed"}:
            yield TurnFailed(None)
        case {"type": "error", "message": str(message)}:
            yield WarningShown(message)
            if message.startswith(_RETRY):
                yield RetryReported(message, is_refused=_REFUSED.search(message) is not None)
        case _:
            return


def says_lost(_: int | None, text: str) -> bool:
    """Return True for a lost session, by the text: all failures of Codex have one exit code."""
    return _SESSION_LOST in text


def says_refused(_: int | None, text: str) -> bool:
    """Return True for refused credentials."""
    return _REFUSED.search(text) is not None


CODEX: Final = CliDialect(
    session_type="codex",
    first=lambda _: ("exec", "--json", "-"),
    resume=lambda handle: ("exec", "resume", handle, "--json", "-"),
    # Outside a Git repository Codex requires this flag, even for a folder that it trusts.
    when_trusted=("--skip-git-repo-check",),
    read=read,
    read_usage=cli_usage.codex,
    says_lost=says_lost,
    says_refused=says_refused,
)
