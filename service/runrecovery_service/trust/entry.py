"""What an edit of a trust entry did, and what all editors have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from runrecovery_service.trust.errors import FolderUnusable


class Made(Enum):
    """A container of the entry that was not there before us."""

    FILE = "file"
    DOCUMENT = "document"
    """The file was empty, or held white space alone."""
    PROJECTS = "projects"
    FOLDER = "folder"


SHARED: Final = frozenset({Made.FILE, Made.DOCUMENT, Made.PROJECTS})
"""Containers that entries of several folders live in. Each entry of ours in one that we made knows
that we did, so that whichever goes last can take it along."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """What `add` did for one folder: all that `remove` needs to know. Keep it until then.

    Attributes:
        owned: the entry is ours; False: the folder was trusted already, `remove` will do nothing.
        previous: the value that ours has replaced, as it was written; None: there was none.
        made: the containers that we made, or that an entry of ours before this one has made.
        lead, trail: white space that was written around the entry (TOML alone).
    """

    owned: bool
    previous: str | None = None
    made: frozenset[Made] = frozenset()
    lead: str = ""
    trail: str = ""

    def to_json(self) -> str:
        """Return it as text for a row."""
        made = sorted(each.value for each in self.made)
        return json.dumps([self.owned, self.previous, made, self.lead, self.trail])

    @classmethod
    def from_json(cls, text: str) -> Added:
        """Return what `to_json` wrote."""
        owned, previous, made, lead, trail = json.loads(text)
        return cls(
            owned=owned,
            previous=previous,
            made=frozenset(map(Made, made)),
            lead=lead,
            trail=trail,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """A new text for the file, and what is to be kept of how it came about."""

    text: bytes | None
    added: Added


class Outcome(Enum):
    """What `remove` found."""

    REMOVED = "removed"
    RESTORED = "restored"
    """The value of before is back."""
    GONE = "gone"
    """It is not there (any more): nothing to do."""
    CHANGED = "changed"
    """Somebody has changed it since; it is theirs now, and was left."""
    NOT_OURS = "not_ours"
    """It was never ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """A new text for the file (None: the file is to go, it was not there before us)."""

    text: bytes | None
    outcome: Outcome


class Editor(Protocol):
    """One CLI's trust entries. Pure: bytes of the file in (None: no file), bytes out."""

    def add(
        self, text: bytes | None, folder: str, standing: Mapping[str, Added] | None = None
    ) -> Edit:
        """Let the CLI trust `folder`. A folder that it trusts already changes nothing.

        Args:
            standing: our entries in this file, by folder, as their `add` told. One of this same
                folder stays what it is.

        Raises:
            TrustFileUnusable: the text cannot be edited safely.
            FolderUnusable: the name cannot be an entry.
        """
        ...

    def remove(self, text: bytes | None, folder: str, added: Added) -> Removal:
        """Take out what `add` put in, and containers of our making that are empty again.

        Raises:
            TrustFileUnusable: the text cannot be edited safely.
        """
        ...


def check_folder(folder: str) -> None:
    """Check that the name can be an entry.

    Raises:
        FolderUnusable: it is not absolute, holds a NUL, or bytes that are no UTF-8 (which Python
            shows as lone surrogates, and which none of these files can hold).
    """
    if not folder.startswith("/"):
        raise FolderUnusable(folder, "is no absolute path")
    if "\0" in folder:
        raise FolderUnusable(folder, "holds a NUL")
    if any("\ud800" <= char <= "\udfff" for char in folder):
        raise FolderUnusable(folder, "is no UTF-8 text")


def inherited(standing: Mapping[str, Added] | None) -> frozenset[Made]:
    """Return the shared containers that entries of ours have made."""
    made: frozenset[Made] = frozenset()
    for added in (standing or {}).values():
        made |= added.made
    return made & SHARED


def unchanged(text: bytes | None, folder: str, standing: Mapping[str, Added] | None) -> Edit:
    """Return the edit of a folder that is trusted already: by an entry of ours, or not by us."""
    return Edit(text=text, added=(standing or {}).get(folder, Added(owned=False)))
