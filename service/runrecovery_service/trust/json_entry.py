"""Adds and removes one value in a JSON file without any other change."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import Final

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.trust import json_text
from runrecovery_service.trust.entry import (
    Added,
    Edit,
    Made,
    Outcome,
    Removal,
    Removals,
    check_folder,
    in_rounds,
    inherited,
    unchanged,
    with_reserve,
)
from runrecovery_service.trust.errors import TrustFileUnusable, UnusableReason
from runrecovery_service.trust.json_text import JsonMember, Model, Object
from runrecovery_service.trust.text import Splice, Text, apply_all, lie_apart, newline_of

MOST_BYTES: Final = 16 << 20
_UNIT: Final = "  "
"""One step of indentation, for a file from which none can be taken."""


class _Gone(Enum):
    GONE = auto()


_GONE: Final = _Gone.GONE
_EMPTIED: Final = ("{\n}\n", "{\r\n}\r\n")
"""The text of a document that this service made, after the removal of its only entry."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonEditor:
    """Edits entries of a JSON file. The path of an entry: `before`, then the folder, then `after`.

    Attributes:
        before, after: the names in the path before and after that of the folder.
        value: the value that an entry gets, as text.
        trusting: the values with which the CLI trusts the folder; `value` is one of them.
    """

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    value: str
    trusting: tuple[Model, ...]

    def accepts(self, added: Added) -> bool:
        """See `entry.Editor`."""
        if added.previous is None:
            return True
        try:
            return not isinstance(json_text.parse(added.previous), list | tuple)
        except TrustFileUnusable:
            return False

    def add(
        self, text: bytes | None, folder: str, recorded: Mapping[str, Added] | None = None
    ) -> Edit:
        """See `entry.Editor`."""
        check_folder(folder)
        source = Text.read(text or b"", most=MOST_BYTES)
        if not source.body.strip(" \t\r\n"):
            return self._begin(text, source, folder, inherited(recorded))
        before = json_text.parse(source.body)
        trail = _follow(source.body, self._path(folder))
        if trail.is_blocked:
            raise TrustFileUnusable(
                UnusableReason.UNEXPECTED_SHAPE, "no object where one should be"
            )
        if trail.leaf is None:
            splice = trail.insert(source.body, self.value)
            made = self._made(trail.depth) | inherited(recorded)
            added = Added(owned=True, made=made)
        elif trail.leaf.value in self.trusting:
            return unchanged(text, folder, recorded)
        elif isinstance(trail.leaf.value, list | tuple):
            raise TrustFileUnusable(
                UnusableReason.UNEXPECTED_SHAPE, "the entry is not a plain value"
            )
        else:
            leaf = trail.leaf
            splice = Splice(leaf.value_start, leaf.value_end, self.value)
            raw = source.body[leaf.value_start : leaf.value_end]
            added = Added(owned=True, previous=raw)
        expected = _with(before, self._path(folder), json_text.parse(self.value))
        done = _proved(source, (splice,), expected)
        return Edit(text=with_reserve(done, MOST_BYTES), added=added)

    def remove(self, text: bytes | None, folder: str, added: Added) -> Removal:
        """See `entry.Editor`."""
        if not added.owned:
            return Removal(text=text, outcome=Outcome.NOT_OURS)
        source = Text.read(text or b"", most=2 * MOST_BYTES)
        if not source.body.strip(" \t\r\n"):
            return Removal(text=text, outcome=Outcome.GONE)
        before = json_text.parse(source.body)
        trail = _follow(source.body, self._path(folder))
        if trail.leaf is None:
            return Removal(text=text, outcome=Outcome.GONE)
        if trail.leaf.value != json_text.parse(self.value):
            return Removal(text=text, outcome=Outcome.CHANGED)
        if added.previous is not None:
            return self._restore(source, before, trail, added.previous)
        depth = self._emptied_from(trail, added)
        if trail.is_repeated(depth):
            # Without our entry an earlier entry of the same name would apply, which is not ours.
            return Removal(text=text, outcome=Outcome.CHANGED)
        expected = _without(before, trail.path[: depth + 1])
        done = _proved(source, (Splice(*trail.cut(depth)),), expected)
        return Removal(text=_ended(source, done, added), outcome=Outcome.REMOVED)

    def remove_all(self, text: bytes | None, entries: Mapping[str, Added]) -> Removals:
        """See `entry.Editor`."""
        return in_rounds(self, self._remove_some, text, entries)

    def _remove_some(self, text: bytes | None, entries: Mapping[str, Added]) -> Removals:
        """Remove those entries whose texts do not overlap.

        Remove none if the file would have no other entry left.
        """
        source = Text.read(text or b"", most=2 * MOST_BYTES)
        if not source.body.strip(" \t\r\n"):
            return Removals(text=text, outcomes={})
        before = json_text.parse(source.body)
        outer = _follow(source.body, (*self.before, "")).objects
        if len(outer) <= len(self.before) or len(outer[-1].members) < 2:
            return Removals(text=text, outcomes={})
        cuts = {
            folder: self._cut(source.body, outer, folder, added)
            for folder, added in entries.items()
        }
        splices = lie_apart({name: cut.splice for name, cut in cuts.items() if cut.splice})
        outcomes = {
            name: cut.outcome for name, cut in cuts.items() if not cut.splice or name in splices
        }
        changes = {cuts[folder].path: cuts[folder].value for folder in splices}
        done = _proved(source, tuple(splices.values()), _changed(before, changes))
        return Removals(text=done, outcomes=outcomes)

    def _cut(self, body: str, outer: tuple[Object, ...], folder: str, added: Added) -> _Cut:
        """Return how one entry is removed from a file in which entries of other folders stay."""
        if not added.owned:
            return _Cut(outcome=Outcome.NOT_OURS)
        trail = _follow(body, self._path(folder), known=outer)
        if trail.leaf is None:
            return _Cut(outcome=Outcome.GONE)
        if trail.leaf.value != json_text.parse(self.value):
            return _Cut(outcome=Outcome.CHANGED)
        if added.previous is not None:
            return _Cut(
                outcome=Outcome.RESTORED,
                splice=Splice(trail.leaf.value_start, trail.leaf.value_end, added.previous),
                path=trail.path,
                value=json_text.parse(added.previous),
            )
        depth = self._emptied_from(trail, added)
        if trail.is_repeated(depth):
            return _Cut(outcome=Outcome.CHANGED)
        path = trail.path[: depth + 1]
        return _Cut(outcome=Outcome.REMOVED, splice=Splice(*trail.cut(depth)), path=path)

    def _path(self, folder: str) -> tuple[str, ...]:
        return (*self.before, folder, *self.after)

    def _begin(
        self, text: bytes | None, source: Text, folder: str, recorded: frozenset[Made]
    ) -> Edit:
        """Return the edit of a blank file: a new document, after the white space that is there."""
        newline = newline_of(source.body)
        gap = newline + _UNIT
        entry = _nested(self._path(folder), self.value, gap=gap, unit=_UNIT, colon=": ")
        made = {Made.FILE, Made.DOCUMENT} if text is None else {Made.DOCUMENT}
        added = Added(owned=True, made=self._made(0) | made | recorded)
        done = source.to_bytes(f"{source.body}{{{gap}{entry}{newline}}}{newline}")
        return Edit(text=with_reserve(done, MOST_BYTES), added=added)

    def _made(self, depth: int) -> frozenset[Made]:
        """Return the containers that an insertion at `depth` of the path creates."""
        levels = (Made.PROJECTS,) * len(self.before) + (Made.FOLDER,) * len(self.after)
        return frozenset(levels[depth:])

    def _emptied_from(self, trail: _Trail, added: Added) -> int:
        """Return the depth of the outermost member that has only our entry and can be removed."""
        levels = (Made.PROJECTS,) * len(self.before) + (Made.FOLDER,) * len(self.after)
        depth = trail.depth
        while depth > 0 and levels[depth - 1] in added.made:
            if len(trail.objects[depth].members) > 1:
                break
            depth -= 1
        return depth

    def _restore(self, source: Text, before: Model, trail: _Trail, previous: str) -> Removal:
        leaf = trail.leaf
        assert leaf is not None  # noqa: S101 - checked before
        splice = Splice(leaf.value_start, leaf.value_end, previous)
        expected = _with(before, trail.path, json_text.parse(previous))
        return Removal(text=_proved(source, (splice,), expected), outcome=Outcome.RESTORED)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """The removal of one entry: the splice, and the new value at `path` (`_GONE`: no value)."""

    outcome: Outcome
    splice: Splice | None = None
    path: tuple[str, ...] = ()
    value: Model | _Gone = _GONE


@dataclass(frozen=True, slots=True, kw_only=True)
class _Trail:
    """The objects along a path, from the root, as far as they exist in the file.

    Attributes:
        leaf: the member at the end of the path; None: there is none.
        is_blocked: the path leads through a value that is no object.
    """

    path: tuple[str, ...]
    objects: tuple[Object, ...]
    leaf: JsonMember | None = None
    is_blocked: bool = False

    @property
    def depth(self) -> int:
        """The index, in the path, of the name that belongs in the last object."""
        return len(self.objects) - 1

    def is_repeated(self, depth: int) -> bool:
        """Return True if a name from `depth` on exists more than once."""
        return any(
            self.objects[at].count(self.path[at]) > 1 for at in range(depth, len(self.objects))
        )

    def cut(self, depth: int) -> tuple[int, int]:
        """Return the span of the text to remove with the path's member in the object at `depth`."""
        holder = self.objects[depth]
        index = holder.find(self.path[depth])
        assert index is not None  # noqa: S101 - the trail went through it
        return holder.cut(index)

    def insert(self, body: str, value: str) -> Splice:
        """Return the splice that adds the missing part of the path, and the value.

        They are added to the last object that exists, in the style of its members.
        """
        holder, rest = self.objects[-1], self.path[self.depth :]
        unit = self._unit(body)
        if holder.members:
            last = holder.members[-1]
            gap = holder.gap_before(len(holder.members) - 1, body)
            colon = body[last.key_end : last.value_start]
            entry = _nested(rest, value, gap=gap, unit=unit, colon=colon)
            return Splice(last.value_end, last.value_end, f",{gap}{entry}")
        # The white space in the object stays behind the entry, so that a removal restores it.
        inside = body[holder.start + 1 : holder.end - 1]
        gap = inside + unit if "\n" in inside else ""
        entry = _nested(rest, value, gap=gap, unit=unit, colon=": ")
        return Splice(holder.start + 1, holder.start + 1, gap + entry)

    def _unit(self, body: str) -> str:
        """Return one step of the file's indentation, taken from its first member."""
        root = self.objects[0]
        gap = root.gap_before(0, body) if root.members else ""
        return gap[gap.rfind("\n") + 1 :] if "\n" in gap else _UNIT


def _follow(body: str, path: tuple[str, ...], *, known: tuple[Object, ...] = ()) -> _Trail:
    """Return the objects along the path.

    Args:
        known: the first of these objects, if they were parsed before.
    """
    objects: tuple[Object, ...] = ()
    leaf: JsonMember | None = None
    at = json_text.skip_blank(body, 0)
    for depth, key in enumerate(path):
        found = known[depth] if depth < len(known) else json_text.read_object(body, at)
        if found is None:
            return _Trail(path=path, objects=objects, is_blocked=True)
        objects = (*objects, found)
        index = found.find(key)
        if index is None:
            return _Trail(path=path, objects=objects)
        leaf = found.members[index]
        at = leaf.value_start
    return _Trail(path=path, objects=objects, leaf=leaf)


def _nested(path: tuple[str, ...], value: str, *, gap: str, unit: str, colon: str) -> str:
    """Return the text of a member with this path and value.

    Args:
        gap: the white space before the member. If it has a line end, nested members are on lines of
            their own, each indented by one more `unit`.
        colon: the text between a name and its value.
    """
    key = json.dumps(path[0], ensure_ascii=False)
    if len(path) == 1:
        return f"{key}{colon}{value}"
    if "\n" not in gap:
        return f"{key}{colon}{{{_nested(path[1:], value, gap='', unit='', colon=colon)}}}"
    inner = gap + unit
    deeper = _nested(path[1:], value, gap=inner, unit=unit, colon=colon)
    return f"{key}{colon}{{{inner}{deeper}{gap}}}"


def _proved(source: Text, splices: Sequence[Splice], expected: Model) -> bytes:
    """Return the file with the splices.

    Raises:
        TrustFileUnusable: the file would not have the expected value.
    """
    body = apply_all(splices, source.body)
    try:
        right = json_text.parse(body) == expected
    except TrustFileUnusable:
        right = False
    except RecursionError:
        raise TrustFileUnusable(UnusableReason.TOO_DEEP, "nested too deeply") from None
    if not right:
        raise TrustFileUnusable(
            UnusableReason.NOT_PROVED, "the edit would change more than our entry"
        )
    return source.to_bytes(body)


def _ended(source: Text, done: bytes, added: Added) -> bytes | None:
    """Return the edited file. If we made its document, and the document is empty now, remove it.

    Returns:
        None if we made the file too: the file is then to be removed.
    """
    body = Text.read(done, most=2 * MOST_BYTES).body
    blank = body.removesuffix(_EMPTIED[0]).removesuffix(_EMPTIED[1])
    if Made.DOCUMENT not in added.made or blank == body or blank.strip(" \t\r\n"):
        return done
    return None if Made.FILE in added.made and not blank else source.to_bytes(blank)


def _with(model: Model, path: tuple[str, ...], value: Model) -> Model:
    """Return the value with a new value at the path. Of repeated names, the last is replaced."""
    if not path:
        return value
    assert isinstance(model, tuple)  # noqa: S101 - the trail went through objects alone
    index = _last(model, path[0])
    if index is None:
        return (*model, (path[0], _with((), path[1:], value)))
    changed = (path[0], _with(model[index][1], path[1:], value))
    return (*model[:index], changed, *model[index + 1 :])


def _without(model: Model, path: tuple[str, ...]) -> Model:
    """Return the value without the member at the path. Of repeated names, the last is removed."""
    assert isinstance(model, tuple)  # noqa: S101 - the trail went through objects alone
    index = _last(model, path[0])
    assert index is not None  # noqa: S101 - the trail found it
    if len(path) == 1:
        return (*model[:index], *model[index + 1 :])
    changed = (path[0], _without(model[index][1], path[1:]))
    return (*model[:index], changed, *model[index + 1 :])


def _changed(model: Model, changes: Mapping[tuple[str, ...], Model | _Gone]) -> Model:
    """Return the value with new values at existing paths. Of repeated names, the last changes."""
    assert isinstance(model, tuple)  # noqa: S101 - the trail went through objects alone
    below: dict[str, dict[tuple[str, ...], Model | _Gone]] = {}
    for path, value in changes.items():
        below.setdefault(path[0], {})[path[1:]] = value
    last = {key: index for index, (key, _) in enumerate(model)}
    pairs: list[tuple[str, Model]] = []
    for index, (key, old) in enumerate(model):
        inner = below.get(key)
        if inner is None or index != last[key]:
            pairs.append((key, old))
            continue
        new = inner[()] if () in inner else _changed(old, inner)
        if not isinstance(new, _Gone):
            pairs.append((key, new))
    return tuple(pairs)


def _last(pairs: tuple[tuple[str, Model], ...], key: str) -> int | None:
    return next((i for i in range(len(pairs) - 1, -1, -1) if pairs[i][0] == key), None)
