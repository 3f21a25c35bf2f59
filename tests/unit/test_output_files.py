"""The output of agents is kept whole, or an error says that it is not."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from runrecovery_service.agents import output
from runrecovery_service.agents.output import OutputChannel, OutputFiles
from runrecovery_service.agents.workspaces import Workspaces

STDOUT = OutputChannel.STDOUT


def files_on_a_small_disk(
    path: Path, monkeypatch: pytest.MonkeyPatch, *, room: int, max_bytes: int = 1000
) -> OutputFiles:
    """Return output files of which the disk takes at most 4 bytes at once, and `room` in all."""
    left = [room]

    def write(descriptor: int, data: memoryview) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = os.write(descriptor, data[: min(4, left[0])])
        left[0] -= written
        return written

    monkeypatch.setattr(output, "os", SimpleNamespace(**{**vars(os), "write": write}))
    workspaces = Workspaces(path / "runs")
    workspaces.prepare(1, 1, fresh=True)
    return OutputFiles(workspaces, max_bytes=max_bytes)


@pytest.mark.parametrize(
    ("max_bytes", "kept", "truncated"),
    [
        (1000, b"ten bytes.", False),
        (10, b"ten bytes.", False),
        (9, b"ten bytes", True),
        (7, b"ten byt", True),
    ],
)
def test_output_that_is_written_in_parts_is_kept_up_to_the_limit(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    max_bytes: int,
    kept: bytes,
    truncated: bool,
) -> None:
    files = files_on_a_small_disk(tmp_path, monkeypatch, room=100, max_bytes=max_bytes)

    files.append(1, 1, STDOUT, b"ten bytes.")

    piece = files.read(1, 1, STDOUT, 0, 1000)
    assert (piece.data, piece.truncated) == (kept, truncated)


def test_output_that_fills_the_disk_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = files_on_a_small_disk(tmp_path, monkeypatch, room=6)

    with pytest.raises(OSError, match="No space left on device"):
        files.append(1, 1, STDOUT, b"ten bytes.")

    assert files.read(1, 1, STDOUT, 0, 1000).data == b"ten by"
