"""Replaces the content of a file that other programs read and write as well.

No reader sees a half-written file, and edits by several services on this host never lose each
other. A new file is created without a race.

One race remains with a program that does not acquire our lock. The program may replace or write the
file between our last read and the replacement, some ten microseconds later. Or it may have opened
the file before and write to it afterwards. Its text is then lost, as between any two writers of
such a file. In the first case no copy of that text exists.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, Protocol, TypeVar

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.trust.errors import (
    TrustFileBusy,
    TrustFileOutOfReach,
    TrustFileUnusable,
    UnusableReason,
)
from runrecovery_service.trust.locks import lock, read_token

MAX_BYTES: Final = 32 << 20
"""The largest file that is edited: twice the limit for adding an entry, so that an entry can be
removed from a file that grew."""
BACKUPS: Final = 3
"""Number of earlier versions that are kept."""
TRIES: Final = 12
"""Number of tries while others write the file."""
SETTLED_READS: Final = 4
"""Number of equal reads after which a file counts as absent, empty or not parsable. Some CLIs empty
their file before they write it, and editors rename it away first. Such a moment must not count."""
LOCK_WAIT_S: Final = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.1


class Change(Protocol):
    """The decision of an edit, such as `entry.Edit` or `entry.Removal`."""

    @property
    def text(self) -> bytes | None:
        """The new content of the file; None: no file."""
        ...


_Change = TypeVar("_Change", bound=Change)


def edit(
    path: Path,
    decide: Callable[[bytes | None], _Change],
    *,
    begin: Callable[[str | None], object] = lambda _: None,
    record: Callable[[_Change], object] = lambda _: None,
    done: Callable[[_Change], object] = lambda _: None,
    make: bool = True,
    lock_wait_s: float = LOCK_WAIT_S,
    pause: Callable[[float], object] = time.sleep,
) -> _Change:
    """Make the change to a file that `decide` returns, and return it. Blocks: call it in a thread.

    A crash leaves either the old or the new file. A symbolic link stays, and its target is changed.
    Mode, owner, group and, if the system allows it, extended attributes stay. Missing parent
    folders are created with mode 0700, and are not removed.

    An exception of one of the callables is passed on. The file is then unchanged, except for
    exceptions of `done`.

    Args:
        decide: returns the change for the file's content (None: no file). It is called again if
            another program has written meanwhile.
        begin: called once, under the lock, before the first decision, with the lock's token; with
            None if there is no lock.
        record: called with each decision before the file is written, so that an entry is recorded
            before it exists. A crash in between leaves a record without an entry, whose removal
            does no harm.
        done: called once with the decision when the file has the new content, also if nothing had
            to be written. The lock is still held, so `done` cannot delete the record of the next
            edit. Without a parent folder there is no lock.
        make: whether the lock file and its folder may be created. If False and there is no lock
            file, this service has written no entry: `decide` is called once, with None, and must
            return a change without text.
        pause: waits for other programs.

    Raises:
        TrustFileUnusable: the file cannot be edited safely, and is unchanged.
        TrustFileBusy: others hold the lock or write all the time; the file is unchanged.
        TrustFileOutOfReach: the system refused; the file is unchanged.
    """
    target = _resolve(path)
    if not _must_lock(target, make=make):
        begin(None)
        change = decide(None)
        if change.text is None:
            record(change)
            done(change)
            return change
    with _system_errors(target.parent):
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with lock(lock_file(target), wait_s=lock_wait_s, pause=pause) as here:
        with _system_errors(target):
            _remove_leftovers(target)
        begin(here)
        change = _edit_locked(path, target, decide, record, _Retries(target, pause))
        done(change)
        return change


def _must_lock(target: Path, *, make: bool) -> bool:
    needed = target.parent if make else lock_file(target)
    with _system_errors(needed):
        return needed.exists()


def token_of(target: Path) -> str | None:
    """Return the token that an edit passes to `begin`; None if the file was never edited.

    This acquires no lock.
    """
    return read_token(lock_file(target))


def lock_file(target: Path) -> Path:
    """Return the lock file of a file (which must not be a link)."""
    return Path(f"{_stem(target)}.lock")


def backup_file(target: Path, age: int) -> Path:
    """Return the path of an earlier version of a file; age 1 is the latest."""
    return Path(f"{_stem(target)}.{age}.bak")


def _stem(target: Path) -> Path:
    """Return the common beginning of the paths of our files for this target."""
    return target.parent / f".runrecovery.{target.name}"


def _temporary(target: Path) -> Path:
    return Path(f"{_stem(target)}.{secrets.token_hex(8)}.tmp")


def _resolve(path: Path) -> Path:
    """Return the path with all links resolved. A circle of links fails later, at the open."""
    return Path(os.path.realpath(path))


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        detail = error.strerror or str(error)
        raise TrustFileOutOfReach(path, error.errno or 0, detail) from error


def _remove_leftovers(target: Path) -> None:
    """Remove temporary files of killed edits: a living edit would hold the lock."""
    stem = _stem(target)
    with os.scandir(stem.parent) as entries:
        names = [each.name for each in entries]
    ours = re.compile(re.escape(stem.name) + r"\.[0-9a-f]{16}\.tmp")
    for name in names:
        if ours.fullmatch(name):
            (stem.parent / name).unlink(missing_ok=True)


# -- reading ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """The status by which a replaced or changed file is noticed."""

    device: int
    inode: int
    size: int
    mtime_ns: int
    ctime_ns: int
    mode: int
    uid: int
    gid: int

    @classmethod
    def of(cls, status: os.stat_result) -> _State:
        return cls(
            device=status.st_dev,
            inode=status.st_ino,
            size=status.st_size,
            mtime_ns=status.st_mtime_ns,
            ctime_ns=status.st_ctime_ns,
            mode=stat.S_IMODE(status.st_mode),
            uid=status.st_uid,
            gid=status.st_gid,
        )


@dataclass(frozen=True, slots=True)
class _Snapshot:
    """A file as it was read. Both attributes are None if there was no file."""

    state: _State | None = None
    data: bytes | None = None


def _read(target: Path) -> _Snapshot:
    """Read the file. Never wait, even if it is a pipe.

    Raises:
        TrustFileUnusable: not a regular file, a file with a second name, or too large.
        OSError: the file cannot be read.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(target, flags)
    except FileNotFoundError:
        return _Snapshot()
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise TrustFileUnusable(UnusableReason.NOT_REGULAR, "not a regular file")
        if status.st_nlink > 1:
            raise TrustFileUnusable(UnusableReason.LINKED, f"the file has {status.st_nlink} names")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(MAX_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MAX_BYTES:
        raise TrustFileUnusable(UnusableReason.TOO_LARGE, f"more than {MAX_BYTES} bytes")
    return _Snapshot(_State.of(status), data)


def _state(target: Path) -> _State | None:
    try:
        return _State.of(os.lstat(target))
    except FileNotFoundError:
        return None


class _Retries:
    """Waits for programs that write the file, a limited number of times."""

    def __init__(self, target: Path, pause: Callable[[float], object]) -> None:
        self._target = target
        self._pause = pause
        self._tries = 0
        self._seen: _Snapshot | None = None
        self._same_reads = 0

    def again(self) -> None:
        """Wait a little, longer each time.

        Raises:
            TrustFileBusy: the limit of tries is reached.
        """
        self._tries += 1
        if self._tries == TRIES:
            raise TrustFileBusy(self._target, f"others wrote the file during {TRIES} tries")
        self._pause(min(_FIRST_PAUSE_S * 2 ** (self._tries - 1), _LONGEST_PAUSE_S))

    def may_change(self, seen: _Snapshot) -> bool:
        """Return whether another program could be writing the file now; if so, wait first."""
        self._same_reads = self._same_reads + 1 if seen == self._seen else 1
        self._seen = seen
        if self._same_reads == SETTLED_READS:
            return False
        self.again()
        return True


# -- changing --------------------------------------------------------------------------------------


def _edit_locked(
    path: Path,
    target: Path,
    decide: Callable[[bytes | None], _Change],
    record: Callable[[_Change], object],
    retries: _Retries,
) -> _Change:
    while True:
        with _system_errors(target):
            seen = _read(target)
        try:
            if not seen.data and retries.may_change(seen):
                continue
            change = decide(seen.data)
        except TrustFileUnusable as error:
            unsettled = error.reason in {UnusableReason.NOT_PARSABLE, UnusableReason.NOT_UTF8}
            if unsettled and retries.may_change(seen):
                continue
            raise
        record(change)
        if change.text == seen.data:
            return change
        if _resolve(path) != target:
            raise TrustFileBusy(path, "the target of the link has just changed")
        with _system_errors(target):
            if _replace(target, seen, change.text):
                return change
        retries.again()


def _replace(target: Path, seen: _Snapshot, text: bytes | None) -> bool:
    """Replace the file. Return False if it has changed since it was read; nothing is done then."""
    if seen.state is not None and not seen.state.mode & 0o222:
        raise TrustFileUnusable(UnusableReason.READ_ONLY, "its mode lets nobody write it")
    new = _temporary(target)
    old = _temporary(target)
    try:
        if text is not None:
            _write(new, text, like=seen.state, attributes_of=target)
        if seen.data is not None:
            _write(old, seen.data, like=seen.state, max_mode=0o600)
        if _read(target) != seen:
            return False
        if not _swap(new if text is not None else None, target, seen.state):
            return False
        # The file is replaced. A later failure, for example of the disk, must not hide that.
        with suppress(OSError):
            _sync_folder(target.parent)
        with suppress(OSError):
            _rotate_backups(old, target)
    finally:
        for left in (new, old):
            with suppress(OSError):
                left.unlink(missing_ok=True)
    return True


def _swap(new: Path | None, target: Path, expected: _State | None) -> bool:
    """Move the new file (None: none) to the target if that is still as expected."""
    if expected is None and new is not None:
        return _create(new, target)
    # Nothing may come between these two calls: a write in between is lost.
    if _state(target) != expected:
        return False
    if new is None:
        target.unlink()
    else:
        new.replace(target)
    return True


def _create(new: Path, target: Path) -> bool:
    """Give a new file its name, unless another program was first."""
    try:
        os.link(new, target)
    except FileExistsError:
        return False
    except OSError:  # not every file system has hard links
        if os.path.lexists(target):
            return False
        new.replace(target)
        return True
    new.unlink()  # a crash before this leaves two names; the next edit removes this one
    return True


def _write(
    path: Path,
    data: bytes,
    *,
    like: _State | None,
    max_mode: int = 0o7777,
    attributes_of: Path | None = None,
) -> None:
    """Write and sync a new file with the owner and the mode of another.

    Raises:
        TrustFileUnusable: the new file cannot get that owner.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    with open(descriptor, "wb") as file:  # noqa: PTH123 - it is open already
        file.write(data)
        file.flush()
        if like is not None:
            mode = like.mode & max_mode
            _set_owner(descriptor, like, mode)
            if attributes_of is not None:
                _copy_attributes(attributes_of, descriptor)
            os.fchmod(descriptor, mode)  # after a change of owner, which clears bits
        os.fsync(descriptor)


def _set_owner(descriptor: int, like: _State, mode: int) -> None:
    status = os.fstat(descriptor)
    if (status.st_uid, status.st_gid) == (like.uid, like.gid):
        return
    try:
        os.fchown(descriptor, like.uid, like.gid)
    except PermissionError:
        # The group does not matter if it has no permission on the file.
        if status.st_uid == like.uid and not mode & 0o070:
            return
        raise TrustFileUnusable(
            UnusableReason.OWNER_LOST,
            f"the service may not give a file to its owner {like.uid}:{like.gid}",
        ) from None


def _copy_attributes(source: Path, descriptor: int) -> None:
    """Copy access lists, labels and other attributes, as far as the system allows it."""
    if sys.platform != "linux":
        return
    with suppress(OSError):
        for name in os.listxattr(source, follow_symlinks=False):
            with suppress(OSError):
                os.setxattr(descriptor, name, os.getxattr(source, name, follow_symlinks=False))


def _rotate_backups(old: Path, target: Path) -> None:
    """Make the earlier version the first backup, and each other backup one older."""
    if not old.exists():
        return
    for age in range(BACKUPS, 1, -1):
        with suppress(FileNotFoundError):
            backup_file(target, age - 1).replace(backup_file(target, age))
    old.replace(backup_file(target, 1))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
