"""What the check of a session can say, and what that means for its run. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final

_MARK: Final = re.compile(r"([0-9]{1,19}) (-?[0-9]{1,19})")


class SessionVerdict(StrEnum):
    """Whether a run can be resumed by its session, as it stands on record."""

    VALID = "VALID"
    INVALID = "INVALID"
    UNKNOWN = "UNKNOWN"
    """It cannot be told, and counts as held."""
    UNKNOWN_REFUSED = "UNKNOWN_REFUSED"
    """It cannot be told, and counts as lost: the engine's `unknown_session` is "fail"."""

    @property
    def holds(self) -> bool:
        """True when the matrix's HANDLE holds with it."""
        return self not in LOST


LOST: Final = frozenset({SessionVerdict.INVALID, SessionVerdict.UNKNOWN_REFUSED})


class UnknownSession(StrEnum):
    """What becomes of a run whose session cannot be judged."""

    KEEP = "keep"
    FAIL = "fail"


class Reason(StrEnum):
    """What was found, in a word. It never holds anything of the session or of its handle."""

    PRESENT = "present"
    UNCHANGED = "unchanged"
    WHOLE = "whole"
    MISSING = "missing"
    EMPTY = "empty"
    CUT_OFF = "cut_off"
    BROKEN = "broken"
    ELSEWHERE = "elsewhere"
    NOT_A_FILE = "not_a_file"
    UNREADABLE = "unreadable"
    UNUSABLE = "unusable"
    NOT_KNOWN = "not_known"
    NO_HOME = "no_home"
    HOME_AWAY = "home_away"
    NOT_ANSWERED = "not_answered"


WORDS: Final[Mapping[Reason, str]] = MappingProxyType(
    {
        Reason.PRESENT: "its session file was there",
        Reason.UNCHANGED: "its session file was as it had been when its question was recorded",
        Reason.WHOLE: "its session file was there and whole",
        Reason.MISSING: "its session file was gone",
        Reason.EMPTY: "its session file was empty",
        Reason.CUT_OFF: "its session file was cut off",
        Reason.BROKEN: "the beginning of its session file was damaged",
        Reason.ELSEWHERE: "its session file was of another session or another workspace",
        Reason.NOT_A_FILE: "in the place of its session file was no regular file",
        Reason.UNREADABLE: "its session file may not be read",
        Reason.UNUSABLE: "it cannot be the name of a session file",
        Reason.NOT_KNOWN: "its session file has a form that this version does not know",
        Reason.NO_HOME: "it is not known where its engine keeps sessions",
        Reason.HOME_AWAY: "the home of its engine was not there, or empty",
        Reason.NOT_ANSWERED: "the system did not let its session file be looked at",
    }
)
"""Each reason as a clause, for people."""

TELLS_NOTHING: Final = frozenset(
    {Reason.NOT_KNOWN, Reason.NO_HOME, Reason.HOME_AWAY, Reason.NOT_ANSWERED}
)
"""Reasons for UNKNOWN by themselves; with others nobody had seen the session before."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check said of one handle. `reason`: None where an earlier version did not record it,
    or a later one recorded one that is not known here."""

    verdict: SessionVerdict
    reason: Reason | None

    @property
    def holds(self) -> bool:
        """True when the matrix's HANDLE holds with it."""
        return self.verdict.holds


@dataclass(frozen=True, slots=True)
class SessionMark:
    """What a session file was when a question was recorded: bytes, and when it was changed."""

    size: int
    mtime_ns: int

    def __str__(self) -> str:
        return f"{self.size} {self.mtime_ns}"

    @classmethod
    def read(cls, text: str | None) -> SessionMark | None:
        """Return the mark that a text holds; None if there is none, or it cannot be read."""
        found = _MARK.fullmatch(text or "")
        return cls(int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHandle:
    """What a session is looked for by. `handle` is a secret, and was written by an agent."""

    handle: str = field(repr=False)
    workspace: Path
    mark: SessionMark | None = None


NOT_ANSWERED: Final = Finding(SessionVerdict.UNKNOWN, Reason.NOT_ANSWERED)


@dataclass(frozen=True, slots=True)
class SessionCheck:
    """What looks at the sessions of one engine.

    Attributes:
        look: answers for many handles, in their order, one by one. It may block, also for ever.
        unknown: what the engine makes of a session that cannot be judged.
    """

    look: Callable[[Sequence[StoredHandle]], Iterable[Finding]]
    unknown: UnknownSession = UnknownSession.KEEP

    @property
    def not_answered(self) -> Finding:
        """What goes on record where it did not answer."""
        return with_policy(NOT_ANSWERED, self.unknown)


def as_far_as_seen(finding: Finding, mark: SessionMark | None) -> Finding:
    """Return what a finding of a CLI's session is worth.

    Only of a session that was seen when its question was recorded, so that there is a mark, is it
    known to lie where we look: without one it may be whole, in a place that only the CLI knows (it
    works in another folder, or in a container). No place makes a handle usable.
    """
    lost = finding.verdict is SessionVerdict.INVALID and finding.reason is not Reason.UNUSABLE
    if lost and mark is None:
        return replace(finding, verdict=SessionVerdict.UNKNOWN)
    return finding


def with_policy(finding: Finding, unknown: UnknownSession) -> Finding:
    """Return what goes on record: of a session that cannot be judged also what that means."""
    if finding.verdict is SessionVerdict.UNKNOWN and unknown is UnknownSession.FAIL:
        return replace(finding, verdict=SessionVerdict.UNKNOWN_REFUSED)
    return finding
