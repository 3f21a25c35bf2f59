"""Claude Code (`claude --print`) as an engine. Its events and exit codes: docs/agents.md."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from runrecovery_service.domain.run import JsonObject, JsonValue
from runrecovery_service.engines.cli import (
    Acted,
    Began,
    Broke,
    Ceased,
    CliDialect,
    Finished,
    Named,
    Runs,
    Said,
)

_OUTPUT: Final = ("--print", "--verbose", "--output-format", "stream-json")
_SESSION_LOST: Final = "No conversation found with session ID"


def read(event: JsonObject) -> Iterator[Said]:
    """Tell what an event says."""
    match event:
        case {"type": "system", "subtype": "init", "session_id": str(handle)}:
            yield Named(handle)
        case {"type": "assistant" | "user" | "stream_event"}:
            if event.get("parent_tool_use_id") is None:  # else of a task of its own
                yield Acted()
        case {"type": "system", "subtype": str(subtype)}:
            yield from _tasks(subtype, event)
        case {
            "type": "result",
            "subtype": "success",
            "is_error": False,
            "result": "",
            "origin": {"kind": "task-notification"},
        }:
            # A resumed session first tells of the tasks that ended with the last process.
            yield Finished("")
            yield Acted()
        case {"type": "result", "subtype": "success", "is_error": False, "result": str(text)}:
            yield Finished(text)
        case {"type": "result"}:
            yield Broke(_why(event))
        case _:
            return


def _tasks(subtype: str, event: JsonObject) -> Iterator[Said]:
    """Tell of tasks in the background: when one ends, the agent begins another turn."""
    match subtype, event:
        case "task_started", {"task_id": str(task)}:
            if event.get("is_backgrounded") is not False:
                yield Began(task)
        case "task_notification", {"task_id": str(task)}:
            yield Ceased(task)
            if event.get("status") != "stopped":
                yield Acted()  # it is told to the model, which may take long to say something
        case "background_tasks_changed", {"tasks": list(tasks)}:
            yield Runs(frozenset(map(str, filter(None, map(_task_of, tasks)))))


def _task_of(task: JsonValue) -> str | None:
    match task:
        case {"ambient": True}:
            return None
        case {"task_id": str(name)}:
            return name
    return None


def _why(event: JsonObject) -> str | None:
    told: list[JsonValue] = [event.get("result"), event.get("subtype")]
    errors = event.get("errors")
    if isinstance(errors, list):
        told = [*errors, *told]
    return next((text for text in told if isinstance(text, str) and text), None)


def says_lost(_: int | None, told: str) -> bool:
    """Tell a lost session: Claude Code says it in words, at their beginning."""
    return told.startswith(_SESSION_LOST)


CLAUDE: Final = CliDialect(
    session_type="claude",
    first=lambda handle: (*_OUTPUT, "--session-id", handle or ""),
    resume=lambda handle: (*_OUTPUT, "--resume", handle),
    read=read,
    says_lost=says_lost,
    chooses_handle=True,
)
