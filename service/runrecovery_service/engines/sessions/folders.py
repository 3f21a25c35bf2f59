"""Where a CLI has its home, and what lies in its folders."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, TypeVar

V = TypeVar("V")
OURS: Final = ".runrecovery."
"""Begins the names of locks and copies beside a file that we edit."""


def home_of(env: Mapping[str, str], variable: str, below_home: str) -> Path | None:
    """Return a CLI's home: what `variable` says, else `below_home` in HOME. None: it cannot be told
    (a relative one depends on the folder that the CLI is started in)."""
    named = env.get(variable) or ""
    home = Path(named) if named else Path(env.get("HOME", ""), below_home)
    return home if home.is_absolute() else None


class NotKnown(Exception):
    """What says where a session lies has a form that we do not read."""


def is_away(home: Path) -> bool:
    """True for a home that is not there or holds nothing, as where nothing is mounted. What we
    leave beside the files of a CLI is no content.

    Raises:
        OSError: it cannot be told.
    """
    try:
        with os.scandir(home) as entries:
            return all(entry.name.startswith(OURS) for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return True


def names_in(folder: Path) -> list[str]:
    """Return the sorted names in a folder; none if there is no such folder.

    Raises:
        OSError: it cannot be told.
    """
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208 - a Path each would take longer than it
    except (FileNotFoundError, NotADirectoryError):
        return []


def read_small(path: Path, most: int) -> bytes:
    """Return the beginning of a regular file; nothing if there is none. It never waits.

    Raises:
        OSError: it cannot be told what is there.
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
class Once(Generic[V]):
    """Answers that are asked for once; that there was none is remembered, too."""

    _known: dict[Hashable, V | OSError] = field(default_factory=dict)

    def get(self, of: Hashable, ask: Callable[[], V]) -> V:
        """Return the answer.

        Raises:
            OSError: that was the answer.
        """
        if of not in self._known:
            try:
                self._known[of] = ask()
            except OSError as error:
                self._known[of] = error
        answer = self._known[of]
        if isinstance(answer, OSError):
            raise answer
        return answer
