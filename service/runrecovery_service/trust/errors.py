"""What can be wrong with a trust file. Nothing was changed in it whenever one of these is raised.

TrustError
├── TrustFileUnusable   what the file is or holds cannot be edited safely
├── FolderUnusable      the folder's name cannot be an entry
├── TrustFileBusy       others hold the lock, or write it too often; later it may work
├── TrustFileOutOfReach the system refused: permission, a full disk, a read-only folder
└── HomeUnknown         the environment does not say where the file is
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path


class UnusableReason(Enum):
    """Why a trust file is left alone."""

    NOT_UTF8 = "not_utf8"
    """Its bytes are no UTF-8 text."""
    NOT_PARSABLE = "not_parsable"
    """It is not what its name says, by the rules of TOML 1.0 or of JSON (without comments)."""
    TOO_LARGE = "too_large"
    TOO_DEEP = "too_deep"
    """Nested more deeply, or named by longer dotted keys, than any real file is."""
    UNEXPECTED_SHAPE = "unexpected_shape"
    """Where a table, an object or a plain value should be, there is something else."""
    NOT_PROVED = "not_proved"
    """The new text would have changed more than our entry. A defect of ours, without a victim."""
    NOT_REGULAR = "not_regular"
    """A pipe, a folder, a device."""
    LINKED = "linked"
    """It has a second name (a hard link), which would keep the old text."""
    READ_ONLY = "read_only"
    """Nobody may write it, by its mode: somebody wants it to stay as it is."""
    OWNER_LOST = "owner_lost"
    """A new file could not be given the owner or the group of the old one."""


class TrustError(Exception):
    """Root of the tree. Subclasses carry fields; their text is for people."""


@dataclass(eq=False)
class TrustFileUnusable(TrustError):
    """The file is left as it is, byte for byte.

    Attributes:
        detail: for people; never holds text of the file, which may be secret.
    """

    reason: UnusableReason
    detail: str

    def __str__(self) -> str:
        return f"{self.reason.value}: {self.detail}"


@dataclass(eq=False)
class FolderUnusable(TrustError):
    """No CLI could find an entry of that name."""

    folder: str
    detail: str

    def __str__(self) -> str:
        return f"{self.folder!r} {self.detail}"


@dataclass(eq=False)
class TrustFileBusy(TrustError):
    """Try again later."""

    path: Path
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.detail}"


@dataclass(eq=False)
class TrustFileOutOfReach(TrustError):
    """The system refused something; `errno` says what."""

    path: Path
    errno: int
    detail: str

    def __str__(self) -> str:
        return f"{self.path}: {self.detail}"


@dataclass(eq=False)
class HomeUnknown(TrustError):
    """A variable is missing, or is no absolute path."""

    variable: str

    def __str__(self) -> str:
        return f"{self.variable} is not an absolute path"
