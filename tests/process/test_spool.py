"""The spool: output between the pipe and the output file, in memory shared with the shim."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import pytest
from runrecovery_service.process import wire
from runrecovery_service.process.spool import FREED_BYTES, Spool

FIRST: Final = wire.POSITION_BYTES


@pytest.fixture
def spool() -> Iterator[Spool]:
    with closing(Spool(kept_bytes=7)) as spool:
        yield spool


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    os.set_blocking(ends[0], False)
    yield ends
    for end in ends:
        os.close(end)


def fill(spool: Spool, pipe: tuple[int, int], data: bytes) -> None:
    os.write(pipe[1], data)
    assert spool.fill(pipe[0]) == len(data)


def position(spool: Spool) -> tuple[int, int, int]:
    """Return what the shim would read."""
    found = wire.unpack_position(os.pread(spool.descriptor, wire.POSITION_BYTES, 0))
    return found.start, found.kept, found.begin


def test_output_is_in_the_spool_once_it_has_left_the_pipe(
    spool: Spool, pipe: tuple[int, int]
) -> None:
    fill(spool, pipe, b"one ")
    fill(spool, pipe, b"two")

    assert spool.read(FIRST, 5) == b"one t"
    assert spool.read(FIRST + 5, 100) == b"wo"
    assert os.pread(spool.descriptor, 100, FIRST) == b"one two"
    with pytest.raises(BlockingIOError):
        spool.fill(pipe[0])


def test_the_position_is_the_recorded_one(spool: Spool) -> None:
    positions = [position(spool)]
    spool.note_kept(FIRST + 9, size=16, begin=7)
    positions.append(position(spool))
    spool.note_kept(FIRST + 10, size=None, begin=None)
    positions.append(position(spool))

    assert positions == [(FIRST, 7, 7), (FIRST + 9, 16, 7), (FIRST + 10, -1, -1)]


def test_the_memory_of_kept_output_is_given_back(spool: Spool, pipe: tuple[int, int]) -> None:
    for _ in range(40):
        fill(spool, pipe, b"x" * 65536)
        spool.note_kept(spool.end - 1000, size=0, begin=0)

    used = os.fstat(spool.descriptor).st_blocks * 512
    assert used <= FREED_BYTES + 3 * 65536
    assert spool.read(spool.end - 1000, 2000) == b"x" * 1000
    assert position(spool) == (spool.end - 1000, 0, 0)


def test_a_record_after_the_end_writes_to_no_other_file(tmp_path: Path) -> None:
    spool = Spool()
    spool.close()
    other = os.open(tmp_path / "other", os.O_RDWR | os.O_CREAT)
    os.dup2(other, spool.descriptor)  # its number belongs to another file now
    try:
        spool.note_kept(FIRST, size=1, begin=0)
    finally:
        os.close(other)
        if other != spool.descriptor:
            os.close(spool.descriptor)

    assert (tmp_path / "other").read_bytes() == b""


def test_a_python_without_memfd_create_uses_that_of_the_c_library(
    monkeypatch: pytest.MonkeyPatch, pipe: tuple[int, int]
) -> None:
    monkeypatch.delattr(os, "memfd_create")

    with closing(Spool(kept_bytes=7)) as spool:
        fill(spool, pipe, b"one")

        assert not os.get_inheritable(spool.descriptor)
        assert spool.read(FIRST, 100) == b"one"
        assert position(spool) == (FIRST, 7, 7)
