"""What an edit of a trust entry did, and what all editors have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from typing import Final, Protocol, TypeAlias

from runrecovery_service.trust.errors import FolderUnusable, TrustFileUnusable, UnusableReason


class Made(Enum):
    """A container of the entry that was not there before us."""

    FILE = "file"
    DOCUMENT = "document"
    """The file was empty, or held white space alone."""
    PROJECTS = "projects"
    FOLDER = "folder"


RESERVE: Final = 64 << 10
"""Bytes by which a file that has an entry of ours can grow before no other goes in."""

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
        """Return what `to_json` wrote.

        Raises:
            ValueError, TypeError, RecursionError: it did not write this.
        """
        owned, previous, made, lead, trail = json.loads(text)
        words = (lead, trail, "" if previous is None else previous)
        if not isinstance(owned, bool) or not isinstance(made, list):
            raise TypeError("no entry")
        if not all(isinstance(word, str) for word in words) or (lead + trail).strip(" \t\r\n"):
            raise TypeError("no entry")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Removals:
    """A new text for the file, and what was found of each of several folders."""

    text: bytes | None
    outcomes: Mapping[str, Outcome]


class Editor(Protocol):
    """One CLI's trust entries. Pure: bytes of the file in (None: no file), bytes out."""

    def accepts(self, added: Added) -> bool:
        """Tell whether this can be what an `add` of this editor told: a record may be damaged."""
        ...

    def add(
        self, text: bytes | None, folder: str, standing: Mapping[str, Added] | None = None
    ) -> Edit:
        """Let the CLI trust `folder`. A folder that it trusts already changes nothing.

        Args:
            standing: our entries in this file, by folder, as their `add` told. One of this same
                folder stays what it is.

        Raises:
            TrustFileUnusable: the text cannot be edited safely, or would be so long that it could
                not grow by `RESERVE` and still be edited.
            FolderUnusable: the name cannot be an entry.
        """
        ...

    def remove(self, text: bytes | None, folder: str, added: Added) -> Removal:
        """Take out what `add` put in, and containers of our making that are empty again.

        Raises:
            TrustFileUnusable: the text cannot be edited safely.
        """
        ...

    def remove_all(self, text: bytes | None, entries: Mapping[str, Added]) -> Removals:
        """Do what `remove` of each folder, one after the other, does.

        Raises:
            TrustFileUnusable: the text cannot be edited safely.
        """
        ...


RemoveSome: TypeAlias = Callable[[bytes | None, Mapping[str, Added]], Removals]
"""Takes out those of several entries that can go at one time; none, if that cannot be told."""


def in_rounds(
    editor: Editor, some: RemoveSome, text: bytes | None, entries: Mapping[str, Added]
) -> Removals:
    """Take out several entries: many with one look at the text, which takes long for a long one.

    Raises:
        TrustFileUnusable: the text cannot be edited safely.
    """
    outcomes: dict[str, Outcome] = {}
    most = len(entries)
    while left := {each: entries[each] for each in entries if each not in outcomes}:
        portion = dict(islice(left.items(), most))
        try:
            removals = some(text, portion) if len(portion) > 1 else _one(editor, text, portion)
        except TrustFileUnusable as error:
            if error.reason is not UnusableReason.NOT_PROVED or len(portion) == 1:
                raise
            most = len(portion) // 2  # one of them spoils it; it will be alone
            continue
        if not removals.outcomes:
            most = 1
        text, outcomes = removals.text, outcomes | dict(removals.outcomes)
    return Removals(text=text, outcomes=outcomes)


def _one(editor: Editor, text: bytes | None, entries: Mapping[str, Added]) -> Removals:
    ((folder, added),) = entries.items()
    removal = editor.remove(text, folder, added)
    return Removals(text=removal.text, outcomes={folder: removal.outcome})


def with_reserve(text: bytes, most: int) -> bytes:
    """Return the text, if it is shorter than what can be edited by so much.

    Raises:
        TrustFileUnusable: it is not.
    """
    if len(text) > most - RESERVE:
        raise TrustFileUnusable(
            UnusableReason.TOO_LARGE,
            f"{len(text)} bytes with the entry, more than {most - RESERVE}",
        )
    return text


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
