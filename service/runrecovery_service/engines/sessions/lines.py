"""Judges a session file of JSON lines by its beginning and its end. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from typing import Final, Protocol

from runrecovery_service.domain.run import JsonObject
from runrecovery_service.domain.session_check import (
    SessionFinding,
    SessionReason,
    SessionVerdict,
    StoredHandle,
)

HEAD_LINES: Final = 8
"""Lines at the beginning that may say whose session it is."""
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_FOLDER: Final = re.compile(r"[A-Za-z0-9._-]{1,255}")

VERDICT_OF: Final[Mapping[SessionReason, SessionVerdict]] = {
    SessionReason.PRESENT: SessionVerdict.VALID,
    SessionReason.UNCHANGED: SessionVerdict.VALID,
    SessionReason.WHOLE: SessionVerdict.VALID,
    SessionReason.MISSING: SessionVerdict.INVALID,
    SessionReason.EMPTY: SessionVerdict.INVALID,
    SessionReason.CUT_OFF: SessionVerdict.INVALID,
    SessionReason.BROKEN: SessionVerdict.INVALID,
    SessionReason.ELSEWHERE: SessionVerdict.INVALID,
    SessionReason.NOT_A_FILE: SessionVerdict.INVALID,
    SessionReason.UNREADABLE: SessionVerdict.INVALID,
    SessionReason.UNUSABLE: SessionVerdict.INVALID,
    SessionReason.NOT_KNOWN: SessionVerdict.UNKNOWN,
    SessionReason.NO_HOME: SessionVerdict.UNKNOWN,
    SessionReason.HOME_AWAY: SessionVerdict.UNKNOWN,
    SessionReason.NOT_ANSWERED: SessionVerdict.UNKNOWN,
}
FOUND: Final = {reason: SessionFinding(verdict, reason) for reason, verdict in VERDICT_OF.items()}
"""The finding of each reason."""


@dataclass(frozen=True, slots=True)
class Excerpt:
    """What of a session file is looked at; its text is a secret.

    Attributes:
        head: its beginning, with at least one line, unless that is longer than anybody's.
        tail: its end, or what was its end when the question was recorded.
        tail_is_all: the tail begins where the file does.
    """

    head: bytes = field(repr=False)
    tail: bytes = field(repr=False)
    tail_is_all: bool


class Layout(Protocol):
    """How one CLI writes its sessions."""

    def identify(self, head: Iterator[JsonObject], stored: StoredHandle) -> SessionReason | None:
        """Say what is wrong with the first lines (at least one): ELSEWHERE or NOT_KNOWN; None:
        nothing."""

    def is_end_of_turn(self, line: JsonObject) -> bool | None:
        """True of a line with the agent's last word; False of one after which more must come (a
        user's message, a tool's call); None of a line that tells neither."""


def is_uuid(handle: str) -> bool:
    """True for what the CLIs take for a session: other words mean something else to them (a
    number, "latest"), or make a new session."""
    return _UUID.fullmatch(handle) is not None


def is_folder_name(name: object) -> bool:
    """True for a name that leads nowhere else; it was read from a file that agents can write."""
    return isinstance(name, str) and name not in {".", ".."} and bool(_FOLDER.fullmatch(name))


def judge(excerpt: Excerpt, stored: StoredHandle, layout: Layout) -> SessionReason:
    """Return WHOLE, or what is wrong. No line is parsed that is not there as a whole."""
    first, newline, _ = excerpt.head.partition(b"\n")
    if not newline and not excerpt.tail_is_all:
        return SessionReason.NOT_KNOWN  # longer than we read
    named = _json_object(first)
    if named is None:
        return SessionReason.BROKEN if newline else SessionReason.CUT_OFF
    if not newline:
        return (
            SessionReason.NOT_KNOWN
        )  # one object that fills the file: no CLI that we know writes that
    wrong = layout.identify(chain([named], _more(excerpt.head[len(first) + 1 :])), stored)
    return wrong or _judge_end(excerpt, layout)


def _more(head: bytes) -> Iterator[JsonObject]:
    """Yield the objects of the next whole lines."""
    *whole, _ = head.split(b"\n", HEAD_LINES)
    for line in whole:
        if (parsed := _json_object(line)) is not None:
            yield parsed


def _judge_end(excerpt: Excerpt, layout: Layout) -> SessionReason:
    *lines, rest = excerpt.tail.split(b"\n")
    if not excerpt.tail_is_all:
        lines = lines[1:]  # its beginning may be missing
    if rest or not lines:  # without an end, or longer than we read
        return SessionReason.CUT_OFF if rest else SessionReason.NOT_KNOWN
    if _json_object(lines[-1]) is None:
        return SessionReason.CUT_OFF
    for line in reversed(lines):
        parsed = _json_object(line)
        ended = None if parsed is None else layout.is_end_of_turn(parsed)
        if ended is not None:
            return SessionReason.WHOLE if ended else SessionReason.CUT_OFF
    return SessionReason.CUT_OFF if excerpt.tail_is_all else SessionReason.WHOLE


def _json_object(line: bytes) -> JsonObject | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return value if isinstance(value, dict) else None
