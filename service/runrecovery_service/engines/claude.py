"""Claude Code (`claude --print`) as an engine. Its events and exit codes: docs/agents.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from runrecovery_service.domain.run import JsonObject, JsonValue
from runrecovery_service.engines.cli import Broke, Cli, Finished, Named, Said

_OUTPUT: Final = ("--print", "--verbose", "--output-format", "stream-json")
_SESSION_LOST: Final = "No conversation found with session ID"


def read(event: JsonObject) -> Iterator[Said]:
    """Tell what an event says."""
    match event:
        case {"type": "system", "subtype": "init", "session_id": str(handle)}:
            yield Named(handle)
        case {"type": "result", "subtype": "success", "is_error": False, "result": str(text)}:
            yield Finished(text)
        case {"type": "result"}:
            yield Broke(_why(event))
        case _:
            return


def _why(event: JsonObject) -> str | None:
    told: list[JsonValue] = [event.get("result"), event.get("subtype")]
    errors = event.get("errors")
    if isinstance(errors, list):
        told = [*errors, *told]
    return next((text for text in told if isinstance(text, str) and text), None)


def says_lost(_: int | None, told: str) -> bool:
    """Tell a lost session: Claude Code says it in words, at their beginning."""
    return told.startswith(_SESSION_LOST)


CLAUDE: Final = Cli(
    session_type="claude",
    first=lambda handle: (*_OUTPUT, "--session-id", handle or ""),
    resume=lambda handle: (*_OUTPUT, "--resume", handle),
    read=read,
    says_lost=says_lost,
    chooses_handle=True,
)
