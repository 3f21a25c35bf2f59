"""Stores the stdout and stderr of agents, per attempt and up to a limit."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Final

from runrecovery_service.agents.workspaces import REST_SUFFIX, Workspaces
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.safe_open import open_regular


class OutputChannel(StrEnum):
    """One of the two output streams of a process."""

    STDOUT = "stdout"
    STDERR = "stderr"


@dataclass(frozen=True, slots=True)
class OutputPiece:
    """A piece of an output file.

    Attributes:
        data: the bytes of the file.
        truncated: whether the piece ends at the end of the file, and the limit on stored output
            cut off further output there.
    """

    data: bytes
    truncated: bool


_TRUNCATED: Final = ".truncated"
_NAMES: Final = frozenset(
    f"{channel}.log{suffix}" for channel in OutputChannel for suffix in ("", _TRUNCATED)
)


def is_output_name(name: str) -> bool:
    """Return whether this is the name of an output file in the folder of an attempt."""
    return name in _NAMES or name.endswith(REST_SUFFIX)


class OutputFiles:
    """The output files of all attempts. Every method blocks briefly: call it in a thread."""

    def __init__(self, workspaces: Workspaces, *, max_bytes: int) -> None:
        self._workspaces = workspaces
        self._max_bytes = max_bytes

    def append(self, run_key: int, attempt: int, channel: OutputChannel, data: bytes) -> int | None:
        """Append data up to the limit, and mark the file as truncated if not all of it fits.

        Returns:
            The new size of the file in bytes; None if not all of the data fitted.

        Raises:
            OSError: not all of the data was written, for example because the disk is full.
        """
        path = self._file(run_key, attempt, channel)
        descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            size = os.fstat(descriptor).st_size
            room = max(0, self._max_bytes - size)
            left = memoryview(data)[:room]
            while left:  # a full disk stores some bytes, and refuses the next write
                left = left[os.write(descriptor, left) :]
            if len(data) > room:
                path.with_name(path.name + _TRUNCATED).touch(mode=0o600)
                return None
            return size + len(data)
        finally:
            os.close(descriptor)

    def read(
        self, run_key: int, attempt: int, channel: OutputChannel, offset: int, limit: int
    ) -> OutputPiece:
        """Return up to `limit` bytes from `offset`; at or after the end return no bytes.

        Raises:
            FileNotFoundError: the attempt has written nothing on this channel.
        """
        path = self._file(run_key, attempt, channel)
        with open(open_regular(path, os.O_RDONLY), "rb") as file:  # noqa: PTH123 - opened safely
            end = file.seek(0, os.SEEK_END)
            file.seek(offset)
            data = file.read(limit)
        at_end = offset + len(data) >= end
        truncated = at_end and path.with_name(path.name + _TRUNCATED).exists()
        return OutputPiece(data, truncated)

    def size(self, run_key: int, attempt: int, channel: OutputChannel) -> int:
        """Return how many bytes of a channel are stored; 0 if there is no file."""
        try:
            return self._file(run_key, attempt, channel).stat().st_size
        except FileNotFoundError:
            return 0

    def has_attempt(self, run_key: int, attempt: int) -> bool:
        """Return whether this service has a folder for the attempt."""
        return self._workspaces.attempt(run_key, attempt).is_dir()

    def _file(self, run_key: int, attempt: int, channel: OutputChannel) -> Path:
        return self._workspaces.output(run_key, attempt, channel)
