"""Identifies files, to compare two paths, or a path and an open file."""

from __future__ import annotations

import os
from pathlib import Path


def identity(path: str | Path) -> tuple[int, int] | None:
    """Return the device and inode of the file at a path; None if there is no file."""
    try:
        return identity_of(os.stat(path))  # noqa: PTH116 - three times as fast as `Path.stat`, and called in every transaction
    except (FileNotFoundError, NotADirectoryError):
        return None


def identity_of(found: os.stat_result) -> tuple[int, int]:
    """Return the device and inode of a file."""
    return found.st_dev, found.st_ino
