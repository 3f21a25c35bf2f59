"""What processes wrote, kept per attempt and bounded. Workspaces lie beside it.

<data_dir>/runs/<run key>/<attempt>/workspace/      the agent's own folder, 0700
<data_dir>/runs/<run key>/<attempt>/stdout.log      and stderr.log, 0600
<data_dir>/runs/<run key>/<attempt>/shim-<turn>.log what a shim did when nobody else could, 0600
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from runrecovery_service.process.safe_open import open_regular


class OutputChannel(StrEnum):
    """One of a process's two streams."""

    STDOUT = "stdout"
    STDERR = "stderr"


@dataclass(frozen=True, slots=True)
class OutputPiece:
    """Bytes as written. `truncated` is True at the end of what is kept, if more was written."""

    data: bytes
    truncated: bool


_TRUNCATED: Final = ".truncated"


class OutputFiles:
    """The files of all runs. Every method blocks shortly; call them in a thread."""

    def __init__(self, data_dir: Path, *, max_bytes: int) -> None:
        self._runs = data_dir / "runs"
        self._max_bytes = max_bytes

    def workspace(self, run_key: int, attempt: int) -> Path:
        """Return the folder that the agent works in; it may not exist yet."""
        return self._attempt(run_key, attempt) / "workspace"

    def shim_journal(self, run_key: int, attempt: int, turn: int) -> Path:
        """Return the file in which the shim of a turn accounts for what it does by itself."""
        return self._attempt(run_key, attempt) / f"shim-{turn}.log"

    def prepare(self, run_key: int, attempt: int, *, fresh: bool) -> Path:
        """Make the folder that the agent works in, and return it.

        Args:
            fresh: the attempt begins. A folder that is there already is another run's, from
                before an older database was restored; it is moved aside.
        """
        attempts = self._attempt(run_key, attempt)
        if fresh and attempts.exists():
            attempts.rename(attempts.with_name(f"{attempt}.found-{time.time_ns()}"))
        workspace = self.workspace(run_key, attempt)
        for folder in (*reversed(workspace.parents[:3]), workspace):
            folder.mkdir(mode=0o700, exist_ok=True)
        return workspace

    def append(self, run_key: int, attempt: int, channel: OutputChannel, data: bytes) -> None:
        """Keep what fits below the limit, and note when something did not."""
        path = self._file(run_key, attempt, channel)
        descriptor = open_regular(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            room = self._max_bytes - os.fstat(descriptor).st_size
            if room > 0:
                os.write(descriptor, data[:room])
            if len(data) > room:
                path.with_name(path.name + _TRUNCATED).touch(mode=0o600)
        finally:
            os.close(descriptor)

    def read(
        self, run_key: int, attempt: int, channel: OutputChannel, offset: int, limit: int
    ) -> OutputPiece:
        """Return up to `limit` bytes from `offset`; no data at or behind the end.

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
        """Return how many bytes are kept."""
        try:
            return self._file(run_key, attempt, channel).stat().st_size
        except FileNotFoundError:
            return 0

    def _attempt(self, run_key: int, attempt: int) -> Path:
        return self._runs / str(run_key) / str(attempt)

    def _file(self, run_key: int, attempt: int, channel: OutputChannel) -> Path:
        return self._attempt(run_key, attempt) / f"{channel}.log"
