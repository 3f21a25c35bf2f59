"""Computes the history that Gemini CLI reads from a session file, and its corrections. Pure.

The Gemini API refuses a conversation in which a tool call has no response, or two responses. Gemini
CLI 0.61.0 stores a response twice: in the message with the call, and as a message of the user. The
CLI sends both when it resumes the session. A later line with the `id` of a message replaces this
message, so new lines at the end of the file can correct the history.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from runrecovery_service.domain.run import JsonObject, JsonValue

NO_RESPONSE: Final = "The outcome is not known: the tool was interrupted."


class GeminiHistory:
    """The conversation in a session file of Gemini CLI."""

    def corrections(self, lines: Iterable[JsonObject]) -> list[JsonObject]:
        """Return the lines to append so that each call has one response; none if all have one.

        The last of these lines repeats the last message, so that the file still ends with it.
        """
        messages = _read(lines)
        corrected = _correct(messages)
        if not corrected:
            return []
        key, last = messages.popitem()
        last = corrected.pop(key, last)
        return [*corrected.values(), last]


def _read(lines: Iterable[JsonObject]) -> dict[str, JsonObject]:
    """Return the messages by their id, as the CLI reads them."""
    messages: dict[str, JsonObject] = {}
    for line in lines:
        changed = line.get("$set")
        if isinstance(rewound := line.get("$rewindTo"), str):
            _rewind(messages, rewound)
        elif isinstance(line.get("id"), str):
            messages[_text(line, "id")] = line
        elif isinstance(changed, dict):
            if isinstance(changed.get("messages"), list):
                messages.clear()
            messages |= {_text(each, "id"): each for each in _objects(changed.get("messages"))}
        elif isinstance(line.get("sessionId"), str):
            messages |= {_text(each, "id"): each for each in _objects(line.get("messages"))}
    return messages


def _rewind(messages: dict[str, JsonObject], first: str) -> None:
    """Remove a message and all later ones. If the message is missing, remove every message."""
    ids = list(messages)
    for each in ids[ids.index(first) if first in messages else 0 :]:
        del messages[each]


def _correct(messages: Mapping[str, JsonObject]) -> dict[str, JsonObject]:
    """Return the messages that must be replaced, by id."""
    corrected: dict[str, JsonObject] = {}
    calls: dict[str, JsonObject] = {}  # calls of the last message with calls, without a response
    caller: str | None = None
    for key, message in messages.items():
        if message.get("type") == "gemini":
            if _is_sent(message):
                corrected |= _close(messages, caller, calls)
                caller, calls = key, _calls(message)
        elif message.get("type") == "user":
            parts = _objects(message.get("content"))
            kept = [part for part in parts if _is_wanted(part, calls)]
            if len(kept) < len(parts):
                corrected[key] = {**message, "content": list[JsonValue](kept)}
    return corrected | _close(messages, caller, calls)


def _is_wanted(part: JsonObject, calls: dict[str, JsonObject]) -> bool:
    """Return False for a response without a call, else True. Remove its call from `calls`."""
    response = part.get("functionResponse")
    if not isinstance(response, dict) or not _text(response, "id"):
        return True
    return calls.pop(_text(response, "id"), None) is not None


def _close(
    messages: Mapping[str, JsonObject], caller: str | None, calls: Mapping[str, JsonObject]
) -> dict[str, JsonObject]:
    """Return the message of the model with the last calls, so that each of them has one response.

    Calls without a response get one. If a call has a response in a later message, its response in
    `toolCalls` of this message is removed. Calls without an id stay as they are, because the CLI
    itself pairs them with responses.
    """
    if caller is None:
        return {}
    message = messages[caller]
    tools = {_text(tool, "id"): tool for tool in _objects(message.get("toolCalls"))}
    if "" in tools or "" in calls:
        return {}
    wanted: list[JsonValue] = [
        _with_response(tool, key) if key in calls else _without_response(tool)
        for key, tool in tools.items()
    ]
    wanted += [_with_response(call, key) for key, call in calls.items() if key not in tools]
    return {} if wanted == list(tools.values()) else {caller: {**message, "toolCalls": wanted}}


def _with_response(tool: JsonObject, key: str) -> JsonObject:
    """Return the call of a tool with exactly one response, which answers this call."""
    result = tool.get("result")
    if isinstance(result, str) and result:
        return tool
    parts = _objects(result)
    responses = [part for part in parts if _is_response_to(part, key)][:1]
    others = [part for part in parts if "functionResponse" not in part]  # images, for example
    unknown: JsonObject = {"id": key, "name": tool.get("name")}
    unknown["response"] = {"error": NO_RESPONSE}
    responses = responses or [{"functionResponse": unknown}]
    return {**tool, "result": list[JsonValue](responses + others)}


def _without_response(tool: JsonObject) -> JsonObject:
    return {name: value for name, value in tool.items() if name != "result"}


def _is_response_to(part: JsonObject, key: str) -> bool:
    response = part.get("functionResponse")
    return isinstance(response, dict) and response.get("id") == key


def _calls(message: JsonObject) -> dict[str, JsonObject]:
    """Return the calls of a message that the CLI sends: those in its content, else `toolCalls`."""
    parts = _objects(message.get("content"))
    calls = [part["functionCall"] for part in parts if isinstance(part.get("functionCall"), dict)]
    if not calls and not any(part.get("thought") for part in parts):
        return {_text(tool, "id"): tool for tool in _objects(message.get("toolCalls"))}
    return {_text(call, "id"): call for call in _objects(calls)}


def _is_sent(message: JsonObject) -> bool:
    """Return False for an empty message of the model, which the CLI does not send."""
    return any(message.get(name) for name in ("content", "thoughts", "toolCalls"))


def _objects(value: JsonValue) -> list[JsonObject]:
    """Return the objects of a list; a single object counts as a list of one."""
    return list(_each(value if isinstance(value, list) else [value]))


def _each(values: Iterable[JsonValue]) -> Iterator[JsonObject]:
    return (value for value in values if isinstance(value, dict))


def _text(value: JsonObject, name: str) -> str:
    found = value.get(name)
    return found if isinstance(found, str) else ""
