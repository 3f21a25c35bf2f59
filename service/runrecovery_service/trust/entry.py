"""The result of an edit of a trust entry, and what all editors share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from enum import Enum
from itertools import islice
from typing import Final, Protocol, TypeAlias

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.trust.errors import FolderUnusable, TrustFileUnusable, UnusableReason


class Made(Enum):
    """A container of a trust entry. A record lists the containers that the service has created."""

    FILE = "file"
    DOCUMENT = "document"
    """The document; the file was empty or blank before."""
    PROJECTS = "projects"
    FOLDER = "folder"


RESERVE: Final = 64 << 10
"""A file gets an entry only if it can grow by this many bytes afterwards and still be edited."""

SHARED: Final = frozenset({Made.FILE, Made.DOCUMENT, Made.PROJECTS})
"""Containers of the entries of several folders. Every entry in such a container records that the
service created it, so that the removal of the last entry also removes the container."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    """The record of an entry that `add` has written. Store it, because `remove` needs it.

    Attributes:
        owned: the service added the entry. False: the folder was already trusted, so `remove` does
            nothing.
        previous: the text of the value that was replaced; None: there was none.
        made: the containers that this entry, or an earlier entry of ours, has created.
        lead, trail: white space that was written around the entry (TOML only).
    """

    owned: bool
    previous: str | None = None
    made: frozenset[Made] = frozenset()
    lead: str = ""
    trail: str = ""

    def to_json(self) -> str:
        """Return the text to store."""
        made = sorted(each.value for each in self.made)
        return json.dumps([self.owned, self.previous, made, self.lead, self.trail])

    @classmethod
    def from_json(cls, text: str) -> Added:
        """Return the value of a stored text.

        Raises:
            ValueError, TypeError, RecursionError: `to_json` did not write this text.
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
    """The new content of the file, and what to store for the removal."""

    text: bytes | None
    added: Added


class Outcome(Enum):
    """The outcome of `remove`."""

    REMOVED = "removed"
    RESTORED = "restored"
    """The previous value is back."""
    GONE = "gone"
    """The entry is not in the file, so there was nothing to do."""
    CHANGED = "changed"
    """Another program or a person has changed the entry, so it stays."""
    NOT_OURS = "not_ours"
    """The service did not add the entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removal:
    """The result of `remove`.

    Attributes:
        text: the new content of the file. None: there is no file, or the service created the file
            and it is to be removed.
    """

    text: bytes | None
    outcome: Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Removals:
    """The new content of the file, as in `Removal`, and the outcome for each folder."""

    text: bytes | None
    outcomes: Mapping[str, Outcome]


class Editor(Protocol):
    """Edits one CLI's trust entries. Pure: it gets and returns content (None: no file)."""

    def accepts(self, added: Added) -> bool:
        """Return whether `add` can have returned this record. A stored record can be damaged."""
        ...

    def add(
        self, text: bytes | None, folder: str, recorded: Mapping[str, Added] | None = None
    ) -> Edit:
        """Return the edit that lets the CLI trust `folder`. A trusted folder changes nothing.

        Args:
            recorded: our entries in this file, by folder, as `add` returned them. An entry of
                `folder` itself is returned unchanged.

        Raises:
            TrustFileUnusable: the text cannot be edited safely, or would become too long to grow
                by `RESERVE` and still be edited.
            FolderUnusable: the name cannot be an entry.
        """
        ...

    def remove(self, text: bytes | None, folder: str, added: Added) -> Removal:
        """Return the edit that removes the entry, and containers of ours that become empty.

        Raises:
            TrustFileUnusable: the text cannot be edited safely.
        """
        ...

    def remove_all(self, text: bytes | None, entries: Mapping[str, Added]) -> Removals:
        """Return the same edit as calling `remove` for each folder in turn.

        Raises:
            TrustFileUnusable: the text cannot be edited safely.
        """
        ...


RemoveSome: TypeAlias = Callable[[bytes | None, Mapping[str, Added]], Removals]
"""Removes several entries at once, as far as that is certain to be safe; perhaps none."""


def in_rounds(
    editor: Editor, some: RemoveSome, text: bytes | None, entries: Mapping[str, Added]
) -> Removals:
    """Remove several entries. One parse of the text serves many entries, because it takes long.

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
            most = len(portion) // 2  # one entry is the cause; halve until it is alone
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
    """Return the text if it can grow by `RESERVE` bytes.

    Raises:
        TrustFileUnusable: it cannot.
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
        FolderUnusable: the name is not absolute, contains a NUL, or is not UTF-8 (Python shows
            such bytes as lone surrogates, which none of these files can contain).
    """
    if not folder.startswith("/"):
        raise FolderUnusable(folder, "is not an absolute path")
    if "\0" in folder:
        raise FolderUnusable(folder, "contains a NUL")
    if any("\ud800" <= char <= "\udfff" for char in folder):
        raise FolderUnusable(folder, "is not UTF-8 text")


def inherited(recorded: Mapping[str, Added] | None) -> frozenset[Made]:
    """Return the shared containers that entries of ours have created."""
    made: frozenset[Made] = frozenset()
    for added in (recorded or {}).values():
        made |= added.made
    return made & SHARED


def unchanged(text: bytes | None, folder: str, recorded: Mapping[str, Added] | None) -> Edit:
    """Return the edit for a folder that is already trusted, by an entry of ours or another."""
    return Edit(text=text, added=(recorded or {}).get(folder, Added(owned=False)))
