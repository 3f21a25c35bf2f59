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
    Finding,
    Reason,
    SessionVerdict,
    StoredHandle,
)

HEAD_LINES: Final = 8
"""Lines at the beginning that may say whose session it is."""
_UUID: Final = re.compile(r"[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_FOLDER: Final = re.compile(r"[A-Za-z0-9._-]{1,255}")

VERDICT_OF: Final[Mapping[Reason, SessionVerdict]] = {
    Reason.PRESENT: SessionVerdict.VALID,
    Reason.UNCHANGED: SessionVerdict.VALID,
    Reason.WHOLE: SessionVerdict.VALID,
    Reason.MISSING: SessionVerdict.INVALID,
    Reason.EMPTY: SessionVerdict.INVALID,
    Reason.CUT_OFF: SessionVerdict.INVALID,
    Reason.BROKEN: SessionVerdict.INVALID,
    Reason.ELSEWHERE: SessionVerdict.INVALID,
    Reason.NOT_A_FILE: SessionVerdict.INVALID,
    Reason.UNREADABLE: SessionVerdict.INVALID,
    Reason.UNUSABLE: SessionVerdict.INVALID,
    Reason.NOT_KNOWN: SessionVerdict.UNKNOWN,
    Reason.NO_HOME: SessionVerdict.UNKNOWN,
    Reason.HOME_AWAY: SessionVerdict.UNKNOWN,
    Reason.NOT_ANSWERED: SessionVerdict.UNKNOWN,
}
FOUND: Final = {reason: Finding(verdict, reason) for reason, verdict in VERDICT_OF.items()}
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

    def identify(self, head: Iterator[JsonObject], stored: StoredHandle) -> Reason | None:
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


def judge(excerpt: Excerpt, stored: StoredHandle, layout: Layout) -> Reason:
    """Return WHOLE, or what is wrong. No line is parsed that is not there as a whole."""
    first, newline, _ = excerpt.head.partition(b"\n")
    if not newline and not excerpt.tail_is_all:
        return Reason.NOT_KNOWN  # longer than we read
    named = _json_object(first)
    if named is None:
        return Reason.BROKEN if newline else Reason.CUT_OFF
    if not newline:
        return Reason.NOT_KNOWN  # one object that fills the file: no CLI that we know writes that
    wrong = layout.identify(chain([named], _more(excerpt.head[len(first) + 1 :])), stored)
    return wrong or _judge_end(excerpt, layout)


def _more(head: bytes) -> Iterator[JsonObject]:
    """Yield the objects of the next whole lines."""
    *whole, _ = head.split(b"\n", HEAD_LINES)
    for line in whole:
        if (parsed := _json_object(line)) is not None:
            yield parsed


def _judge_end(excerpt: Excerpt, layout: Layout) -> Reason:
    *lines, rest = excerpt.tail.split(b"\n")
    if not excerpt.tail_is_all:
        lines = lines[1:]  # its beginning may be missing
    if rest or not lines:  # without an end, or longer than we read
        return Reason.CUT_OFF if rest else Reason.NOT_KNOWN
    if _json_object(lines[-1]) is None:
        return Reason.CUT_OFF
    for line in reversed(lines):
        parsed = _json_object(line)
        ended = None if parsed is None else layout.is_end_of_turn(parsed)
        if ended is not None:
            return Reason.WHOLE if ended else Reason.CUT_OFF
    return Reason.CUT_OFF if excerpt.tail_is_all else Reason.WHOLE


def _json_object(line: bytes) -> JsonObject | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return value if isinstance(value, dict) else None
