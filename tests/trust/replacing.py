"""The simplest edit of a file, and the backups and temporary files that it leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from runrecovery_service.trust import files


@dataclass(frozen=True, slots=True)
class NewText:
    """The decision of an edit: the new content of the file; None: no file."""

    text: bytes | None


class EditOptions(TypedDict, total=False):
    """The options of `files.edit`."""

    record: Callable[[NewText], object]
    done: Callable[[NewText], object]
    lock_wait_s: float
    pause: Callable[[float], object]


def replace_text(path: Path, text: bytes | None, **options: Unpack[EditOptions]) -> NewText:
    """Give a file this content."""
    return files.edit(path, lambda _: NewText(text), **options)


def side_files(folder: Path) -> list[str]:
    """Return the names of backups and temporary files; the lock is not among them."""
    found = [name for name in names(folder) if "runrecovery" in name]
    return [name for name in found if not name.endswith(".lock")]


def names(folder: Path) -> list[str]:
    """Return the names of everything in a folder."""
    return sorted(path.name for path in folder.iterdir())


def no_pause(_: float) -> None:
    """Do not wait: in this test, no other program writes."""
