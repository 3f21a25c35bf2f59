"""A stream that a thread writes: a call of `write` never waits."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from runrecovery_service.background_stream import BackgroundStream

LINE = "x" * 99 + "\n"
PATIENCE_S = 30.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """The read end and the write end of a pipe of 4 KiB."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    yield reader, writer
    for descriptor in (reader, writer):
        os.close(descriptor)


def read_all(reader: int, stream: BackgroundStream) -> list[str]:
    """Read until the stream has written everything; return the lines."""
    found: list[bytes] = []
    done = threading.Event()

    def read() -> None:
        while not b"".join(found[-1:]).endswith(b"end\n"):
            found.append(os.read(reader, 65536))
        done.set()

    thread = threading.Thread(target=read)
    thread.start()
    # What is queued must flow first, or the last line would find the queue full.
    assert stream.drain(PATIENCE_S)
    stream.write("end\n")
    assert done.wait(PATIENCE_S)
    thread.join()
    return b"".join(found).decode().splitlines()


def test_text_is_written_completely_and_in_order(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    stream = BackgroundStream(writer)
    for number in range(1000):
        print(f"line {number}", "→ ok", file=stream)

    lines = read_all(reader, stream)

    assert lines == [f"line {number} → ok" for number in range(1000)] + ["end"]


def test_lines_lost_to_a_full_queue_are_reported_where_they_are_missing(
    pipe: tuple[int, int],
) -> None:
    reader, writer = pipe
    stream = BackgroundStream(writer, most_bytes=10_000)
    stream.report_loss = lambda lines: f"lost {lines}\n"

    for _ in range(1000):
        stream.write(LINE)
    lines = read_all(reader, stream)

    kept = lines.count("x" * 99)
    assert lines == ["x" * 99] * kept + [f"lost {1000 - kept}", "end"]
    assert 100 <= kept <= 150  # the queue and the pipe


def test_a_text_larger_than_the_queue_is_lost_and_no_other(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    stream = BackgroundStream(writer, most_bytes=1000)
    stream.report_loss = lambda lines: f"lost {lines}\n"

    stream.write("a\n")
    assert stream.drain(PATIENCE_S)
    stream.write("y\n" * 1000)
    stream.write("b\n")

    assert read_all(reader, stream) == ["a", "lost 1000", "b", "end"]


def test_drain_returns_false_at_its_timeout(pipe: tuple[int, int]) -> None:
    stream = BackgroundStream(pipe[1])
    stream.write(LINE * 100)

    assert not stream.drain(0.05)
    os.read(pipe[0], 4096)
    os.read(pipe[0], 4096)
    os.read(pipe[0], 4096)
    assert stream.drain(PATIENCE_S)


def test_a_non_blocking_descriptor_loses_nothing(pipe: tuple[int, int]) -> None:
    reader, writer = pipe
    os.set_blocking(writer, False)
    stream = BackgroundStream(writer)
    for _ in range(1000):
        stream.write(LINE)

    assert read_all(reader, stream) == ["x" * 99] * 1000 + ["end"]


def test_a_reader_that_returns_reads_how_many_lines_were_lost(tmp_path: Path) -> None:
    fifo = tmp_path / "log"
    os.mkfifo(fifo)
    first = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(fifo, os.O_WRONLY)
    stream = BackgroundStream(writer)
    os.close(first)

    stream.write("a\nb\n")
    stream.write("c\n")
    assert stream.drain(PATIENCE_S)
    second = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    stream.write("d\n")
    assert stream.drain(PATIENCE_S)

    assert os.read(second, 1000) == b"(lines lost here: 3)\nd\n"
    os.close(second)
    os.close(writer)


def test_a_line_that_was_cut_off_is_followed_by_a_line_end(tmp_path: Path) -> None:
    path = tmp_path / "log"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    stream = BackgroundStream(descriptor)
    took: list[int] = []
    really = os.write

    def half(number: int, data: bytes) -> int:
        took.append(len(data))
        if number != descriptor or len(took) > 2:
            return really(number, data)
        if len(took) == 2:
            raise OSError(28, "No space left on device")
        return really(number, data[:3])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "write", half)
        stream.write("first\n")
        assert stream.drain(PATIENCE_S)
        stream.write("second\n")
        assert stream.drain(PATIENCE_S)

    assert path.read_text() == "fir\n(lines lost here: 1)\nsecond\n"
    os.close(descriptor)


def test_the_stream_behaves_like_a_text_stream(pipe: tuple[int, int]) -> None:
    stream = BackgroundStream(pipe[1], encoding="latin-1")

    assert stream.write("ä→\n") == 3
    assert (stream.encoding, stream.isatty(), stream.fileno()) == ("latin-1", False, pipe[1])
    with pytest.raises(AttributeError):
        stream.write(b"bytes")  # type: ignore[arg-type]
    assert stream.drain(PATIENCE_S)
    assert os.read(pipe[0], 100) == b"\xe4\\u2192\n"


def test_a_loss_is_written_in_plain_text_if_its_report_fails(pipe: tuple[int, int]) -> None:
    def fail(_: int) -> str:
        raise ValueError("a defect in a processor")

    reader, writer = pipe
    stream = BackgroundStream(writer, most_bytes=1000)
    stream.report_loss = fail

    stream.write("y\n" * 1000)

    assert read_all(reader, stream) == ["(lines lost here: 1000)", "end"]
