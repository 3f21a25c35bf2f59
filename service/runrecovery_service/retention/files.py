"""Removes files of ended runs. It follows no link, and never leaves the data directory.

Files to remove are first renamed into `runs/.removed/<key>-…`, and later deleted there. After a
crash the next sweep deletes the rest. Agents may have left links, deep trees, folders without
permissions, and mounts. To empty a folder, its subfolders are moved up into `.removed`, so that
neither deep trees nor links cause problems. A file that the system refuses to delete stays, and is
reported.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import field
from pathlib import Path
from typing import Final

from runrecovery_service.agents.output import is_output_name
from runrecovery_service.domain.retention import RetentionKind
from runrecovery_service.lazy_dataclass import dataclass

REMOVED: Final = ".removed"
_KEY: Final = re.compile(r"[1-9][0-9]{0,18}")
_LARGEST_KEY: Final = 2**63 - 1
_FOLDER: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass(slots=True)
class Emptied:
    """The result of deleting files.

    Attributes:
        size: the total bytes of the deleted files.
        problems: by name in `.removed`: why an entry could not be deleted.
    """

    size: int = 0
    problems: dict[str, str] = field(default_factory=dict)


class RunFiles:
    """The files of all runs below one data directory. Every method blocks: call it in a thread."""

    def __init__(self, runs: Path) -> None:
        self._runs = runs

    def remove(self, kind: RetentionKind, key: int) -> None:
        """Move the files of this kind, if there are any, from the folder of a run into `.removed`.

        Raises:
            OSError: the system refuses the move.
        """
        with self._open() as runs, suppress(FileNotFoundError):
            if kind is RetentionKind.RUNS:
                self._move(str(key), runs, key)
                return
            try:
                run = _open_folder(str(key), runs)
            except NotADirectoryError:  # a link or a file, which the service has not created
                return
            try:
                self._remove_part(kind, run, key)
            finally:
                os.close(run)
            with suppress(OSError):  # fails while other parts of the run are in it
                os.rmdir(str(key), dir_fd=runs)

    def _remove_part(self, kind: RetentionKind, run: int, key: int) -> None:
        for attempt in _names(run):
            try:
                folder = _open_folder(attempt, run)
            except NotADirectoryError:
                continue
            try:
                for name in _names(folder):
                    if is_output_name(name) is (kind is RetentionKind.OUTPUTS):
                        self._move(name, folder, key)
            finally:
                os.close(folder)
            with suppress(OSError):
                os.rmdir(attempt, dir_fd=run)

    def empty(self, *, should_stop: Callable[[], bool]) -> Emptied:
        """Delete everything in `.removed` that the system permits to delete."""
        emptied = Emptied()
        with self._open() as runs:
            removed = _open_removed(runs)
            try:
                # Emptying a folder adds its subfolders here.
                while names := set(_names(removed)) - emptied.problems.keys():
                    for name in names:
                        if should_stop():
                            return emptied
                        try:
                            self._delete(name, removed, emptied)
                        except OSError as error:
                            emptied.problems[name] = error.strerror or type(error).__name__
            finally:
                os.close(removed)
        return emptied

    def size(self, kind: RetentionKind, key: int) -> int:
        """Return the total bytes of the files that `remove` would move out of a run's folder."""
        run = self._runs / str(key)
        if kind is RetentionKind.EVENTS or not _is_folder(run):
            return 0
        return sum(
            _freed(path.lstat())
            for attempt, _, names in os.walk(run)
            for path in (Path(attempt, name) for name in names)
            if kind is RetentionKind.RUNS
            or (_is_output(path.relative_to(run)) is (kind is RetentionKind.OUTPUTS))
        )

    def run_keys(self) -> list[int]:
        """Return the keys of all folders of runs.

        Read the keys before the rows of the runs. Folders whose name is not a key are ignored,
        because the service has not created them.
        """
        with self._open() as runs, os.scandir(runs) as entries:
            keys = [
                int(entry.name)
                for entry in entries
                if _KEY.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]
        return sorted(key for key in keys if key <= _LARGEST_KEY)

    @contextmanager
    def _open(self) -> Iterator[int]:
        self._runs.mkdir(mode=0o700, exist_ok=True)
        runs = os.open(self._runs, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            yield runs
        finally:
            os.close(runs)

    def _move(self, name: str, folder: int, key: int) -> None:
        """Move an entry of a run's folder into `.removed`."""
        with self._open() as runs:
            removed = _open_removed(runs)
            try:
                _rename(name, folder, removed, str(key))
            finally:
                os.close(removed)

    def _delete(self, name: str, removed: int, emptied: Emptied) -> None:
        found = os.stat(name, dir_fd=removed, follow_symlinks=False)
        if not stat.S_ISDIR(found.st_mode):
            os.unlink(name, dir_fd=removed)
            emptied.size += _freed(found)
            return
        folder = _open_folder(name, removed)
        refused: OSError | None = None
        try:
            for entry in _names(folder):
                try:
                    _delete_or_rename(entry, folder, removed, name.partition("-")[0], emptied)
                except OSError as error:
                    refused = error
        finally:
            os.close(folder)
        if refused is not None:
            raise refused
        os.rmdir(name, dir_fd=removed)


def _open_removed(runs: int) -> int:
    """Open `.removed`, and create it if it does not exist."""
    with suppress(FileExistsError):
        os.mkdir(REMOVED, 0o700, dir_fd=runs)
    try:
        return os.open(REMOVED, _FOLDER, dir_fd=runs)
    except NotADirectoryError:  # a link or a file, which the service has not created
        found = f"{REMOVED}.found-{secrets.token_hex(8)}"
        os.rename(REMOVED, found, src_dir_fd=runs, dst_dir_fd=runs)
    os.mkdir(REMOVED, 0o700, dir_fd=runs)
    return os.open(REMOVED, _FOLDER, dir_fd=runs)


def _delete_or_rename(name: str, folder: int, removed: int, key: str, emptied: Emptied) -> None:
    found = os.stat(name, dir_fd=folder, follow_symlinks=False)
    if stat.S_ISDIR(found.st_mode):
        _rename(name, folder, removed, key)
    else:
        os.unlink(name, dir_fd=folder)
        emptied.size += _freed(found)


def _rename(name: str, folder: int, removed: int, key: str) -> None:
    with suppress(NotADirectoryError):
        _grant(name, folder)  # a folder that is moved must be writable
    # The name has the run's key, because an entry stays here if the system refuses to delete it.
    os.rename(name, f"{key}-{secrets.token_hex(8)}", src_dir_fd=folder, dst_dir_fd=removed)


def _names(folder: int) -> list[str]:
    return os.listdir(folder)


def _open_folder(name: str, parent: int) -> int:
    _grant(name, parent)
    return os.open(name, _FOLDER, dir_fd=parent)


def _grant(name: str, folder: int) -> None:
    """Give the service's user all permissions on a folder that the user owns."""
    descriptor = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=folder)
    try:
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        if mode & stat.S_IRWXU != stat.S_IRWXU:
            # By its descriptor, so that no link is followed. `fchmod` refuses descriptors of
            # O_PATH.
            os.chmod(f"/proc/self/fd/{descriptor}", mode | stat.S_IRWXU)  # noqa: PTH101 - as above
    finally:
        os.close(descriptor)


def _freed(found: os.stat_result) -> int:
    """Return the size in bytes of a deleted file; 0 while the file has another hard link."""
    return found.st_size if stat.S_ISREG(found.st_mode) and found.st_nlink == 1 else 0


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.lstat().st_mode)
    except FileNotFoundError:
        return False


def _is_output(path: Path) -> bool:
    """Return whether a path below the folder of a run is an output file of an attempt."""
    return len(path.parts) == 2 and is_output_name(path.name)
