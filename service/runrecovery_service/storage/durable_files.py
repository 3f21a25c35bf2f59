"""Writes files so that they survive a power cut."""

from __future__ import annotations

import os
from pathlib import Path


def durably_write(path: Path, data: bytes) -> None:
    """Write a file, and sync both the file and its directory."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, data)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Sync a directory, so that new names in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
