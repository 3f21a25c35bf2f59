"""Checks a session file of JSON lines by its beginning and its end. Pure."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import field
from itertools import chain
from typing import Final, Protocol

from runrecovery_service.domain.run import JsonObject
from runrecovery_service.domain.session_check import (
    SessionFinding,
    SessionReason,
    SessionVerdict,
    StoredHandle,
)
from runrecovery_service.lazy_dataclass import dataclass

HEAD_LINES: Final = 8
"""How many lines at the beginning of the file can identify the session."""
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
    """The parts of a session file that are read. Their text is a secret.

    Attributes:
        head: the beginning, with at least one line unless that line is too long.
        tail: the last lines of the file, or the last lines when its fingerprint was recorded.
        tail_is_all: whether the tail is the whole file.
    """

    head: bytes = field(repr=False)
    tail: bytes = field(repr=False)
    tail_is_all: bool


class Layout(Protocol):
    """The format of one CLI's session files."""

    def identify(self, head: Iterator[JsonObject], stored: StoredHandle) -> SessionReason | None:
        """Return None if the first lines belong to the session, else ELSEWHERE or NOT_KNOWN.

        Args:
            head: the first lines of the file, at least one.
        """

    def is_end_of_turn(self, line: JsonObject) -> bool | None:
        """Return whether a turn ends with this line; None if the line does not show it.

        Return False if other lines must follow, for example after a tool call.
        """

    def may_follow_end(self, line: JsonObject) -> bool:
        """Return True for a line that the CLI sometimes appends after the end of a turn.

        If the turn has not ended before such a line, other lines must follow.
        """


def is_uuid(handle: str) -> bool:
    """Return True for a session id.

    A CLI could read any other text as a keyword ("latest"), as a number or as a new session.
    """
    return _UUID.fullmatch(handle) is not None


def is_folder_name(name: object) -> bool:
    """Return True for a safe name of a folder. Names come from files that agents can write."""
    return isinstance(name, str) and name not in {".", ".."} and bool(_FOLDER.fullmatch(name))


def judge_excerpt(excerpt: Excerpt, stored: StoredHandle, layout: Layout) -> SessionReason:
    """Return WHOLE for an intact file, else why it is not intact. Parse only complete lines."""
    first, newline, _ = excerpt.head.partition(b"\n")
    if not newline and not excerpt.tail_is_all:
        return SessionReason.NOT_KNOWN  # the first line is too long
    named = json_object(first)
    if named is None:
        return SessionReason.BROKEN if newline else SessionReason.CUT_OFF
    if not newline:
        return (
            SessionReason.NOT_KNOWN
        )  # one object that fills the file: no CLI that we know writes that
    wrong = layout.identify(chain([named], _more(excerpt.head[len(first) + 1 :])), stored)
    return wrong or _judge_end(excerpt, layout)


def _more(head: bytes) -> Iterator[JsonObject]:
    """Yield the objects of the next complete lines."""
    *whole, _ = head.split(b"\n", HEAD_LINES)
    for line in whole:
        if (parsed := json_object(line)) is not None:
            yield parsed


def _judge_end(excerpt: Excerpt, layout: Layout) -> SessionReason:
    *lines, rest = excerpt.tail.split(b"\n")
    if not excerpt.tail_is_all:
        lines = lines[1:]  # the first line can lack its beginning
    if rest or not lines:  # the last line has no newline, or is too long
        return SessionReason.CUT_OFF if rest else SessionReason.NOT_KNOWN
    if json_object(lines[-1]) is None:
        return SessionReason.CUT_OFF
    is_open = excerpt.tail_is_all
    for line in reversed(lines):
        parsed = json_object(line)
        ended = None if parsed is None else layout.is_end_of_turn(parsed)
        if parsed is not None and ended is False and layout.may_follow_end(parsed):
            is_open = True
        elif ended is not None:
            return SessionReason.WHOLE if ended else SessionReason.CUT_OFF
    return SessionReason.CUT_OFF if is_open else SessionReason.WHOLE


def json_object(line: bytes) -> JsonObject | None:
    """Return the JSON object in a line, or None if the line has any other content."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # UnicodeDecodeError is a ValueError
        return None
    return value if isinstance(value, dict) else None
