"""Looks at session files, in bulk. They lie where agents write: anything may be in their place."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Protocol

import structlog

from runrecovery_service.domain.session_check import (
    SessionFinding,
    SessionFingerprint,
    SessionReason,
    SessionVerdict,
    StoredHandle,
)
from runrecovery_service.engines.sessions.folders import NotKnown, Once, is_away
from runrecovery_service.engines.sessions.lines import (
    FOUND,
    Excerpt,
    Layout,
    is_uuid,
    judge,
)

FIRST_READ: Final = 32 * 1024
"""Bytes of the beginning and of the end: Codex begins with its instructions, some 21 KiB."""
MOST_READ: Final = 1024**2
"""Bytes of a first or last line; a longer one is not judged."""

log = structlog.get_logger()

_REASON_OF: Final[Mapping[int, SessionReason]] = {
    errno.ENOENT: SessionReason.MISSING,
    errno.ENOTDIR: SessionReason.MISSING,
    errno.EACCES: SessionReason.UNREADABLE,
    errno.EPERM: SessionReason.UNREADABLE,
    errno.ENXIO: SessionReason.NOT_A_FILE,  # a socket
    errno.ENAMETOOLONG: SessionReason.UNUSABLE,
}


class SessionStore(Protocol):
    """Where an engine keeps its sessions."""

    def look(self, handles: Sequence[StoredHandle]) -> Iterator[SessionFinding]:
        """Say of each handle, one by one, whether it can be resumed by. Blocking."""


class Finder(Protocol):
    """Finds session files; lives as long as one bulk, and may remember folders for it."""

    def places(self, stored: StoredHandle) -> Iterator[Path]:
        """Yield where the session may lie, the likeliest first.

        Raises:
            OSError: it cannot be told.
        """


def reason_of(error: OSError) -> SessionReason:
    """Return what an error says of a session: NOT_ANSWERED where it says nothing of it."""
    return _REASON_OF.get(error.errno or 0, SessionReason.NOT_ANSWERED)


# -- engines that name a file ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NamedFiles:
    """Sessions in files of a form that we do not know: they must be there and hold something.

    `place` gives the file of a session; None: its handle cannot be a part of a path.
    """

    place: Callable[[StoredHandle], Path | None]

    def look(self, handles: Sequence[StoredHandle]) -> Iterator[SessionFinding]:
        """Look for each file."""
        for stored in handles:
            yield FOUND[self._look(stored)]

    def _look(self, stored: StoredHandle) -> SessionReason:
        path = self.place(stored)
        if path is None:
            return SessionReason.UNUSABLE
        try:
            found = path.stat()
        except OSError as error:
            return reason_of(error)
        if not stat.S_ISREG(found.st_mode):
            return SessionReason.NOT_A_FILE
        return SessionReason.PRESENT if found.st_size else SessionReason.EMPTY


# -- CLIs that we know -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionObservation:
    """What was seen of a session.

    Attributes:
        finding: what a check says of it.
        mark: what its file is now; None: it has none, or one that a check would refuse.
    """

    finding: SessionFinding
    mark: SessionFingerprint | None


_MISSING: Final = SessionObservation(FOUND[SessionReason.MISSING], None)


@dataclass(frozen=True, slots=True)
class CliSessions:
    """The sessions of a CLI, in files that it only appends to. Whatever lies in their place, it
    is told in a finding: nothing that is found there is an error.

    Attributes:
        home: where the CLI has its home; None: that is not known.
        finder: begins a bulk; None: as `home`.
    """

    home: Path | None
    finder: Callable[[], Finder] | None
    layout: Layout

    def look(self, handles: Sequence[StoredHandle]) -> Iterator[SessionFinding]:
        """Find and judge each file; of one that is as it was when it was marked, only its size
        and time."""
        looks = self._looks()
        for stored in handles:
            yield looks.see(stored).finding

    def check(self, handles: Sequence[StoredHandle]) -> list[SessionFinding]:
        """Look at all of them."""
        return list(self.look(handles))

    def see(self, stored: StoredHandle) -> SessionObservation:
        """Look at one session, and mark it. Call it once nothing writes to it any more."""
        return self._looks().see(stored)

    def _looks(self) -> _Looks:
        return _Looks(self.home, self.finder() if self.finder else None, self.layout)


@dataclass(slots=True)
class _Looks:
    """One bulk."""

    home: Path | None
    finder: Finder | None
    layout: Layout
    _home_is_away: Once[bool] = field(default_factory=Once)
    _told: set[str] = field(default_factory=set)

    def see(self, stored: StoredHandle) -> SessionObservation:
        """Look at one session. A defect here must not stop a recovery, now and at every start."""
        try:
            return self._see(stored)
        except OSError as error:
            return SessionObservation(FOUND[reason_of(error)], None)
        except NotKnown:
            return SessionObservation(FOUND[SessionReason.NOT_KNOWN], None)
        except Exception as error:  # noqa: BLE001 - what agents write must not do more than this
            name = type(error).__name__
            if name not in self._told:
                self._told.add(name)
                log.warning("sessions.look_failed", error=name)
            return SessionObservation(FOUND[SessionReason.NOT_ANSWERED], None)

    def _see(self, stored: StoredHandle) -> SessionObservation:
        if self.home is None or self.finder is None:
            return SessionObservation(FOUND[SessionReason.NO_HOME], None)
        if not is_uuid(stored.handle):
            return SessionObservation(FOUND[SessionReason.UNUSABLE], None)
        # The CLI asks the kernel where it is, which knows no links.
        stored = replace(stored, workspace=Path(os.path.realpath(stored.workspace)))
        seen = self._find(self.finder, stored)
        return self._of_home(self.home) if seen.finding.reason is SessionReason.MISSING else seen

    def _find(self, finder: Finder, stored: StoredHandle) -> SessionObservation:
        """Return what is seen at the first place with a session to go on with, else at the first
        with anything."""
        best = _MISSING
        try:
            for place in finder.places(stored):
                seen = _look(place, stored, self.layout)
                if seen.finding.verdict is SessionVerdict.VALID:
                    return seen
                if best.finding.reason is SessionReason.MISSING:
                    best = seen
        except (OSError, NotKnown):
            if best is _MISSING:
                raise
        return best

    def _of_home(self, home: Path) -> SessionObservation:
        """Return what it says of a session that it is missing: nothing where all is missing."""
        try:
            away = self._home_is_away.get(home, lambda: is_away(home))
        except OSError:
            return SessionObservation(FOUND[SessionReason.NOT_ANSWERED], None)
        return SessionObservation(FOUND[SessionReason.HOME_AWAY], None) if away else _MISSING


def _look(path: Path, stored: StoredHandle, layout: Layout) -> SessionObservation:
    try:
        # Without waiting: it may be a pipe. Links are followed: whole homes are links in places.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return SessionObservation(FOUND[reason_of(error)], None)
    try:
        return _look_into(descriptor, path.suffix, stored, layout)
    except OSError as error:
        return SessionObservation(FOUND[reason_of(error)], None)
    finally:
        os.close(descriptor)


def _look_into(
    descriptor: int, suffix: str, stored: StoredHandle, layout: Layout
) -> SessionObservation:
    found = os.fstat(descriptor)
    now = SessionFingerprint(found.st_size, found.st_mtime_ns)
    if not stat.S_ISREG(found.st_mode):
        reason = SessionReason.NOT_A_FILE
    elif not now.size:
        reason = SessionReason.EMPTY
    elif suffix != ".jsonl":
        reason = SessionReason.NOT_KNOWN
    elif now == stored.fingerprint:
        reason = SessionReason.UNCHANGED
    elif stored.fingerprint is not None and now.size < stored.fingerprint.size:
        reason = SessionReason.CUT_OFF
    else:
        reason = judge(_excerpt(descriptor, now.size, stored.fingerprint), stored, layout)
    finding = FOUND[reason]
    return SessionObservation(finding, None if finding.verdict is SessionVerdict.INVALID else now)


def _excerpt(descriptor: int, size: int, mark: SessionFingerprint | None) -> Excerpt:
    head = _head(descriptor, size)
    end = _end(descriptor, size, mark)
    if end <= len(head):
        return Excerpt(head, head[:end], tail_is_all=True)
    tail = _tail(descriptor, end)
    return Excerpt(head, tail, tail_is_all=len(tail) == end)


def _head(descriptor: int, size: int) -> bytes:
    head = os.pread(descriptor, FIRST_READ, 0)
    if b"\n" not in head and len(head) < min(size, MOST_READ):
        return os.pread(descriptor, MOST_READ, 0)
    return head


def _end(descriptor: int, size: int, mark: SessionFingerprint | None) -> int:
    """Return where the file ended when it was marked. What was added since is of a turn that was
    cut off, and need not be whole. Not if no line ends there: then it has been written anew."""
    if mark is not None and mark.size < size and os.pread(descriptor, 1, mark.size - 1) == b"\n":
        return mark.size
    return size


def _tail(descriptor: int, end: int) -> bytes:
    """Read the end, and further back until it holds one whole line."""
    for most in (FIRST_READ, MOST_READ):
        begin = max(0, end - most)
        tail = os.pread(descriptor, end - begin, begin)
        if not begin or b"\n" in tail[:-1]:
            break
    return tail
