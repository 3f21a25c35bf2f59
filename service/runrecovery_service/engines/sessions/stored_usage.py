"""Reads from session files which calls of the model their CLI has stored.

A killed CLI prints no total. Its session file has the usage of each call whose answer was complete.
Claude Code writes its file late, so its stored output is read as well.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from runrecovery_service.domain.run import JsonObject
from runrecovery_service.domain.session_check import StoredHandle
from runrecovery_service.domain.usage import InvalidUsage, StoredUsage
from runrecovery_service.engines.sessions.lines import Layout, json_object
from runrecovery_service.lazy_dataclass import dataclass

MOST_BYTES: Final = 64 * 1024**2
"""The most bytes of a session's files. A session with more is not read."""
FEWER_CALLS: Final = "fewer_calls"
"""The reason for a session whose calls do not count because it had more calls before."""


class UsageNotKnown(Exception):
    """The usage of a session cannot be read. The text says why."""


class Ledger(Protocol):
    """The calls in the session files of a CLI.

    Attributes:
        marks: texts, one of which is in every line with usage. Other lines are not parsed.
        is_in_output: whether the CLI prints the same lines to its standard output.
    """

    @property
    def marks(self) -> tuple[bytes, ...]: ...

    @property
    def is_in_output(self) -> bool: ...

    def sum(self, lines: Iterable[JsonObject]) -> StoredUsage:
        """Return the usage in the lines of a session.

        The lines are those of its files, the oldest file first, and then those of the output.

        Raises:
            InvalidUsage: a number is impossible.
        """


@dataclass(frozen=True, slots=True)
class UsageReader:
    """Reads the usage of sessions. No process must write to a session meanwhile."""

    layout: Layout
    ledger: Ledger
    most_bytes: int = MOST_BYTES

    def read(
        self, paths: Iterable[Path], stored: StoredHandle, output: Path | None = None
    ) -> StoredUsage:
        """Return the usage of the calls in the files of a session and in its stored output.

        Raises:
            UsageNotKnown: a file is damaged, too long or of another session, or there is none.
            OSError: a file cannot be read.
        """
        lines: list[JsonObject] = []
        left, is_found = self.most_bytes, False
        for path in paths:
            if path.suffix != ".jsonl":
                raise UsageNotKnown("not_known")
            try:
                data = _read_file(path, left)
            except FileNotFoundError:
                continue
            left, is_found = left - len(data), True
            lines += self._lines(data, stored)
        if self.ledger.is_in_output and output is not None:
            with suppress(FileNotFoundError):  # a process that has printed nothing
                lines += self._output_lines(_read_file(output, left))
                is_found = True  # a CLI that was killed early has possibly made no file
        if not is_found:
            raise UsageNotKnown("missing")
        try:
            usage = self.ledger.sum(lines)
        except InvalidUsage as error:
            raise UsageNotKnown("broken") from error
        if not usage.calls.fits_report:  # agents can write what they like
            raise UsageNotKnown("broken")
        return usage

    def _lines(self, data: bytes, stored: StoredHandle) -> Iterator[JsonObject]:
        """Yield the lines of a file that can have usage.

        A last line without a newline is skipped, because its process was possibly killed.

        Raises:
            UsageNotKnown: the first line is not of this session, or a line with usage is damaged.
        """
        first, *more = data.split(b"\n")[:-1] or [b""]
        named = json_object(first)
        if named is None:
            raise UsageNotKnown("broken")
        if self.layout.identify(iter([named]), stored) is not None:
            raise UsageNotKnown("elsewhere")
        for line in more:
            if any(mark in line for mark in self.ledger.marks):
                parsed = json_object(line)
                if parsed is None:
                    raise UsageNotKnown("broken")
                yield parsed

    def _output_lines(self, data: bytes) -> Iterator[JsonObject]:
        """Yield the lines that can have usage. Skip all others, because output can be anything."""
        for line in data.split(b"\n"):
            if any(mark in line for mark in self.ledger.marks):
                parsed = json_object(line)
                if parsed is not None:
                    yield parsed


def _read_file(path: Path, most: int) -> bytes:
    # Agents can write where the file is: no waiting for a pipe.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise UsageNotKnown("not_a_file")
        if found.st_size > most:
            raise UsageNotKnown("too_long")
        # Never read beyond this size, even if the file grows meanwhile.
        return file.read(found.st_size)
