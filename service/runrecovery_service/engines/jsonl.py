"""The JSON-lines protocol between the service and an engine: one object a line, UTF-8. Pure.

What an engine prints is not trusted: everything that the store or the wire cannot hold exactly
(NaN, numbers beyond a double, NUL, lone surrogates, deep nesting, a key twice) is refused here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from typing import Final, NoReturn, TypeAlias

from runrecovery_service.domain.run import (
    Interaction,
    InteractionKind,
    JsonObject,
    JsonValue,
    Option,
    Question,
    Session,
)

SESSION_TYPE: Final = "jsonl"
"""The type of the handles that this protocol names."""
MAX_LINE_BYTES: Final = 1 << 20
"""Longest line that an engine may print, its newline included."""
MAX_DEPTH: Final = 32
"""Deepest nesting of objects and lists in a line. Protobuf readers give up at 100 messages, and an
object inside a Struct takes three of them: a deeper output could be stored but no caller could read
the run any more."""
MAX_SESSION_CHARS: Final = 4096
_KINDS: Final = frozenset(kind.value for kind in InteractionKind)


class ProtocolError(Exception):
    """The engine broke the protocol. The text says how, without quoting what it printed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionMessage:
    """The handle by which this conversation can be resumed. A secret: never log it."""

    value: str

    def __repr__(self) -> str:
        return "SessionMessage(value=<secret>)"


@dataclass(frozen=True, slots=True, kw_only=True)
class AskMessage:
    """A question for the user."""

    question: Question


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressMessage:
    """Something to show meanwhile."""

    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ResultMessage:
    """The run's output; the engine is done."""

    output: JsonObject


@dataclass(frozen=True, slots=True, kw_only=True)
class UnknownMessage:
    """A message of a type that this version does not know: to be counted and ignored."""

    type: str


Message: TypeAlias = (
    "SessionMessage | AskMessage | ProgressMessage | ResultMessage | UnknownMessage"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """What every process of a run is told. `workspace` is an absolute path."""

    run_id: str
    attempt: int
    input: JsonObject
    workspace: str

    def fields(self) -> JsonObject:
        """Return the members of the message."""
        return {
            "run_id": self.run_id,
            "attempt": self.attempt,
            "input": self.input,
            "workspace": self.workspace,
        }


def start_message(task: Task) -> bytes:
    """Return the line that begins an attempt."""
    return _line({"type": "start", **task.fields()})


def resume_message(task: Task, *, session: Session, reply: Interaction) -> bytes:
    """Return the line that continues a conversation with the answer to its question."""
    return _line(
        {
            "type": "resume",
            **task.fields(),
            "session": {"type": session.type, "value": session.handle},
            "reply": _reply(reply),
        }
    )


def reply_message(reply: Interaction) -> bytes:
    """Return the line that gives a sticky engine the answer to its question."""
    return _line({"type": "reply", **_reply(reply)})


def _reply(reply: Interaction) -> JsonObject:
    """Without an answer in time the response is null, and said to be nobody's."""
    told: JsonObject = {"interaction_id": reply.interaction_id, "response": reply.response}
    return told | {"auto_decided": True} if reply.auto_decided else told


def _line(message: JsonObject) -> bytes:
    # ASCII with escapes: no character of a caller's text can break the line or the encoding.
    return json.dumps(message, allow_nan=False, separators=(",", ":")).encode("ascii") + b"\n"


def parse(line: bytes) -> Message:
    """Read one line that an engine printed, with or without its newline.

    Raises:
        ProtocolError: not an object of the protocol.
    """
    message = _object(line)
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
        case str():
            return UnknownMessage(type=kind[:64])
        case _:
            raise ProtocolError('a message has no "type"')


def _object(line: bytes) -> JsonObject:
    if len(line) > MAX_LINE_BYTES:
        raise ProtocolError(f"a line is longer than {MAX_LINE_BYTES} bytes")
    try:
        value: JsonValue = json.loads(
            line.decode("utf-8"), parse_constant=_no_constant, object_pairs_hook=_unique
        )
    except ProtocolError:
        raise
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # not UTF-8, not JSON, or an integer of thousands of digits
        # "from None": the cause would carry the line, and with it perhaps a session handle.
        raise ProtocolError("a line is not JSON") from None
    if not isinstance(value, dict):
        raise ProtocolError("a line is not a JSON object")
    _check(value)
    return value


def _no_constant(name: str) -> NoReturn:
    raise ProtocolError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, JsonValue]]) -> JsonObject:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ProtocolError("an object has a key twice")
    return found


def _too_deep() -> ProtocolError:
    return ProtocolError(f"a message is nested deeper than {MAX_DEPTH}")


def _check(root: JsonObject) -> None:
    """Refuse what the database or protobuf could not hold. Iterative: the depth is theirs."""
    level: list[JsonValue] = [root]
    for depth in count(1):
        inside = [value for value in level if isinstance(value, dict | list)]
        for value in level:
            if not isinstance(value, dict | list):
                _check_leaf(value)
        if not inside:
            return
        if depth > MAX_DEPTH:
            raise _too_deep()
        level = [part for value in inside for part in _parts(value)]


def _parts(value: JsonObject | list[JsonValue]) -> Iterator[JsonValue]:
    yield from value
    if isinstance(value, dict):
        yield from value.values()


def _check_leaf(value: float | str | None) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise ProtocolError("a text holds a NUL character")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ProtocolError("a text holds half of a surrogate pair")
    elif value is not None and not _fits_double(value):
        raise ProtocolError("a number is out of range")


def _fits_double(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int that no double can hold
        return False


def _text(
    message: JsonObject, name: str, *, at_most: int = MAX_LINE_BYTES, empty: bool = False
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
    kind = message.get("kind")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ProtocolError(f'"kind" of an "ask" message is none of {", ".join(sorted(_KINDS))}')
    options = message.get("options")
    if options is None:
        options = []
    if not isinstance(options, list):
        raise ProtocolError('"options" of an "ask" message is not a list')
    return Question(
        kind=InteractionKind(kind),
        prompt=_text(message, "prompt"),
        options=tuple(_option(option) for option in options),
    )


def _option(option: JsonValue) -> Option:
    match option:
        case bool():
            pass
        case str() if option.strip():
            return Option(label=option, value=option)
        case int() | float():
            return Option(label=json.dumps(option), value=option)
        case {"label": str(label), "value": value} if label.strip():
            return Option(label=label, value=value)
    raise ProtocolError("an option is neither a text, a number nor {label, value}")


def _output(message: JsonObject) -> JsonObject:
    output = message.get("output")
    if not isinstance(output, dict):
        raise ProtocolError('"output" of a "result" message is not an object')
    return output
