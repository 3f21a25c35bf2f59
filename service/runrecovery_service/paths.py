"""Finds problems of the data directory and the SQLite file, for a start and for `check`.

A start calls these functions before it creates, locks or opens a file, so that a refused start
leaves nothing behind. Only `make_directory` changes anything.
"""

from __future__ import annotations

import os
import resource
import stat
from pathlib import Path
from typing import Final

from runrecovery_service.domain.start_errors import DataDirRefused

SQLITE_PATH_BYTES: Final = 500
"""The longest path of a SQLite file. SQLite refuses 512 bytes or more, and the longest suffix,
`.new-journal`, needs room."""
GROWTH_BYTES: Final = 64 * 1024**2
"""Bytes by which the database must be able to grow under the limit on file sizes."""


def shown(path: Path) -> str:
    """Return a path as text for people, with escapes for bytes that are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def absolute(path: Path) -> Path:
    """Return the absolute path.

    Raises:
        DataDirRefused: it is relative, and the working directory was removed.
    """
    try:
        return path.absolute()
    except FileNotFoundError as error:
        reason = "is relative, and the working directory was removed"
        raise DataDirRefused(shown(path), reason) from error


# -- the data directory ------------------------------------------------------------------------


def directory_problem(path: Path) -> str | None:
    """Return why an absolute path cannot be the data directory; None if it can."""
    try:
        return _text_problem(path) or _directory_problem(path)
    except OSError as error:
        return error.strerror or "cannot be used"


def _directory_problem(path: Path) -> str | None:
    if reason := _dangling_problem(path):
        return reason
    try:
        path.stat()
    except FileNotFoundError:
        return _making_problem(path)
    return _usable_directory_problem(path)


def _making_problem(path: Path) -> str | None:
    parent = next(parent for parent in path.parents if os.path.lexists(parent))
    if reason := _dangling_problem(parent) or _access_problem(parent, os.W_OK | os.X_OK):
        return f"cannot be created: {shown(parent)} {reason}"
    return None


def make_directory(path: Path) -> None:
    """Create the data directory with mode 0700, unless it exists.

    Raises:
        OSError: the directory cannot be created.
    """
    if not path.exists():
        path.mkdir(mode=0o700, parents=True)
        path.chmod(0o700)  # the umask may have removed permissions


def others_who_may_write(path: Path) -> str | None:
    """Return the other users who may change an existing data directory; None: no other user."""
    found = path.stat()
    mode = found.st_mode
    others = [
        *([f"user {found.st_uid}"] if found.st_uid not in {0, os.geteuid()} else []),
        *([f"group {found.st_gid}"] if mode & stat.S_IWGRP else []),
        *(["every user"] if mode & stat.S_IWOTH else []),
    ]
    return ", ".join(others) or None


# -- the SQLite file ---------------------------------------------------------------------------


def database_problem(path: Path, data_dir: Path) -> str | None:
    """Return why a SQLite store cannot be opened or created at an absolute path; None if it can.

    A database in a data directory that does not exist yet is no problem: a start creates the
    directory first.
    """
    try:
        if reason := _text_problem(path) or _length_problem(path):
            return reason
        if path.parent == data_dir and not data_dir.exists():
            return _size_limit_problem(0)
        return _file_problem(path)
    except OSError as error:
        return error.strerror or "cannot be used"


def _length_problem(path: Path) -> str | None:
    length = len(os.fsencode(os.path.realpath(path)))
    if length <= SQLITE_PATH_BYTES:
        return None
    return f"its path has {length} bytes; SQLite takes at most {SQLITE_PATH_BYTES}"


def _file_problem(path: Path) -> str | None:
    if not path.parent.exists():
        return f"its directory {shown(path.parent)} does not exist"
    if reason := _dangling_problem(path):
        return reason
    found = path.stat() if path.exists() else None
    if found is not None and stat.S_ISDIR(found.st_mode):
        return "is a directory, not a database file"
    if found is not None and not stat.S_ISREG(found.st_mode):
        return "is not a regular file"
    folder = Path(os.path.realpath(path)).parent
    if reason := _usable_directory_problem(folder):
        return f"its directory {shown(folder)} {reason}"
    if found is None:
        return _size_limit_problem(0)
    return (
        _access_problem(path, os.R_OK | os.W_OK)
        or _companion_problem(path)
        or _size_limit_problem(found.st_size)
    )


def _companion_problem(path: Path) -> str | None:
    """Return why a file that belongs to the database is not accessible; None if all are."""
    for suffix in ("-wal", "-shm", ".installed"):
        companion = Path(os.path.realpath(path) + suffix)
        if companion.exists() and (reason := _access_problem(companion, os.R_OK | os.W_OK)):
            return f"its {companion.name} {reason}"
    return None


def _size_limit_problem(size: int) -> str | None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit == resource.RLIM_INFINITY or limit >= size + GROWTH_BYTES:
        return None
    return (
        f"a file may have {limit} bytes at most here (ulimit -f), and the database needs room for"
        f" {size + GROWTH_BYTES}"
    )


# -- data directory and SQLite file ------------------------------------------------------------


def _text_problem(path: Path) -> str | None:
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "the path is not valid UTF-8"
    return None


def _dangling_problem(path: Path) -> str | None:
    if not path.is_symlink() or path.exists():
        return None
    return f"is a link to {shown(path.readlink())}, which does not exist; is a volume not mounted?"


def _usable_directory_problem(path: Path) -> str | None:
    if not path.is_dir():
        return "is not a directory"
    return _access_problem(path, os.R_OK | os.W_OK | os.X_OK)


def _access_problem(path: Path, wanted: int) -> str | None:
    if os.access(path, wanted, effective_ids=True):
        return None
    if os.statvfs(path).f_flag & os.ST_RDONLY:
        return "is on a read-only file system"
    found = path.stat()
    return (
        f"may not be read and changed by user {os.geteuid()}: its mode is"
        f" {stat.S_IMODE(found.st_mode):04o}, its owner user {found.st_uid}"
    )
