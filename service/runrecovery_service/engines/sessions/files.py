"""Checks session files, in batches.

Agents can write in the folders of these files. So any file can have been replaced, for example by a
pipe or a link.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import field, replace
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
from runrecovery_service.domain.usage import StoredUsage
from runrecovery_service.engines.sessions.folders import Cache, NotKnown, is_away
from runrecovery_service.engines.sessions.lines import (
    FOUND,
    Excerpt,
    Layout,
    is_uuid,
    judge_excerpt,
)
from runrecovery_service.engines.sessions.repair import History, Repair, repair
from runrecovery_service.engines.sessions.stored_usage import Ledger, UsageNotKnown, UsageReader
from runrecovery_service.lazy_dataclass import dataclass

FIRST_READ: Final = 32 * 1024
"""How many bytes are read first, at the beginning and at the end. Codex begins with some 21 KiB."""
MAX_READ: Final = 1024**2
"""The longest first or last line that is parsed, in bytes."""

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
    """The sessions of an engine."""

    def check(self, handles: Sequence[StoredHandle]) -> Iterator[SessionFinding]:
        """Yield for each handle, one by one, whether its session can be resumed. Blocks."""


class Finder(Protocol):
    """Finds the session files of one batch. It can cache the content of folders for the batch."""

    def paths(self, stored: StoredHandle) -> Iterator[Path]:
        """Yield the paths at which the session can be, the likeliest first.

        Raises:
            OSError: a folder cannot be read.
        """


def reason_of(error: OSError) -> SessionReason:
    """Return the reason for an error: NOT_ANSWERED if the error is not about the session."""
    return _REASON_OF.get(error.errno or 0, SessionReason.NOT_ANSWERED)


# -- engines that name a file ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NamedFiles:
    """Sessions in files of an unknown format, which must exist and must not be empty.

    `path_of` returns the file of a session, or None if its handle cannot be a part of a path.
    """

    path_of: Callable[[StoredHandle], Path | None]

    def check(self, handles: Sequence[StoredHandle]) -> Iterator[SessionFinding]:
        """Yield whether each file exists and is not empty."""
        for stored in handles:
            yield FOUND[self._check_one(stored)]

    def _check_one(self, stored: StoredHandle) -> SessionReason:
        path = self.path_of(stored)
        if path is None:
            return SessionReason.UNUSABLE
        try:
            found = path.stat()
        except OSError as error:
            return reason_of(error)
        if not stat.S_ISREG(found.st_mode):
            return SessionReason.NOT_A_FILE
        return SessionReason.PRESENT if found.st_size else SessionReason.EMPTY


# -- known CLIs --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SessionObservation:
    """The observed state of a session.

    Attributes:
        finding: the result of the check.
        fingerprint: that of the file now. None: there is no file, or the check refused it.
    """

    finding: SessionFinding
    fingerprint: SessionFingerprint | None


_MISSING: Final = SessionObservation(FOUND[SessionReason.MISSING], None)


@dataclass(frozen=True, slots=True)
class CliSessions:
    """The sessions of a CLI, in files to which the CLI only appends.

    For a damaged or replaced file, a check returns a finding and never raises an error.

    Attributes:
        home: the home folder of the CLI; None: not known.
        finder: returns a finder for one batch; None: `home` is not known.
        history: finds the repairs that a session needs before it is resumed; None: sessions of this
            CLI need no repair.
        ledger: adds up the usage in the files; None: the files have no known usage.
    """

    home: Path | None
    finder: Callable[[], Finder] | None
    layout: Layout
    history: History | None = None
    ledger: Ledger | None = None

    def check(self, handles: Sequence[StoredHandle]) -> Iterator[SessionFinding]:
        """Find and check each file. A file with an unchanged fingerprint is not read."""
        batch = self._new_batch()
        for stored in handles:
            yield batch.observe(stored).finding

    def observe(self, stored: StoredHandle) -> SessionObservation:
        """Check one session, and return its fingerprint too. No process must be writing to it."""
        return self._new_batch().observe(stored)

    def repair(self, stored: StoredHandle, given_up: threading.Event) -> list[Repair]:
        """Repair the files of one session. Before `given_up` is set, no process must write to them.

        Raises:
            NotRepairable, OSError, NotKnown: a file could not be repaired, and is unchanged.
        """
        if self.history is None or self.finder is None or not is_uuid(stored.handle):
            return []
        stored = replace(stored, workspace=Path(os.path.realpath(stored.workspace)))
        repairs = [repair(path, self.history, given_up) for path in self.finder().paths(stored)]
        return [each for each in repairs if each is not None]

    def read_usage(self, stored: StoredHandle, output: Path) -> StoredUsage:
        """Return the usage of the calls in a session. No process must be writing to its files.

        Args:
            output: the stored standard output of the CLI from all turns of the session.

        Raises:
            UsageNotKnown, OSError, NotKnown: the usage cannot be read.
        """
        if self.ledger is None or self.finder is None or not is_uuid(stored.handle):
            raise UsageNotKnown("unusable")
        stored = replace(stored, workspace=Path(os.path.realpath(stored.workspace)))
        reader = UsageReader(self.layout, self.ledger)
        return reader.read(self.finder().paths(stored), stored, output)

    def _new_batch(self) -> _Batch:
        return _Batch(self.home, self.finder() if self.finder else None, self.layout)


@dataclass(slots=True)
class _Batch:
    """The check of many sessions, with shared caches."""

    home: Path | None
    finder: Finder | None
    layout: Layout
    _home_is_away: Cache[bool] = field(default_factory=Cache)
    _logged: set[str] = field(default_factory=set)

    def observe(self, stored: StoredHandle) -> SessionObservation:
        """Observe one session. A defect must not stop a recovery: it would stop every later one."""
        try:
            return self._observe(stored)
        except OSError as error:
            return SessionObservation(FOUND[reason_of(error)], None)
        except NotKnown:
            return SessionObservation(FOUND[SessionReason.NOT_KNOWN], None)
        except Exception as error:  # noqa: BLE001 - a file that agents write must do no more harm
            name = type(error).__name__
            if name not in self._logged:
                self._logged.add(name)
                log.warning("sessions.look_failed", error=name)
            return SessionObservation(FOUND[SessionReason.NOT_ANSWERED], None)

    def _observe(self, stored: StoredHandle) -> SessionObservation:
        if self.home is None or self.finder is None:
            return SessionObservation(FOUND[SessionReason.NO_HOME], None)
        if not is_uuid(stored.handle):
            return SessionObservation(FOUND[SessionReason.UNUSABLE], None)
        # The CLI asks the kernel for its working directory, which contains no links.
        stored = replace(stored, workspace=Path(os.path.realpath(stored.workspace)))
        seen = self._find(self.finder, stored)
        return self._missing_in(self.home) if seen.finding.reason is SessionReason.MISSING else seen

    def _find(self, finder: Finder, stored: StoredHandle) -> SessionObservation:
        """Return the first valid session, else the first file, else MISSING."""
        best = _MISSING
        try:
            for path in finder.paths(stored):
                seen = _observe_file(path, stored, self.layout)
                if seen.finding.verdict is SessionVerdict.VALID:
                    return seen
                if best.finding.reason is SessionReason.MISSING:
                    best = seen
        except (OSError, NotKnown):
            if best is _MISSING:
                raise
        return best

    def _missing_in(self, home: Path) -> SessionObservation:
        """Return MISSING, or HOME_AWAY if the whole home is missing."""
        try:
            away = self._home_is_away.get(home, lambda: is_away(home))
        except OSError:
            return SessionObservation(FOUND[SessionReason.NOT_ANSWERED], None)
        return SessionObservation(FOUND[SessionReason.HOME_AWAY], None) if away else _MISSING


def _observe_file(path: Path, stored: StoredHandle, layout: Layout) -> SessionObservation:
    try:
        # Do not wait, because the file can be a pipe. Follow links: some home folders are links.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return SessionObservation(FOUND[reason_of(error)], None)
    try:
        return _observe_open_file(descriptor, path.suffix, stored, layout)
    except OSError as error:
        return SessionObservation(FOUND[reason_of(error)], None)
    finally:
        os.close(descriptor)


def _observe_open_file(
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
        reason = judge_excerpt(_excerpt(descriptor, now.size, stored.fingerprint), stored, layout)
        if reason is SessionReason.CUT_OFF and stored.in_turn:
            reason = SessionReason.PRESENT
    finding = FOUND[reason]
    return SessionObservation(finding, None if finding.verdict is SessionVerdict.INVALID else now)


def _excerpt(descriptor: int, size: int, fingerprint: SessionFingerprint | None) -> Excerpt:
    head = _head(descriptor, size)
    end = _end(descriptor, size, fingerprint)
    if end <= len(head):
        return Excerpt(head, head[:end], tail_is_all=True)
    tail = _tail(descriptor, end)
    return Excerpt(head, tail, tail_is_all=len(tail) == end)


def _head(descriptor: int, size: int) -> bytes:
    head = os.pread(descriptor, FIRST_READ, 0)
    if b"\n" not in head and len(head) < min(size, MAX_READ):
        return os.pread(descriptor, MAX_READ, 0)
    return head


def _end(descriptor: int, size: int, fingerprint: SessionFingerprint | None) -> int:
    """Return where the checked part of the file ends: at the recorded size, or at the file's end.

    Lines after the recorded size belong to an interrupted turn and can be incomplete. If no line
    ends at the recorded size, the file was written again as a whole, and its present end counts.
    """
    if fingerprint is None or fingerprint.size >= size:
        return size
    ends_line = os.pread(descriptor, 1, fingerprint.size - 1) == b"\n"
    return fingerprint.size if ends_line else size


def _tail(descriptor: int, end: int) -> bytes:
    """Return the last bytes before `end`, with at least one complete line unless it is too long."""
    for most in (FIRST_READ, MAX_READ):
        begin = max(0, end - most)
        tail = os.pread(descriptor, end - begin, begin)
        if not begin or b"\n" in tail[:-1]:
            break
    return tail
