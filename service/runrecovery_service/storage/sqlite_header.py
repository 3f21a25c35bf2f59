"""The header of a SQLite file: its first 100 bytes, which identify the application."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Final

from runrecovery_service.domain.start_errors import DatabaseRefused

APPLICATION_ID: Final = 0x52524356
"""The application id in the header of every SQLite file of this service: `RRCV`."""
APPLICATION_ID_BYTES: Final = APPLICATION_ID.to_bytes(4, "big")
SQLITE_HEADER_SIZE: Final = 100
SQLITE_MAGIC: Final = b"SQLite format 3\0"


def check_header(path: Path) -> None:
    """Refuse a file of another application, before SQLite opens the file and may change it.

    Raises:
        DatabaseRefused: the file is empty, belongs to another application, or has a second hard
            link.
    """
    with path.open("rb") as file:
        header = file.read(SQLITE_HEADER_SIZE)
        links = os.fstat(file.fileno()).st_nlink
    if not header:
        raise DatabaseRefused(str(path), "is empty; it was truncated, or never filled")
    if not header.startswith(SQLITE_MAGIC) or len(header) < SQLITE_HEADER_SIZE:
        raise DatabaseRefused(str(path), "is not a SQLite database")
    (application_id,) = struct.unpack(">I", header[68:72])
    if application_id != APPLICATION_ID:
        raise DatabaseRefused(str(path), "belongs to another application")
    # SQLite keeps one log per name: a start would miss the commits in the log of the other name.
    if links > 1:
        raise DatabaseRefused(str(path), "has another name (a hard link); remove the other name")
