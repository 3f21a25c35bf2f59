"""The events of one turn of each agent CLI, and helpers for the tests of the dialects.

The lines are of codex-cli 0.171.0, gemini-cli 0.61.0 and claude-code 2.1.197, shortened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace

from runrecovery_service.domain.run import (
    Interaction,
    JsonObject,
    JsonValue,
    Session,
    ToolCall,
)
from runrecovery_service.engines.claude import CLAUDE
from runrecovery_service.engines.cli_dialect import CliDialect, CliListener
from runrecovery_service.engines.codex import CODEX
from runrecovery_service.engines.dialect import Message, Resumed, RunContext
from runrecovery_service.engines.gemini import GEMINI
from support.questions import answered

ID = "01a2224f-ff16-7cb2-8eb4-59969e2c0c53"
ASK = '{"ask_user": {"prompt": "Deploy to which place?"}}'
DIALECTS = [CODEX, GEMINI, CLAUDE]

CODEX_TURN: list[JsonObject] = [
    {"type": "thread.started", "thread_id": ID},
    {"type": "item.completed", "item": {"id": "0", "type": "error", "message": "a warning"}},
    {"type": "turn.started"},
    {"type": "item.completed", "item": {"id": "1", "type": "agent_message", "text": "I look."}},
    {"type": "item.completed", "item": {"id": "2", "type": "command_execution", "exit_code": 0}},
    {"type": "item.completed", "item": {"id": "3", "type": "agent_message", "text": ASK}},
    {"type": "turn.completed", "usage": {"input_tokens": 10}},
]
GEMINI_TURN: list[JsonObject] = [
    {"type": "init", "session_id": ID, "model": "m"},
    {"type": "message", "role": "user", "content": '{"result": {}}'},
    {"type": "message", "role": "assistant", "content": "I look.", "delta": True},
    {"type": "tool_use", "tool_name": "read_file"},
    {"type": "tool_result", "status": "success"},
    {"type": "message", "role": "assistant", "content": ASK[:10], "delta": True},
    {"type": "message", "role": "assistant", "content": ASK[10:], "delta": True},
    {"type": "result", "status": "success", "stats": {}},
]
CLAUDE_TURN: list[JsonObject] = [
    {"type": "system", "subtype": "init", "session_id": ID, "cwd": "/w"},
    {"type": "assistant", "message": {"content": [{"type": "text", "text": "I look."}]}},
    {"type": "result", "subtype": "success", "is_error": False, "result": ASK, "session_id": ID},
]
FINAL_MESSAGES: dict[str, Callable[[str], list[JsonObject]]] = {
    "codex": lambda text: [
        {"type": "item.completed", "item": {"type": "agent_message", "text": text}},
        {"type": "turn.completed"},
    ],
    "gemini": lambda text: [
        {"type": "message", "role": "assistant", "content": text},
        {"type": "result", "status": "success"},
    ],
    "claude": lambda text: [
        {"type": "result", "subtype": "success", "is_error": False, "result": text}
    ],
}
"""The events that end a turn, for a final message of the agent, by session type."""
TURNS = [(CODEX, CODEX_TURN), (GEMINI, GEMINI_TURN), (CLAUDE, CLAUDE_TURN)]


def task(
    given: JsonObject, *, turn: int = 1, permissions: str = "/p", deferred: Iterable[str] = ()
) -> RunContext:
    """Return a run with this input."""
    return RunContext(
        run_id="r",
        attempt=1,
        input=given,
        workspace="/w",
        turn=turn,
        permissions=permissions,
        deferred=frozenset(deferred),
    )


def permission_answer(
    response: JsonValue, *, given: JsonObject, auto_decided: bool = False, is_last: bool = True
) -> Interaction:
    """Return the answered question about the call "toolu_1" of Bash with this input."""
    call = ToolCall(
        id="toolu_1", tool="Bash", input=given, workspace="/w", pattern="Bash", is_last=is_last
    )
    return replace(answered(1, response, auto_decided=auto_decided), tool_call=call)


def resumed(dialect: CliDialect, reply: Interaction, handle: str = ID) -> Resumed:
    """Return a reply to a run whose session has this handle."""
    return Resumed(session=Session(type=dialect.session_type, handle=handle, turn=1), reply=reply)


def messages_of(listener: CliListener, events: Iterable[JsonObject]) -> list[Message]:
    """Return all messages of the listener for these events."""
    return [
        message
        for event in events
        for message in listener.hear(json.dumps(event).encode()).messages
    ]
