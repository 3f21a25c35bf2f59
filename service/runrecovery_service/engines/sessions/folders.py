"""A CLI's home folder, and reading the folders in it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Hashable, Mapping
from dataclasses import field
from pathlib import Path
from typing import Final, Generic, TypeVar

from runrecovery_service.lazy_dataclass import dataclass

V = TypeVar("V")
OURS: Final = ".runrecovery."
"""Prefix of the names of locks and copies that this service puts beside a file that it edits."""


def home_of(env: Mapping[str, str], variable: str, below_home: str) -> Path | None:
    """Return a CLI's home folder: the value of `variable`, else `below_home` in HOME.

    For a relative path return None, because the path depends on the CLI's working directory.
    """
    named = env.get(variable) or ""
    home = Path(named) if named else Path(env.get("HOME", ""), below_home)
    return home if home.is_absolute() else None


class NotKnown(Exception):
    """The file that lists the folders of sessions has an unknown format."""


def is_away(home: Path) -> bool:
    """Return True for a home that is missing or empty, for example because it is not mounted.

    A home with only files of this service (locks, backups) counts as empty.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        with os.scandir(home) as entries:
            return all(entry.name.startswith(OURS) for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return True


def names_in(folder: Path) -> list[str]:
    """Return the sorted names in a folder; empty if the folder does not exist.

    Raises:
        OSError: the folder cannot be read.
    """
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - a Path each would take longer than it
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_small(path: Path, most: int) -> bytes:
    """Return the beginning of a file, or no bytes if no regular file is there. Never wait.

    Raises:
        OSError: the file cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return b""
    try:
        is_regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
        return os.pread(descriptor, most, 0) if is_regular else b""
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Cache(Generic[V]):
    """Values that are computed once. An OSError is remembered as well."""

    _known: dict[Hashable, V | OSError] = field(default_factory=dict)

    def get(self, key: Hashable, compute: Callable[[], V]) -> V:
        """Return the value of a key; compute it at the first call.

        Raises:
            OSError: `compute` raised it.
        """
        if key not in self._known:
            try:
                self._known[key] = compute()
            except OSError as error:
                self._known[key] = error
        value = self._known[key]
        if isinstance(value, OSError):
            raise value
        return value
