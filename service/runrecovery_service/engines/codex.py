"""Codex (`codex exec`) as an engine. Its events and exit codes: docs/agents.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from runrecovery_service.domain.run import JsonObject
from runrecovery_service.engines.cli import (
    Acted,
    Broke,
    CliDialect,
    Finished,
    Named,
    Said,
    Warned,
    Wrote,
)

_SESSION_LOST: Final = "thread/resume failed"


def read(event: JsonObject) -> Iterator[Said]:
    """Tell what an event says."""
    match event:
        case {"type": "thread.started", "thread_id": str(handle)}:
            yield Named(handle)
        case {"type": "item.completed", "item": {"type": "agent_message", "text": str(text)}}:
            yield Wrote(text)
        case {"type": "turn.started" | "item.started" | "item.updated" | "item.completed"}:
            yield Acted()
        case {"type": "turn.completed"}:
            yield Finished()
        case {"type": "turn.failed", "error": {"message": str(message)}}:
            yield Broke(message)
        case {"type": "turn.failed"}:
            yield Broke(None)
        case {"type": "error", "message": str(message)}:
            yield Warned(message)
        case _:
            return


def says_lost(_: int | None, told: str) -> bool:
    """Tell a lost session: Codex has but one exit code, and says the rest in words."""
    return _SESSION_LOST in told


CODEX: Final = CliDialect(
    session_type="codex",
    first=lambda _: ("exec", "--json", "-"),
    resume=lambda handle: ("exec", "resume", handle, "--json", "-"),
    # Outside of a Git repository it asks for trust by this flag, whatever its configuration says.
    when_trusted=("--skip-git-repo-check",),
    read=read,
    says_lost=says_lost,
)
