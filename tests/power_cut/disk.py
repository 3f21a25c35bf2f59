"""A disk that a power cut catches: which states POSIX lets it have afterwards.

A file keeps what was written before the last sync of it. Of the sectors that were written later,
any may be there, and any may be missing. A directory keeps the names that it had at its last sync,
and any number of the later changes, in their order. A new file is lost with its name, whatever was
synced of its content.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final, TypeAlias

from power_cut.trace import Call

SECTOR: Final = 512


@dataclass(frozen=True, slots=True)
class Write:
    """Data that was written at an offset, in one call."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Truncate:
    """A new size of a file."""

    size: int


Change: TypeAlias = Write | Truncate


@dataclass(slots=True, eq=False)
class File:
    """A file, whatever its names are.

    Attributes:
        synced: its content at the last sync.
        changes: the later changes, each with the number of calls that had ended before it.
        size: with all changes.
    """

    synced: bytearray = field(default_factory=bytearray)
    changes: list[tuple[int, Change]] = field(default_factory=list)
    size: int = 0

    def change(self, number: int, change: Change) -> None:
        """Change the content without a sync."""
        self.changes.append((number, change))
        end = change.size if isinstance(change, Truncate) else change.offset + len(change.data)
        self.size = end if isinstance(change, Truncate) else max(self.size, end)

    def sync(self, begun_after: int) -> None:
        """Make the changes durable that were made before the sync began."""
        kept = []
        for number, change in self.changes:
            if number < begun_after:
                apply(self.synced, change)
            else:
                kept.append((number, change))
        self.changes = kept

    def content(self) -> bytes:
        """Return the content with all changes."""
        content = bytearray(self.synced)
        for _, change in self.changes:
            apply(content, change)
        return bytes(content)

    def after_cut(self, pick: Picker) -> bytes:
        """Return the content after a power cut."""
        content = bytearray(self.synced)
        for change in pick.changes([change for _, change in self.changes]):
            apply(content, change)
        return bytes(content)


@dataclass(frozen=True, slots=True)
class Entry:
    """A change of a directory: a name for a file or directory, or none any more."""

    name: str
    node: File | Directory | None


@dataclass(slots=True, eq=False)
class Directory:
    """A directory.

    Attributes:
        synced: its entries at the last sync.
        changes: the later changes, each with the number of calls that had ended before it. The
            changes of one rename are one element.
        names: the entries with all changes.
    """

    synced: dict[str, File | Directory] = field(default_factory=dict)
    changes: list[tuple[int, tuple[Entry, ...]]] = field(default_factory=list)
    names: dict[str, File | Directory] = field(default_factory=dict)

    def put(self, name: str, node: File | Directory) -> None:
        """Add a durable entry."""
        self.synced[name] = self.names[name] = node

    def change(self, number: int, *entries: Entry) -> None:
        """Change entries, all or none, without a sync."""
        self.changes.append((number, entries))
        _apply_entries(self.names, entries)

    def sync(self, begun_after: int) -> None:
        """Make the changes durable that were made before the sync began."""
        for number, entries in self.changes:
            if number < begun_after:
                _apply_entries(self.synced, entries)
        self.changes = [change for change in self.changes if change[0] >= begun_after]


def _apply_entries(names: dict[str, File | Directory], entries: Iterable[Entry]) -> None:
    for entry in entries:
        if entry.node is None:
            names.pop(entry.name, None)
        else:
            names[entry.name] = entry.node


def apply(content: bytearray, change: Change) -> None:
    """Apply a change to the content of a file."""
    if isinstance(change, Truncate):
        del content[change.size :]
        content.extend(bytes(change.size - len(content)))
        return
    content.extend(bytes(max(0, change.offset - len(content))))
    content[change.offset : change.offset + len(change.data)] = change.data


class Picker:
    """Chooses what of the unsynced changes a power cut leaves. One kind of choice for each cut."""

    def __init__(self, rng: Random) -> None:
        self._rng = rng
        self._kind = rng.choice(("nothing", "everything", "some", "beginning"))

    def changes(self, changes: list[Change]) -> list[Change]:
        """Return the changes of a file that reach the disk, cut into sectors."""
        match self._kind:
            case "nothing":
                return []
            case "everything":
                return changes
            case "beginning":
                return changes[: self._rng.randint(0, len(changes))]
            case _:
                pieces = [piece for change in changes for piece in _sectors(change)]
                share = self._rng.random()
                return [piece for piece in pieces if self._rng.random() < share]

    def names(self, count: int) -> int:
        """Return how many of `count` changes of a directory reach the disk: the first ones."""
        match self._kind:
            case "nothing":
                return 0
            case "everything":
                return count
            case _:
                return self._rng.randint(0, count)


def _sectors(change: Change) -> list[Change]:
    if isinstance(change, Truncate):
        return [change]
    pieces: list[Change] = []
    at, end = change.offset, change.offset + len(change.data)
    while at < end:
        upto = min(end, (at // SECTOR + 1) * SECTOR)
        pieces.append(Write(at, change.data[at - change.offset : upto - change.offset]))
        at = upto
    return pieces


class Disk:
    """The files below one directory, which is itself durable.

    Apply calls in their order, and look at any moment at what a power cut would leave.
    """

    def __init__(self, root: str, files: Mapping[str, bytes]) -> None:
        """Make the disk.

        Args:
            files: what is there and durable before the first call, by path below the root.
        """
        self._root = root
        self.top = Directory()
        self._calls = 0
        for path, content in files.items():
            *folders, name = path.split("/")
            directory = self.top
            for folder in folders:
                found = directory.names.get(folder)
                inner = found if isinstance(found, Directory) else Directory()
                directory.put(folder, inner)
                directory = inner
            directory.put(name, File(synced=bytearray(content), size=len(content)))

    def apply(self, call: Call) -> None:
        """Apply the next call; one that changes nothing below the root has no effect."""
        handler = getattr(self, f"_on_{_FAMILY.get(call.name, call.name)}", None)
        if handler is None:
            raise NotImplementedError(f"{call.name}({call.arguments})")
        handler(call)
        self._calls += 1

    # -- calls ---------------------------------------------------------------------------------

    def _on_open(self, call: Call) -> None:
        if "O_TMPFILE" in call.arguments and self._is_below(call.opened):
            raise NotImplementedError(call.arguments)
        file = call.opened
        if not self._is_below(file) or not (
            "O_CREAT" in call.arguments or "O_TRUNC" in call.arguments
        ):
            return
        found = self._find(file)
        if found is None:
            self._name(file, File())
        elif "O_TRUNC" in call.arguments and isinstance(found, File) and found.size:
            found.change(self._calls, Truncate(0))

    def _on_write(self, call: Call) -> None:
        file = self._file_of(call)
        if file is not None and call.result:
            (data,) = call.strings()
            # Every file of the service that is written without an offset is appended to.
            file.change(self._calls, Write(file.size, data[: call.result]))

    def _on_pwrite64(self, call: Call) -> None:
        file = self._file_of(call)
        if file is not None:
            (data,) = call.strings()
            file.change(self._calls, Write(call.numbers()[-1], data[: call.result]))

    def _on_ftruncate(self, call: Call) -> None:
        file = self._file_of(call)
        if file is not None:
            file.change(self._calls, Truncate(call.numbers()[-1]))

    def _on_sync(self, call: Call) -> None:
        (path,) = call.files()
        node = self._find(path) if path is not None and self._is_below(path) else None
        if node is not None:
            node.sync(call.begun_after)

    def _on_mkdir(self, call: Call) -> None:
        path = self._path(call)
        if self._is_below(path):
            self._name(path, Directory())

    def _on_remove(self, call: Call) -> None:
        path = self._path(call)
        if self._is_below(path):
            self._name(path, None)

    def _on_symlink(self, call: Call) -> None:
        if any(self._is_below(path) for path in self._paths(call)):
            raise NotImplementedError(f"{call.name}({call.arguments})")

    def _on_rename(self, call: Call) -> None:
        before, after = self._paths(call)
        if not (self._is_below(before) and self._is_below(after)):
            if self._is_below(before) or self._is_below(after):
                raise NotImplementedError(f"{call.name}({call.arguments})")
            return
        node = self._find(before)
        if node is None:
            raise LookupError(before)
        if posixpath.dirname(before) == posixpath.dirname(after):
            self._parent(before).change(
                self._calls,
                Entry(posixpath.basename(after), node),
                Entry(posixpath.basename(before), None),
            )
        else:
            self._name(after, node)
            self._name(before, None)

    def _on_chdir(self, call: Call) -> None:
        """A process changes its directory. Files below the root are named by whole paths."""

    # -- paths ---------------------------------------------------------------------------------

    def _is_below(self, path: str) -> bool:
        return path.startswith(self._root + "/")

    def _path(self, call: Call) -> str:
        return self._paths(call)[0]

    def _paths(self, call: Call) -> list[str]:
        """Return the paths among the arguments, each joined with the directory before it."""
        texts = [text.decode(errors="surrogateescape") for text in call.strings()]
        folders = [folder or "" for folder in call.files()]
        if folders and len(folders) == len(texts):
            return [posixpath.join(*pair) for pair in zip(folders, texts, strict=True)]
        return texts

    def _file_of(self, call: Call) -> File | None:
        path = next(iter(call.files()), None)
        found = self._find(path) if path is not None and self._is_below(path) else None
        return found if isinstance(found, File) else None

    def _find(self, path: str) -> File | Directory | None:
        node: File | Directory | None = self.top
        for name in path.removeprefix(self._root).strip("/").split("/"):
            node = node.names.get(name) if isinstance(node, Directory) else None
        return node

    def _parent(self, path: str) -> Directory:
        folder = posixpath.dirname(path)
        node = self.top if folder == self._root else self._find(folder)
        if isinstance(node, Directory):
            return node
        raise LookupError(folder)

    def _name(self, path: str, node: File | Directory | None) -> None:
        parent = self._parent(path)
        parent.change(self._calls, Entry(posixpath.basename(path), node))
        if parent is self.top:
            parent.sync(self._calls + 1)

    def content(self, path: str) -> bytes | None:
        """Return the content of a file below the root, as it is without a power cut."""
        node = self._find(f"{self._root}/{path}")
        return node.content() if isinstance(node, File) else None

    # -- the cut -------------------------------------------------------------------------------

    def cut(self, target: Path, rng: Random) -> None:
        """Write what a power cut at this moment may leave into an empty directory."""
        _leave(self.top, target, Picker(rng))


def _leave(directory: Directory, target: Path, pick: Picker) -> None:
    names = dict(directory.synced)
    for _, entries in directory.changes[: pick.names(len(directory.changes))]:
        _apply_entries(names, entries)
    for name, node in names.items():
        if isinstance(node, File):
            (target / name).write_bytes(node.after_cut(pick))
        else:
            (target / name).mkdir()
            _leave(node, target / name, pick)


_FAMILY: Final = {
    "openat": "open",
    "creat": "open",
    "fsync": "sync",
    "fdatasync": "sync",
    "mkdirat": "mkdir",
    "unlink": "remove",
    "unlinkat": "remove",
    "rmdir": "remove",
    "renameat": "rename",
    "renameat2": "rename",
    "symlinkat": "symlink",
    "link": "symlink",
    "linkat": "symlink",
    "fchdir": "chdir",
}
"""The calls that differ only in how they name files."""
