"""Parses the index (`-shm`) of a SQLite log, which says what log and database file contain.

The layout is in https://sqlite.org/walformat.html, section 2. If two readings of the index are
equal, its content was true of the files between the readings, because SQLite changes the files in
this order:

- A commit writes its frames into the log, and then their number into the index.
- A new log begins as an index without frames; then the log's header is written, or the log is cut.
- A checkpoint notes in the index how far it will copy, writes the database file, and notes the end.
"""

from __future__ import annotations

import struct
from typing import Final

from runrecovery_service.lazy_dataclass import dataclass

SIZE: Final = 132
LOG_HEADER_SIZE: Final = 32
FRAME_HEADER_SIZE: Final = 24
_HEADER: Final = struct.Struct("=IIIBBHIIII8s8s")
_CHECKPOINT: Final = struct.Struct("=I28xI")
_MARKS: Final = 100
"""The offset of the marks of readers, which change without a change of the content."""
_AFTER_MARKS: Final = 128
_VERSION: Final = 3_007_000


@dataclass(frozen=True, slots=True)
class Frame:
    """A committed frame of the log. SQLite does not rewrite a frame while the salt is the same."""

    number: int
    salt: bytes
    checksum: bytes
    page_size: int

    @property
    def offset(self) -> int:
        """The offset of the frame in the log, in bytes."""
        return LOG_HEADER_SIZE + (self.number - 1) * (FRAME_HEADER_SIZE + self.page_size)

    @property
    def end(self) -> int:
        """The offset of the frame's end in the log, in bytes."""
        return self.offset + FRAME_HEADER_SIZE + self.page_size

    def is_in(self, header: bytes) -> bool:
        """Return whether these bytes are the header of this frame."""
        return header[8:24] == self.salt + self.checksum


@dataclass(frozen=True, slots=True)
class WalIndex:
    """The content of the index, as far as the service uses it.

    Attributes:
        change: counts the changes of the index.
        last: the last committed frame.
        copied: how many frames are also in the database file.
        copying: how many frames a checkpoint has started to copy.
    """

    change: int
    last: Frame
    copied: int
    copying: int

    @property
    def file_state(self) -> tuple[bytes, int] | None:
        """A value that changes whenever SQLite has written into the database file.

        None while SQLite may be writing.
        """
        settled = self.copied == self.copying <= self.last.number
        return (self.last.salt, self.copied) if settled else None


def parse(raw: bytes) -> WalIndex | None:
    """Return the content of an index; None while SQLite is writing it.

    Args:
        raw: the first `SIZE` bytes of the file.
    """
    if len(raw) < SIZE or raw[:48] != raw[48:96]:
        return None
    version, _, change, ready, _, size, frames, _, sum1, sum2, salt, _ = _HEADER.unpack(raw[:48])
    if version != _VERSION or not ready:
        return None
    page_size = 65536 if size == 1 else size
    copied, copying = _CHECKPOINT.unpack(raw[96:SIZE])
    last = Frame(frames, salt, struct.pack(">II", sum1, sum2), page_size)
    return WalIndex(change, last, copied, copying)


def is_same(raw: bytes, other: bytes) -> bool:
    """Return whether two readings have the same content. The marks of readers do not count."""
    return raw[:_MARKS] == other[:_MARKS] and raw[_AFTER_MARKS:] == other[_AFTER_MARKS:]
