"""The JSON-lines protocol between the service and an engine: one object per line, UTF-8. Pure."""

from __future__ import annotations

import json
from typing import Final

from runrecovery_service.domain.interruption import Interruption
from runrecovery_service.domain.run import (
    Interaction,
    JsonObject,
    JsonValue,
    Option,
    Question,
    RunError,
)
from runrecovery_service.domain.usage import InvalidUsage, TurnUsage, usage_of
from runrecovery_service.engines import prompts, questions
from runrecovery_service.engines.dialect import (
    AskMessage,
    Heard,
    KeptTurn,
    Message,
    Opening,
    ProgressMessage,
    ProtocolError,
    ResultMessage,
    Resumed,
    RunContext,
    SessionMessage,
    UnknownMessage,
    UsageMessage,
)
from runrecovery_service.engines.message_limits import MAX_JSONL_LINE_BYTES, MAX_SESSION_CHARS
from runrecovery_service.engines.strict_json import read_object

SESSION_TYPE: Final = "jsonl"
"""The type of this protocol's session handles."""
SESSION_SHOWN: Final = b'{"type":"session","value":"[secret]"}'
"""Replaces the line that names a session in the stored output."""


def start_message(run: RunContext) -> bytes:
    """Return the line that begins an attempt."""
    return _line({"type": "start", **_context(run)})


def resume_message(run: RunContext, resumed: Resumed) -> bytes:
    """Return the line that resumes a session: with a reply, or after an interruption."""
    session = resumed.session
    message: JsonObject = {
        "type": "resume",
        **_context(run),
        "session": {"type": session.type, "value": session.handle},
    }
    if resumed.interruption is not None:
        message["interrupted"] = _interruption(resumed.interruption)
    elif resumed.reply is not None:
        message["reply"] = _reply(resumed.reply)
    return _line(message)


def _interruption(interruption: Interruption) -> JsonObject:
    """Return the interruption as JSON, with the reply that the killed process had received."""
    fields: JsonObject = {
        "at": interruption.at.isoformat(),
        "cause": interruption.cause.value.lower(),
        "times": interruption.times,
        "notice": prompts.interruption_notice(interruption),
    }
    return fields if interruption.reply is None else fields | {"reply": _reply(interruption.reply)}


def reply_message(reply: Interaction) -> bytes:
    """Return the line that gives a sticky engine the reply to its question."""
    return _line({"type": "reply", **_reply(reply)})


def _context(run: RunContext) -> JsonObject:
    return {
        "run_id": run.run_id,
        "attempt": run.attempt,
        "input": run.input,
        "workspace": run.workspace,
    }


def _reply(reply: Interaction) -> JsonObject:
    """Return the reply as JSON. With `auto_decided` it is null, because nobody replied in time."""
    fields: JsonObject = {"interaction_id": reply.interaction_id, "response": reply.response}
    return fields | {"auto_decided": True} if reply.auto_decided else fields


def _line(message: JsonObject) -> bytes:
    # ASCII with escapes, so that no character of a caller's text breaks the line or the encoding.
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def parse(line: bytes) -> Message:
    """Return the message of one line that an engine printed, with or without its newline.

    Raises:
        ProtocolError: the line is not an object of the protocol.
    """
    if len(line) > MAX_JSONL_LINE_BYTES:
        raise ProtocolError(f"a line is longer than {MAX_JSONL_LINE_BYTES} bytes")
    message = read_object(line)
    kind = message.get("type")
    match kind:
        case "session":
            return SessionMessage(value=_text(message, "value", at_most=MAX_SESSION_CHARS))
        case "ask":
            return AskMessage(question=_question(message))
        case "progress":
            return ProgressMessage(message=_text(message, "message", empty=True))
        case "result":
            return ResultMessage(output=_output(message))
        case "usage":
            return _usage(message)
        case str():
            return UnknownMessage(type=kind[:64])
        case _:
            raise ProtocolError('a message has no "type"')


def _text(
    message: JsonObject, name: str, *, at_most: int = MAX_JSONL_LINE_BYTES, empty: bool = False
) -> str:
    value = message.get(name)
    if not isinstance(value, str):
        raise ProtocolError(f'"{name}" of a "{message["type"]}" message is not a text')
    if not value.strip() and not empty:
        raise ProtocolError(f'"{name}" of a "{message["type"]}" message is empty')
    if len(value) > at_most:
        raise ProtocolError(f'"{name}" is longer than {at_most} characters')
    return value


def _question(message: JsonObject) -> Question:
    word = message.get("kind")
    kind = questions.KINDS.get(word) if isinstance(word, str) else None
    if kind is None:
        known = ", ".join(sorted(questions.KINDS))
        raise ProtocolError(f'"kind" of an "ask" message is none of {known}')
    options = message.get("options")
    if options is None:
        options = []
    if not isinstance(options, list):
        raise ProtocolError('"options" of an "ask" message is not a list')
    return Question(
        kind=kind,
        prompt=_text(message, "prompt"),
        options=tuple(_option(option) for option in options),
    )


def _option(value: JsonValue) -> Option:
    found = questions.parse_option(value)
    if found is None:
        raise ProtocolError("an option is neither a text, a number nor {label, value}")
    return found


def _usage(message: JsonObject) -> UsageMessage | UnknownMessage:
    """Return the usage of the process so far. Bad numbers are ignored: they must not fail a run."""
    try:
        usage = usage_of(
            input_tokens=message.get("input_tokens"),
            output_tokens=message.get("output_tokens"),
            cached=message.get("cached_input_tokens", 0),
            cache_write=message.get("cache_write_input_tokens", 0),
            reasoning=message.get("reasoning_output_tokens", 0),
            cost_usd=message.get("cost_usd"),
            model=message.get("model", ""),
        )
    except InvalidUsage as invalid:
        return UnknownMessage(type="usage", problem=str(invalid))
    return UsageMessage(used=TurnUsage(turn=usage))


def _output(message: JsonObject) -> JsonObject:
    output = message.get("output")
    if not isinstance(output, dict):
        raise ProtocolError('"output" of a "result" message is not an object')
    return output


class JsonLines:
    """The dialect of engines that were written or wrapped for this service.

    It has no state, so it is also its own listener.
    """

    session_type = SESSION_TYPE
    max_line_bytes = MAX_JSONL_LINE_BYTES
    ends_once = True
    reports_cost = True
    buffered_bytes = 0
    max_secret_bytes = 0

    def open(self, run: RunContext, resumed: Resumed | None) -> Opening:
        """Return the `start` or the `resume` line."""
        if resumed is None:
            return Opening(input=start_message(run), listener=self)
        return Opening(input=resume_message(run, resumed), listener=self)

    def reread(self, turn: KeptTurn) -> JsonLines:
        """Return this listener. Stored output lacks only the handle in `session` lines."""
        return self

    def reply(self, reply: Interaction) -> bytes:
        """Return the `reply` line."""
        return reply_message(reply)

    def hear(self, line: bytes) -> Heard:
        """Return the meaning of one line. An empty line has no meaning."""
        if not line.strip():
            return Heard(line)
        message = parse(line)
        return Heard(SESSION_SHOWN if isinstance(message, SessionMessage) else line, (message,))

    def hear_stderr(self, text: str) -> tuple[Message, ...]:
        """Return nothing: the protocol has no messages on standard error."""
        return ()

    def redact(self, text: bytes) -> bytes:
        """Return the text unchanged: an engine names its handle in `session` lines only."""
        return text

    def failure(self, exit_code: int | None, stderr_tail: str) -> RunError | None:
        """Return None: the protocol has neither failure messages nor exit codes with a meaning."""
        return None

    def retry(self) -> str | None:
        """Return None: the protocol has no message for retries."""
        return None


JSON_LINES: Final = JsonLines()
