"""The results of a session check, and what each means for the run. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Final

from runrecovery_service.lazy_dataclass import dataclass

_FINGERPRINT: Final = re.compile(r"([0-9]{1,19}) (-?[0-9]{1,19})")


class SessionVerdict(StrEnum):
    """The recorded answer to the question whether the session of a run can be resumed."""

    VALID = "VALID"
    INVALID = "INVALID"
    UNKNOWN = "UNKNOWN"
    """The check could not decide. The session counts as valid."""
    UNKNOWN_REFUSED = "UNKNOWN_REFUSED"
    """The check could not decide. The session counts as lost: `unknown_session` is "fail"."""

    @property
    def holds(self) -> bool:
        """True if the fact HANDLE of the matrix is true with this verdict."""
        return self not in LOST


LOST: Final = frozenset({SessionVerdict.INVALID, SessionVerdict.UNKNOWN_REFUSED})


class UnknownSession(StrEnum):
    """The policy for a session whose check could not decide."""

    KEEP = "keep"
    FAIL = "fail"


class SessionReason(StrEnum):
    """The reason for a verdict. It contains no part of the session or of its handle."""

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
        SessionReason.ELSEWHERE: "its session file belonged to another session or workspace",
        SessionReason.NOT_A_FILE: "its session file was not a regular file",
        SessionReason.UNREADABLE: "the service may not read its session file",
        SessionReason.UNUSABLE: "its handle cannot be part of the name of a session file",
        SessionReason.NOT_KNOWN: "its session file has a format that this version does not know",
        SessionReason.NO_HOME: "the folder in which its engine keeps sessions is not known",
        SessionReason.HOME_AWAY: "the home folder of its engine was missing or empty",
        SessionReason.NOT_ANSWERED: "the system did not answer when its session file was read",
    }
)
"""Each reason as a clause for people, in which "its" refers to the run."""

INCONCLUSIVE: Final = frozenset(
    {
        SessionReason.NOT_KNOWN,
        SessionReason.NO_HOME,
        SessionReason.HOME_AWAY,
        SessionReason.NOT_ANSWERED,
    }
)
"""Reasons that alone make a session UNKNOWN. With any other reason, a session is UNKNOWN because it
had never been seen before."""


@dataclass(frozen=True, slots=True)
class SessionFinding:
    """The result of the check of one handle.

    `reason` is None if an earlier version recorded none, or if this version does not know it.
    """

    verdict: SessionVerdict
    reason: SessionReason | None

    @property
    def holds(self) -> bool:
        """True if the fact HANDLE of the matrix is true with this finding."""
        return self.verdict.holds


@dataclass(frozen=True, slots=True)
class SessionFingerprint:
    """Size in bytes and modification time of a session file when its question was recorded."""

    size: int
    mtime_ns: int

    def __str__(self) -> str:
        return f"{self.size} {self.mtime_ns}"

    @classmethod
    def read(cls, text: str | None) -> SessionFingerprint | None:
        """Return the fingerprint of a stored text; None if there is none or it cannot be read."""
        found = _FINGERPRINT.fullmatch(text or "")
        return cls(int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredHandle:
    """A session to check. `handle` is a secret that an agent has written.

    `in_turn`: whether the agent was killed in a turn that is to be resumed, so that the end of the
    session's file can be incomplete.
    """

    handle: str = field(repr=False)
    workspace: Path
    fingerprint: SessionFingerprint | None = None
    in_turn: bool = False


NOT_ANSWERED: Final = SessionFinding(SessionVerdict.UNKNOWN, SessionReason.NOT_ANSWERED)


@dataclass(frozen=True, slots=True)
class SessionCheck:
    """The session check of one engine.

    Attributes:
        run: checks many handles and yields one finding for each, in order. It can block for ever.
        unknown: whether a session that the check could not decide about counts as valid.
    """

    run: Callable[[Sequence[StoredHandle]], Iterable[SessionFinding]]
    unknown: UnknownSession = UnknownSession.KEEP

    @property
    def not_answered(self) -> SessionFinding:
        """The finding to record if the check did not answer."""
        return apply_policy(NOT_ANSWERED, self.unknown)


def weaken_if_never_seen(
    finding: SessionFinding, fingerprint: SessionFingerprint | None
) -> SessionFinding:
    """Return UNKNOWN instead of INVALID for a session that was never seen.

    A session with a fingerprint was seen in the expected place when its question was recorded. A
    session without a fingerprint can be intact in a place that only the CLI knows, because the CLI
    works in another folder or in a container. An unusable handle stays INVALID in any place.
    """
    lost = (
        finding.verdict is SessionVerdict.INVALID and finding.reason is not SessionReason.UNUSABLE
    )
    if lost and fingerprint is None:
        return replace(finding, verdict=SessionVerdict.UNKNOWN)
    return finding


def apply_policy(finding: SessionFinding, unknown: UnknownSession) -> SessionFinding:
    """Return the finding to record: UNKNOWN becomes UNKNOWN_REFUSED if the engine says "fail"."""
    if finding.verdict is SessionVerdict.UNKNOWN and unknown is UnknownSession.FAIL:
        return replace(finding, verdict=SessionVerdict.UNKNOWN_REFUSED)
    return finding
