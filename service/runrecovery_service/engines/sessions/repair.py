"""Repairs a session file whose history the model's API would refuse when its CLI resumes it.

Lines are appended to the session file. Every byte that the CLI has written stays as it is.
"""

from __future__ import annotations

import json
import os
import stat
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Protocol

from runrecovery_service.domain.run import JsonObject
from runrecovery_service.engines.sessions.lines import json_object
from runrecovery_service.lazy_dataclass import dataclass

MOST_BYTES: Final = 64 * 1024**2
"""The largest file that is repaired. Reading it takes some 200 MiB of memory and 2 s."""


class History(Protocol):
    """The form of a CLI's conversations, which can need a repair."""

    def corrections(self, lines: Iterable[JsonObject]) -> list[JsonObject]:
        """Return the lines to append; none for a history that is valid."""


class NotRepairable(Exception):
    """A session cannot be repaired. The text says why."""


@dataclass(frozen=True, slots=True)
class Repair:
    """The repair of a session file: how many lines were appended, and the size before."""

    lines: int
    after: int


def repair(path: Path, history: History, given_up: threading.Event) -> Repair | None:
    """Append the corrections that a session file needs; return None if it needs none.

    No process must write to the file meanwhile. An interrupted repair leaves the file usable, and
    the next repair completes it.

    Args:
        given_up: set when the caller has stopped waiting. From then on the CLI can be writing to
            the file, so the repair begins no write (NotRepairable).

    Raises:
        NotRepairable: the file is too long, not a file or changing, or its history stays invalid.
        OSError: the file cannot be read or written.
    """
    # Agents can write where the file is: no link at its end, and no waiting for a pipe.
    flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags), "r+b", buffering=0) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise NotRepairable("not_a_file")
        if found.st_size > MOST_BYTES:
            raise NotRepairable("too_long")
        data = file.read()
        corrections = _corrections(data, history)
        if not corrections:
            return None
        begin = b"" if data.endswith(b"\n") else b"\n"  # a process was possibly killed in a line
        added = begin + b"".join(json.dumps(line).encode() + b"\n" for line in corrections)
        if given_up.is_set() or os.fstat(file.fileno()).st_size != len(data):
            raise NotRepairable("too_late")
        try:
            while added:
                added = added[file.write(added) :]
        except OSError:  # a full disk: the CLI would append to half a line
            file.truncate(len(data))
            raise
        return Repair(len(corrections), len(data))


def _corrections(data: bytes, history: History) -> list[JsonObject]:
    """Return the lines to append, after a check that the history is valid with them."""
    lines = [line for each in data.split(b"\n") if (line := json_object(each)) is not None]
    corrections = history.corrections(lines)
    if corrections and history.corrections([*lines, *corrections]):
        raise NotRepairable("stays_wrong")
    return corrections
