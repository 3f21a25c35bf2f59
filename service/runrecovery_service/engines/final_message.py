"""Parses the text with which an agent CLI ends its turn: a question, a result or plain text. Pure.

A model is asked to end its text with one JSON object (see `prompts.HOW_TO_END`). The object can
follow other text, and can be in a code block. A text without such an object is itself the result.

The text is not trusted, so parsing takes at most a time in proportion to its length.
"""

from __future__ import annotations

import re
from typing import Final

from runrecovery_service.domain.run import InteractionKind, JsonObject, JsonValue, Question
from runrecovery_service.domain.storable_text import storable
from runrecovery_service.engines import questions
from runrecovery_service.engines.dialect import AskMessage, ProtocolError, ResultMessage
from runrecovery_service.engines.message_limits import MAX_FINAL_MESSAGE_BYTES
from runrecovery_service.engines.strict_json import read_first_object

TRIES: Final = 4
"""How many `{` are tried as the beginning of the object: the first ones, then the last ones."""

_BEGINNING: Final = re.compile(r'\{\s*"(?:ask_user|result)"\s*:')
_FENCE: Final = "`~ \t\r\n"
"""Characters that can follow the object: the end of a code block."""


def parse(text: str) -> AskMessage | ResultMessage:
    """Return the question or the result in the last text of a turn."""
    match _closing_object(text[-MAX_FINAL_MESSAGE_BYTES:]):
        case {"ask_user": asked, **others} if not others and (found := _question(asked)):
            return AskMessage(question=found)
        case {"result": dict(output), **others} if not others:
            return ResultMessage(output=output)
    return ResultMessage(output=_as_output(text))


def _closing_object(text: str) -> JsonObject | None:
    """Return the question or result with which the text ends, or None."""
    end = text.rstrip(_FENCE)
    if not end.endswith("}"):
        return None
    beginnings = [found.start() for found in _BEGINNING.finditer(end)]
    for beginning in (*beginnings[: TRIES // 2], *beginnings[TRIES // 2 :][-TRIES // 2 :]):
        try:
            found, after = read_first_object(end, beginning)
        except ProtocolError:
            continue
        if after == len(end):
            return found
    return None


def _question(asked: JsonValue) -> Question | None:
    """Return a question, even if `kind` or `options` are wrong: the question must not be lost."""
    members = {"prompt": asked} if isinstance(asked, str) else asked
    if not isinstance(members, dict):
        return None
    prompt = members.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        return None
    offered = members.get("options")
    options = (
        [questions.parse_option(each) for each in offered] if isinstance(offered, list) else []
    )
    kept = tuple(option for option in options if option is not None)
    word = members.get("kind")
    fitting = InteractionKind.CHOOSE_ONE if kept else InteractionKind.OPEN_TEXT
    kind = questions.KINDS.get(word, fitting) if isinstance(word, str) else fitting
    return Question(kind=kind, prompt=prompt, options=kept)


def _as_output(text: str) -> JsonObject:
    """Return the text as an output that can be stored. A long text loses its beginning."""
    data = storable(text[-MAX_FINAL_MESSAGE_BYTES:]).encode()
    if len(data) <= MAX_FINAL_MESSAGE_BYTES and len(text) <= MAX_FINAL_MESSAGE_BYTES:
        return {"text": data.decode()}
    return {"text": data[-MAX_FINAL_MESSAGE_BYTES:].decode("utf-8", "ignore"), "truncated": True}
