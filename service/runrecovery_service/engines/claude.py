"""Claude Code (`claude --print`) as an engine. docs/agents.md has its events and exit codes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from runrecovery_service.domain.run import JsonObject, JsonValue
from runrecovery_service.engines import cli_usage
from runrecovery_service.engines.cli_dialect import CliDialect, deferred_text
from runrecovery_service.engines.cli_events import (
    REFUSED,
    BackgroundTask,
    BackgroundTasks,
    CliEvent,
    OtherActivity,
    RetryReported,
    SessionNamed,
    ToolCalled,
    TurnDeferred,
    TurnFailed,
    TurnFinished,
)
from runrecovery_service.engines.permissions import Permissions

_OUTPUT: Final = ("--print", "--verbose", "--output-format", "stream-json")
_SESSION_LOST: Final = "No conversation found with session ID"
_REFUSED: Final = "Failed to authenticate. API Error: "
_CALL_LOST: Final = "Error: No deferred tool marker found"


def read(event: JsonObject) -> Iterator[CliEvent]:
    """Yield the meaning of an event."""
    match event:
        case {"type": "system", "subtype": "init", "session_id": str(handle)}:
            yield SessionNamed(handle)
        case {"type": "assistant" | "user" | "stream_event"}:
            if event.get("parent_tool_use_id") is None:  # else a background task did this
                yield OtherActivity()
                yield from _read_calls(event)
        case {"type": "system", "subtype": "api_retry"}:
            yield _retry(event)
        case {"type": "system", "subtype": str(subtype)}:
            yield from _read_tasks(subtype, event)
        case {
            "type": "result",
            "subtype": "success",
            "is_error": False,
            "result": "",
            "origin": {"kind": "task-notification"},
        }:
            # A resumed session first reports the tasks that ended with the previous process.
            yield TurnFinished("")
            yield OtherActivity()
        case {"type": "result", "stop_reason": "tool_deferred"}:
            yield _read_deferral(event)
        case {"type": "result", "subtype": "success", "is_error": False, "result": str(text)}:
            yield TurnFinished(text)
        case {"type": "result"}:
            yield TurnFailed(_failure_text(event))
        case _:
            return


def _read_calls(event: JsonObject) -> Iterator[CliEvent]:
    match event:
        case {"type": "assistant", "message": {"content": list(blocks)}}:
            for block in blocks:
                match block:
                    case {"type": "tool_use", "id": str(key)}:
                        yield ToolCalled(key)


def _read_deferral(event: JsonObject) -> CliEvent:
    match event.get("deferred_tool_use"):
        case {"id": str(key), "name": str(tool), "input": dict(given)}:
            return TurnDeferred(key, tool, given)
    return TurnFailed(deferred_text(None))


def _read_tasks(subtype: str, event: JsonObject) -> Iterator[CliEvent]:
    """Yield changes of background tasks. The end of a task makes the agent begin another turn."""
    match subtype, event:
        case "task_started", {"task_id": str(task)}:
            if event.get("is_backgrounded") is not False:
                yield BackgroundTask(task, is_running=True)
        case "task_notification", {"task_id": str(task)}:
            yield BackgroundTask(task, is_running=False)
            if event.get("status") != "stopped":
                yield OtherActivity()  # the model is informed, and can take long to answer
        case "background_tasks_changed", {"tasks": list(tasks)}:
            yield BackgroundTasks(frozenset(map(str, filter(None, map(_task_name, tasks)))))


def _task_name(task: JsonValue) -> str | None:
    match task:
        case {"ambient": True}:
            return None
        case {"task_id": str(name)}:
            return name
    return None


def _retry(event: JsonObject) -> RetryReported:
    """Return the failure, with the status and the name of the error if the event has them."""
    attempt, status, error = (event.get(key) for key in ("attempt", "error_status", "error"))
    tried = f"attempt {attempt}" if isinstance(attempt, int) else "an attempt"
    answered = f" with status {status}" if isinstance(status, int) else ""
    named = f" ({error})" if isinstance(error, str) and error else ""
    return RetryReported(
        f"{tried} to call the model failed{answered}{named}",
        is_refused=status in REFUSED,
    )


def _failure_text(event: JsonObject) -> str | None:
    texts: list[JsonValue] = [event.get("result"), event.get("subtype")]
    errors = event.get("errors")
    if isinstance(errors, list):
        texts = [*errors, *texts]
    return next((text for text in texts if isinstance(text, str) and text), None)


def says_lost(_: int | None, text: str) -> bool:
    """Return True for a lost session, which Claude Code reports at the beginning of its text.

    A session that lacks the call for which the user has answered counts as lost, because its file
    was changed.
    """
    return text.startswith((_SESSION_LOST, _CALL_LOST))


def says_refused(_: int | None, text: str) -> bool:
    """Return True for refused credentials, which are reported at the beginning of the text too."""
    return text.startswith(_REFUSED)


CLAUDE: Final = CliDialect(
    session_type="claude",
    first=lambda handle: (*_OUTPUT, "--session-id", handle or ""),
    resume=lambda handle: (*_OUTPUT, "--resume", handle),
    read=read,
    read_usage=cli_usage.claude,
    reports_cost=True,
    says_lost=says_lost,
    says_refused=says_refused,
    chooses_handle=True,
    permissions=Permissions(),
)
