"""The errors of editing a trust file. Each of them means that the file was not changed.

TrustError
├── TrustFileUnusable   the file, or its content, cannot be edited safely
├── FolderUnusable      the folder's name cannot be an entry
├── TrustFileBusy       others hold the lock or write the file too often; retry later
├── TrustFileOutOfReach the system refused: permission, a full disk, a read-only folder
└── HomeUnknown         the environment does not say where the file is
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path

from runrecovery_service.lazy_dataclass import dataclass


class UnusableReason(Enum):
    """Why a trust file cannot be edited."""

    NOT_UTF8 = "not_utf8"
    """The content is not UTF-8."""
    NOT_PARSABLE = "not_parsable"
    """The content is not TOML 1.0, or not JSON (without comments)."""
    TOO_LARGE = "too_large"
    TOO_DEEP = "too_deep"
    """The content has deeper nesting or longer dotted keys than any real file."""
    UNEXPECTED_SHAPE = "unexpected_shape"
    """The content has a value of another type where a table, an object or a text is expected."""
    NOT_PROVED = "not_proved"
    """The edit would have changed more than our entry: a defect of the service, without harm."""
    NOT_REGULAR = "not_regular"
    """The file is a pipe, a folder or a device."""
    LINKED = "linked"
    """The file has a second name (a hard link), which would still show the old content."""
    READ_ONLY = "read_only"
    """The file's mode lets nobody write it, so its owner wants to keep it unchanged."""
    OWNER_LOST = "owner_lost"
    """A new file cannot get the owner or the group of the old one."""


class TrustError(Exception):
    """Root of the tree. Subclasses carry fields. Their text is for people."""


@dataclass(eq=False)
class TrustFileUnusable(TrustError):
    """The file cannot be edited safely, and stays unchanged.

    Attributes:
        detail: for people. It contains no text of the file, which may be secret.
    """

    reason: UnusableReason
    detail: str

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}"


@dataclass(eq=False)
class FolderUnusable(TrustError):
    """The folder's name cannot be an entry."""

    folder: str
    detail: str

    def __str__(self) -> str:
        return f"{self.folder!r} {self.detail}"


@dataclass(eq=False)
class TrustFileBusy(TrustError):
    """Others use the file. Retry later."""

    path: Path
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.detail}"


@dataclass(eq=False)
class TrustFileOutOfReach(TrustError):
    """The system refused an operation on the file. `errno` says why."""

    path: Path
    errno: int
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.detail}"


@dataclass(eq=False)
class HomeUnknown(TrustError):
    """A variable is missing or is not an absolute path."""

    variable: str

    def __str__(self) -> str:
        return f"{self.variable} is not an absolute path"
