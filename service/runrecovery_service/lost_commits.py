"""Notes on disk that the database has lost commits, until a recovery report contains the loss."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import structlog

from runrecovery_service.domain.errors import CommitsLost
from runrecovery_service.process.safe_open import read_start
from runrecovery_service.storage.durable_files import durably_write

NOTE_FILE: Final = ".lost-commits"

log = structlog.get_logger()


@contextmanager
def losses_noted(data_dir: Path) -> Iterator[None]:
    """Write the note to the data directory if the block raises CommitsLost."""
    try:
        yield
    except CommitsLost as error:
        note_loss(data_dir, str(error), prefix="an earlier start of this instance ended: ")
        raise


def note_loss(data_dir: Path, reason: str, *, prefix: str = "") -> None:
    """Log a loss, and write the note.

    Args:
        prefix: text before the reason, only in the note.
    """
    log.critical("storage.commits_lost", reason=reason)
    try:
        durably_write(data_dir / NOTE_FILE, f"{prefix}{reason}\n".encode())
    except OSError as failure:
        log.warning("storage.loss_not_noted", error=failure.strerror)


def noted_loss(data_dir: Path) -> str | None:
    """Return the note; None if there is none."""
    place = data_dir / NOTE_FILE
    try:
        return read_start(place).decode("utf-8", "replace").strip() or None
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"{place} cannot be read: {error.strerror}"


def forget_loss(data_dir: Path) -> None:
    """Remove the note. Call this once a committed report contains it."""
    if os.path.lexists(place := data_dir / NOTE_FILE):
        try:
            place.unlink()
        except OSError as error:  # the next report repeats the note
            log.warning("storage.loss_not_noted", error=error.strerror)
