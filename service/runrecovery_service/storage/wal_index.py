"""Parses the index of a SQLite log (`-shm`): what the log and the database file must contain.

The layout is that of https://sqlite.org/walformat.html, section 2. SQLite changes the files in this
order. Two equal readings of the index prove what the files contained between the readings:

- A commit writes its frames into the log, and then their number into the index.
- A new log begins in the index, without frames; then its header is written, or the log is cut.
- A checkpoint notes how far it will go, writes into the database file, and notes that it is done.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

SIZE: Final = 132
LOG_HEADER_SIZE: Final = 32
FRAME_HEADER_SIZE: Final = 24
_HEADER: Final = struct.Struct("=IIIBBHIIII8s8s")
_CHECKPOINT: Final = struct.Struct("=I28xI")
_VERSION: Final = 3_007_000


@dataclass(frozen=True, slots=True)
class Frame:
    """A committed frame of the log. SQLite does not rewrite it while the salt stays."""

    number: int
    salt: bytes
    checksum: bytes
    page_size: int

    @property
    def offset(self) -> int:
        """The offset of the frame in the log."""
        return LOG_HEADER_SIZE + (self.number - 1) * (FRAME_HEADER_SIZE + self.page_size)

    @property
    def end(self) -> int:
        """The offset after the frame in the log."""
        return self.offset + FRAME_HEADER_SIZE + self.page_size

    def is_in(self, header: bytes) -> bool:
        """Return True if these bytes are the header of this frame."""
        return header[8:24] == self.salt + self.checksum


@dataclass(frozen=True, slots=True)
class WalIndex:
    """The content of the index.

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
        """A value that stays equal while SQLite does not write into the database file.

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
