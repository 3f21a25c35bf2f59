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


class SessionReason(StrEnum):
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


REASON_TEXTS: Final[Mapping[SessionReason, str]] = MappingProxyType(
    {
        SessionReason.PRESENT: "its session file was there",
        SessionReason.UNCHANGED: "its session file had not changed since its question was recorded",
        SessionReason.WHOLE: "its session file was there and whole",
        SessionReason.MISSING: "its session file was gone",
        SessionReason.EMPTY: "its session file was empty",
        SessionReason.CUT_OFF: "its session file was cut off",
        SessionReason.BROKEN: "the beginning of its session file was damaged",
        SessionReason.ELSEWHERE: "its session file was of another session or another workspace",
        SessionReason.NOT_A_FILE: "in the place of its session file was no regular file",
        SessionReason.UNREADABLE: "its session file may not be read",
        SessionReason.UNUSABLE: "it cannot be the name of a session file",
        SessionReason.NOT_KNOWN: "its session file has a form that this version does not know",
        SessionReason.NO_HOME: "it is not known where its engine keeps sessions",
        SessionReason.HOME_AWAY: "the home of its engine was not there, or empty",
        SessionReason.NOT_ANSWERED: "the system did not let its session file be looked at",
    }
)
"""Each reason as a clause, for people."""

INCONCLUSIVE: Final = frozenset(
    {
        SessionReason.NOT_KNOWN,
        SessionReason.NO_HOME,
        SessionReason.HOME_AWAY,
        SessionReason.NOT_ANSWERED,
    }
)
"""Reasons for UNKNOWN by themselves; with others nobody had seen the session before."""


@dataclass(frozen=True, slots=True)
class SessionFinding:
    """What a check said of one handle. `reason`: None where an earlier version did not record it,
    or a later one recorded one that is not known here."""

    verdict: SessionVerdict
    reason: SessionReason | None

    @property
    def holds(self) -> bool:
        """True when the matrix's HANDLE holds with it."""
        return self.verdict.holds


@dataclass(frozen=True, slots=True)
class SessionFingerprint:
    """What a session file was when a question was recorded: bytes, and when it was changed."""

    size: int
    mtime_ns: int

    def __str__(self) -> str:
        return f"{self.size} {self.mtime_ns}"

    @classmethod
    def read(cls, text: str | None) -> SessionFingerprint | None:
        """Return the mark that a text holds; None if there is none, or it cannot be read."""
        found = _MARK.fullmatch(text or "")
        return cls(int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHandle:
    """What a session is looked for by. `handle` is a secret, and was written by an agent."""

    handle: str = field(repr=False)
    workspace: Path
    fingerprint: SessionFingerprint | None = None


NOT_ANSWERED: Final = SessionFinding(SessionVerdict.UNKNOWN, SessionReason.NOT_ANSWERED)


@dataclass(frozen=True, slots=True)
class SessionCheck:
    """What looks at the sessions of one engine.

    Attributes:
        look: answers for many handles, in their order, one by one. It may block, also for ever.
        unknown: what the engine makes of a session that cannot be judged.
    """

    look: Callable[[Sequence[StoredHandle]], Iterable[SessionFinding]]
    unknown: UnknownSession = UnknownSession.KEEP

    @property
    def not_answered(self) -> SessionFinding:
        """What goes on record where it did not answer."""
        return apply_policy(NOT_ANSWERED, self.unknown)


def weaken_if_never_seen(
    finding: SessionFinding, mark: SessionFingerprint | None
) -> SessionFinding:
    """Return what a finding of a CLI's session is worth.

    Only of a session that was seen when its question was recorded, so that there is a mark, is it
    known to lie where we look: without one it may be whole, in a place that only the CLI knows (it
    works in another folder, or in a container). No place makes a handle usable.
    """
    lost = (
        finding.verdict is SessionVerdict.INVALID and finding.reason is not SessionReason.UNUSABLE
    )
    if lost and mark is None:
        return replace(finding, verdict=SessionVerdict.UNKNOWN)
    return finding


def apply_policy(finding: SessionFinding, unknown: UnknownSession) -> SessionFinding:
    """Return what goes on record: of a session that cannot be judged also what that means."""
    if finding.verdict is SessionVerdict.UNKNOWN and unknown is UnknownSession.FAIL:
        return replace(finding, verdict=SessionVerdict.UNKNOWN_REFUSED)
    return finding
