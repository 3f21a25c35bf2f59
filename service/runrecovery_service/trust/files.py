"""Puts a new text in the place of a file that other programs read and write as well.

What stays possible: somebody who does not take our lock replaces or writes the file between our
last look at it and the replacement, which are the next system calls (some ten microseconds), or
has opened it before that and writes into it afterwards. His text is then lost, as it would be
between any two writers of such a file; in the first case a copy of it is nowhere. No reader sees a
torn file from us, and our own edits, by however many services on this host, never lose each other.
A file that was not there is made without that gap.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

from runrecovery_service.trust.errors import (
    TrustFileBusy,
    TrustFileOutOfReach,
    TrustFileUnusable,
    UnusableReason,
)
from runrecovery_service.trust.locks import locked, token

MOST_BYTES: Final = 32 << 20
"""Twice what an entry is put into: a file that grew since must let it go again."""
BACKUPS: Final = 3
"""Earlier versions that are kept."""
TRIES: Final = 12
"""Looks at the file, because somebody wrote meanwhile or may be writing, before it is given up."""
SETTLED_LOOKS: Final = 4
"""Looks at a file that stays absent, empty or not parsable before it is taken for that: some CLIs
empty their file and then write it, editors rename it away and write another, and what is seen in
between is no state of it."""
LOCK_WAIT_S: Final = 10.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.01, 0.1


class Change(Protocol):
    """What an edit decides: `entry.Edit` and `entry.Removal` are such."""

    @property
    def text(self) -> bytes | None:
        """What the file shall hold; None: it shall not be there."""
        ...


_Change = TypeVar("_Change", bound=Change)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where our own files go.

    Attributes:
        locks: a folder for lock files; None: beside the file. All services that edit one file
            must say the same here, else they do not see each other.
        backups: a folder for earlier versions; None: beside the file.
    """

    locks: Path | None = None
    backups: Path | None = None


BESIDE: Final = Places()


def edit(
    path: Path,
    decide: Callable[[bytes | None], _Change],
    *,
    begin: Callable[[str | None], object] = lambda _: None,
    record: Callable[[_Change], object] = lambda _: None,
    done: Callable[[_Change], object] = lambda _: None,
    places: Places = BESIDE,
    make: bool = True,
    lock_wait_s: float = LOCK_WAIT_S,
    pause: Callable[[float], object] = time.sleep,
) -> _Change:
    """Change a file as `decide` says, and return what it said. Blocks: call it in a thread.

    A crash at any point leaves the old file or the new one. A symbolic link stays, and what it
    leads to is changed. Mode, owner, group and, where the system lets us, extended attributes
    stay. Folders on the way that do not exist are made (mode 0700), and are left.

    Args:
        decide: from the file's bytes (None: no file) to the change. It is called again whenever
            somebody else has written meanwhile. What it raises comes through.
        begin: called once, under the lock and before the first decision, with the token of the
            place (see `locks`); None: there is no lock.
        record: called with each decision before anything is written, so that what was added is on
            record before it is there. After a crash in between there is a record of something
            that is not there; to remove that is harmless. What it raises comes through.
        done: called once, with what came about, when the file holds it: also when nothing had to
            be written. The lock is still held, so that a record that goes there is not the one
            that the next edit makes. (Where the folder of the file does not exist there is no lock,
            and nothing of ours.) What it raises comes through, and the change stays.
        make: False: where the lock is not there, nothing of ours is: no file and no folder is made,
            and `decide`, asked once with None, must say None.
        pause: waits for others; what it raises comes through, and the file was not touched.

    Raises:
        TrustFileUnusable: the file cannot be edited safely; it was not touched.
        TrustFileBusy: others hold the lock, or write all the time; it was not touched.
        TrustFileOutOfReach: the system refused; it was not touched.
    """
    target = _followed(path)
    if not _is_there(target, places, make=make):
        begin(None)
        change = decide(None)
        if change.text is None:
            record(change)
            done(change)
            return change
    _make_folders(target, places)
    with locked(lock_file(target, places), wait_s=lock_wait_s, pause=pause) as here:
        with _asking_the_system(target):
            _clear_away(target, places)
        begin(here)
        change = _edit_locked(path, target, decide, record, places, _Patience(target, pause))
        done(change)
        return change


def _is_there(target: Path, places: Places, *, make: bool) -> bool:
    needed = target.parent if make else lock_file(target, places)
    with _asking_the_system(needed):
        return needed.exists()


def place_of(target: Path, places: Places = BESIDE) -> str | None:
    """Return the token of the place that a file is in, as an edit's `begin` gets it; None where
    nobody has edited it. Takes no lock."""
    return token(lock_file(target, places))


def lock_file(target: Path, places: Places = BESIDE) -> Path:
    """Return the lock of a file (the one that links lead to)."""
    return Path(f"{_stem(target, places.locks)}.lock")


def backup_file(target: Path, age: int, places: Places = BESIDE) -> Path:
    """Return where the `age`-th last version of a file is: 1 is the last."""
    return Path(f"{_stem(target, places.backups)}.{age}.bak")


def _stem(target: Path, folder: Path | None) -> Path:
    """Return what the names of our files for this target begin with."""
    if folder is None:
        return target.parent / f".runrecovery.{target.name}"
    digest = hashlib.sha256(os.fsencode(target)).hexdigest()[:16]
    return folder / f"{target.name.lstrip('.')}.{digest}"


def _temporary(target: Path, folder: Path | None) -> Path:
    return Path(f"{_stem(target, folder)}.{secrets.token_hex(8)}.tmp")


def _followed(path: Path) -> Path:
    """Return what links lead to. Where they lead in a circle, opening it will say so."""
    return Path(os.path.realpath(path))


@contextmanager
def _asking_the_system(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        detail = error.strerror or str(error)
        raise TrustFileOutOfReach(path, error.errno or 0, detail) from error


def _make_folders(target: Path, places: Places) -> None:
    for folder in (target.parent, places.locks, places.backups):
        if folder is not None:
            with _asking_the_system(folder):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def _clear_away(target: Path, places: Places) -> None:
    """Remove what edits that were killed have left: whoever is not dead would hold the lock."""
    for folder in {None, places.backups}:
        stem = _stem(target, folder)
        with os.scandir(stem.parent) as entries:
            names = [each.name for each in entries]
        ours = re.compile(re.escape(stem.name) + r"\.[0-9a-f]{16}\.tmp")
        for name in names:
            if ours.fullmatch(name):
                (stem.parent / name).unlink(missing_ok=True)


# -- looking ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What tells a file from another one, and from itself after a change."""

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
class _Seen:
    """A file as it was read; both None: there was none."""

    state: _State | None = None
    data: bytes | None = None


def _look(target: Path) -> _Seen:
    """Read the file, and never wait for it.

    Raises:
        TrustFileUnusable: it is no regular file, has a second name, or is too large.
        OSError: it cannot be read.
    """
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        descriptor = os.open(target, flags)
    except FileNotFoundError:
        return _Seen()
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise TrustFileUnusable(UnusableReason.NOT_REGULAR, "no regular file")
        if status.st_nlink > 1:
            raise TrustFileUnusable(UnusableReason.LINKED, f"{status.st_nlink} names for one file")
        with open(descriptor, "rb", closefd=False) as file:
            data = file.read(MOST_BYTES + 1)
    finally:
        os.close(descriptor)
    if len(data) > MOST_BYTES:
        raise TrustFileUnusable(UnusableReason.TOO_LARGE, f"more than {MOST_BYTES} bytes")
    return _Seen(_State.of(status), data)


def _state(target: Path) -> _State | None:
    try:
        return _State.of(os.lstat(target))
    except FileNotFoundError:
        return None


class _Patience:
    """Waits for others, within bounds."""

    def __init__(self, target: Path, pause: Callable[[float], object]) -> None:
        self._target = target
        self._pause = pause
        self._tries = 0
        self._seen: _Seen | None = None
        self._looks = 0

    def again(self) -> None:
        """Wait a little, more each time.

        Raises:
            TrustFileBusy: it was often enough.
        """
        self._tries += 1
        if self._tries == TRIES:
            raise TrustFileBusy(self._target, f"others wrote it during {TRIES} tries")
        self._pause(min(_FIRST_PAUSE_S * 2 ** (self._tries - 1), _LONGEST_PAUSE_S))

    def settles(self, seen: _Seen) -> bool:
        """Wait for whoever may be in the middle of writing this. False: it stays as it is."""
        self._looks = self._looks + 1 if seen == self._seen else 1
        self._seen = seen
        if self._looks == SETTLED_LOOKS:
            return False
        self.again()
        return True


# -- changing --------------------------------------------------------------------------------------


def _edit_locked(
    path: Path,
    target: Path,
    decide: Callable[[bytes | None], _Change],
    record: Callable[[_Change], object],
    places: Places,
    patience: _Patience,
) -> _Change:
    while True:
        with _asking_the_system(target):
            seen = _look(target)
        try:
            if not seen.data and patience.settles(seen):
                continue
            change = decide(seen.data)
        except TrustFileUnusable as error:
            unsettled = error.reason in {UnusableReason.NOT_PARSABLE, UnusableReason.NOT_UTF8}
            if unsettled and patience.settles(seen):
                continue
            raise
        record(change)
        if change.text == seen.data:
            return change
        if _followed(path) != target:
            raise TrustFileBusy(path, "the link leads elsewhere than a moment ago")
        with _asking_the_system(target):
            if _put(target, seen, change.text, places):
                return change
        patience.again()


def _put(target: Path, seen: _Seen, text: bytes | None, places: Places) -> bool:
    """Put the text in the place of what was seen. False: that has changed; nothing was done."""
    if seen.state is not None and not seen.state.mode & 0o222:
        raise TrustFileUnusable(UnusableReason.READ_ONLY, "no one may write it, by its mode")
    new = _temporary(target, None)
    old = _temporary(target, places.backups)
    try:
        if text is not None:
            _write(new, text, like=seen.state, attributes_of=target)
        if seen.data is not None:
            _write(old, seen.data, like=seen.state, most_mode=0o600)
        if _look(target) != seen:
            return False
        if not _swap(new if text is not None else None, target, seen.state):
            return False
        # It is done. What fails from here on, as a disk that breaks, must not say otherwise.
        with suppress(OSError):
            _sync_folder(target.parent)
        with suppress(OSError):
            _keep(old, target, places)
    finally:
        for left in (new, old):
            with suppress(OSError):
                left.unlink(missing_ok=True)
    return True


def _swap(new: Path | None, target: Path, expected: _State | None) -> bool:
    """Put the file (None: nothing) at the target, if that is still as expected."""
    if expected is None and new is not None:
        return _place_new(new, target)
    # Nothing may come between these two: whatever is written there is lost.
    if _state(target) != expected:
        return False
    if new is None:
        target.unlink()
    else:
        new.replace(target)
    return True


def _place_new(new: Path, target: Path) -> bool:
    """Give a new file its name, unless somebody else was first."""
    try:
        os.link(new, target)
    except FileExistsError:
        return False
    except OSError:  # not every file system has links
        if os.path.lexists(target):
            return False
        new.replace(target)
        return True
    new.unlink()  # a crash here leaves two names; the next edit clears the other one away
    return True


def _write(
    path: Path,
    data: bytes,
    *,
    like: _State | None,
    most_mode: int = 0o7777,
    attributes_of: Path | None = None,
) -> None:
    """Write a new file, down to the disk, with the owner and the mode of another.

    Raises:
        TrustFileUnusable: it cannot be given to that owner.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    with open(descriptor, "wb") as file:  # noqa: PTH123 - it is open already
        file.write(data)
        file.flush()
        if like is not None:
            mode = like.mode & most_mode
            _give(descriptor, like, mode)
            if attributes_of is not None:
                _copy_attributes(attributes_of, descriptor)
            os.fchmod(descriptor, mode)  # after the owner, whose change takes bits away
        os.fsync(descriptor)


def _give(descriptor: int, like: _State, mode: int) -> None:
    status = os.fstat(descriptor)
    if (status.st_uid, status.st_gid) == (like.uid, like.gid):
        return
    try:
        os.fchown(descriptor, like.uid, like.gid)
    except PermissionError:
        # A group that may do nothing with the file can be another one.
        if status.st_uid == like.uid and not mode & 0o070:
            return
        raise TrustFileUnusable(
            UnusableReason.OWNER_LOST,
            f"belongs to {like.uid}:{like.gid}, which we may not give it to",
        ) from None


def _copy_attributes(source: Path, descriptor: int) -> None:
    """Copy access lists, labels and the like, as far as we may."""
    if sys.platform != "linux":
        return
    with suppress(OSError):
        for name in os.listxattr(source, follow_symlinks=False):
            with suppress(OSError):
                os.setxattr(descriptor, name, os.getxattr(source, name, follow_symlinks=False))


def _keep(old: Path, target: Path, places: Places) -> None:
    """Make the earlier version the first backup, and the others older by one."""
    if not old.exists():
        return
    for age in range(BACKUPS, 1, -1):
        with suppress(FileNotFoundError):
            backup_file(target, age - 1, places).replace(backup_file(target, age, places))
    old.replace(backup_file(target, 1, places))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
