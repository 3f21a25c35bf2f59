"""Codex: `config.toml` has `[projects."<dir>"]` with `trust_level = "trusted"`.

The same can be written as a table of its own, as dotted keys in the root or below `[projects]`, or
in inline tables. A new entry is added beside the existing ones, in the same notation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.trust import toml_text
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
from runrecovery_service.trust.text import Splice, Text, apply_all, lie_apart, newline_of
from runrecovery_service.trust.toml_text import Document, Field, Header, Table

MOST_BYTES: Final = 8 << 20
"""The largest file that is edited. tomllib takes about a second per MiB of tables, and an edit
parses the file twice."""
_PROJECTS, _LEVEL, _TRUSTED = "projects", "trust_level", "trusted"
_ENTRY: Final = f'{_LEVEL} = "{_TRUSTED}"'


class CodexEditor:
    """See `entry.Editor`."""

    def accepts(self, added: Added) -> bool:
        """See `entry.Editor`."""
        if added.previous is None:
            return True
        try:
            return isinstance(toml_text.parse_value(added.previous), str)
        except TrustFileUnusable:
            return False

    def add(
        self, text: bytes | None, folder: str, recorded: Mapping[str, Added] | None = None
    ) -> Edit:
        """See `entry.Editor`."""
        check_folder(folder)
        source = Text.read(text or b"", most=MOST_BYTES)
        parsed = toml_text.parse(source.body)
        entry = _entry_of(parsed.table, folder)
        if entry is None:
            raise TrustFileUnusable(
                UnusableReason.UNEXPECTED_SHAPE, "no table where the entry should be"
            )
        level = entry.get(_LEVEL)
        if level == _TRUSTED:
            return unchanged(text, folder, recorded)
        if not isinstance(level, str | None):
            raise TrustFileUnusable(UnusableReason.UNEXPECTED_SHAPE, f"{_LEVEL} is not a string")
        if level is None:
            insert = _Site(source.body, parsed, folder).insert()
            file = {Made.FILE} if text is None else set[Made]()
            splice, added = insert.splice, insert.added(inherited(recorded) | file)
        else:
            splice, previous = _replace(source.body, parsed, folder)
            added = Added(owned=True, previous=previous)
        done = _proved(source, (splice,), parsed, {folder: _TRUSTED})
        return Edit(text=with_reserve(done, MOST_BYTES), added=added)

    def remove(self, text: bytes | None, folder: str, added: Added) -> Removal:
        """See `entry.Editor`."""
        if not added.owned:
            return Removal(text=text, outcome=Outcome.NOT_OURS)
        removals = _remove(text, {folder: added})
        return Removal(text=removals.text, outcome=removals.outcomes[folder])

    def remove_all(self, text: bytes | None, entries: Mapping[str, Added]) -> Removals:
        """See `entry.Editor`."""
        return in_rounds(self, _remove, text, entries)


EDITOR: Final = CodexEditor()


def _entry_of(table: Table, folder: str) -> dict[str, Any] | None:
    """Return the folder's table, empty if there is none; None if another value is in its place."""
    found: Any = table
    for key in (_PROJECTS, folder):
        found = found.get(key, {})
        if not isinstance(found, dict):
            return None
    return dict(found)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cut:
    """The removal of one entry. `value` is the entry's value afterwards."""

    outcome: Outcome
    splice: Splice | None = None
    value: Any = None


def _remove(text: bytes | None, entries: Mapping[str, Added]) -> Removals:
    """Remove the entries whose texts do not overlap. The caller repeats this for the others."""
    if not any(added.owned for added in entries.values()):
        return Removals(text=text, outcomes=dict.fromkeys(entries, Outcome.NOT_OURS))
    source = Text.read(text or b"", most=2 * MOST_BYTES)
    parsed = toml_text.parse(source.body)
    cuts = {
        folder: _cut(source.body, part, folder, entries[folder])
        for folder, part in _parts(parsed, entries).items()
    }
    splices = lie_apart({name: cut.splice for name, cut in cuts.items() if cut.splice is not None})
    outcomes = {
        name: cut.outcome for name, cut in cuts.items() if cut.splice is None or name in splices
    }
    if not splices:
        return Removals(text=text, outcomes=outcomes)
    values = {folder: cuts[folder].value for folder in splices}
    done = _proved(source, tuple(splices.values()), parsed, values)
    made = frozenset[Made]().union(
        *(entries[name].made for name in splices if outcomes[name] is Outcome.REMOVED)
    )
    whole = Made.FILE in made and not done
    return Removals(text=None if whole else done, outcomes=outcomes)


def _parts(parsed: Document, folders: Iterable[str]) -> dict[str, Document]:
    """Return for each folder the document with only those statements that can concern the folder.

    If all folders are in one inline table, return nothing for several folders: their removals would
    overlap.
    """
    shared: list[Header | Field] = []
    own: dict[str, list[Header | Field]] = {folder: [] for folder in folders}
    for each in parsed.statements:
        if each.path[0] == _PROJECTS:
            if len(each.path) > 1:
                own.get(each.path[1], []).append(each)
            elif isinstance(each, Field):
                shared.append(each)  # all projects in one inline table
    if shared and len(own) > 1:
        return {}
    return {
        folder: Document(parsed.table, tuple(shared + statements))
        for folder, statements in own.items()
    }


def _cut(body: str, parsed: Document, folder: str, added: Added) -> _Cut:
    if not added.owned:
        return _Cut(outcome=Outcome.NOT_OURS)
    entry = _entry_of(parsed.table, folder)
    if not entry or _LEVEL not in entry:
        return _Cut(outcome=Outcome.GONE)
    if entry[_LEVEL] != _TRUSTED:
        return _Cut(outcome=Outcome.CHANGED)
    site = _Site(body, parsed, folder)
    field = site.level()
    if added.previous is None:
        return _Cut(outcome=Outcome.REMOVED, splice=site.cut(field, added))
    return _Cut(
        outcome=Outcome.RESTORED,
        splice=Splice(field.value_start, field.value_end, added.previous),
        value=toml_text.parse_value(added.previous),
    )


def _replace(body: str, parsed: Document, folder: str) -> tuple[Splice, str]:
    """Return the splice that replaces another value by ours, and the text of the old value."""
    field = _Site(body, parsed, folder).level()
    raw = body[field.value_start : field.value_end]
    return Splice(field.value_start, field.value_end, f'"{_TRUSTED}"'), raw


@dataclass(frozen=True, slots=True, kw_only=True)
class _Insert:
    """A new entry, its position, and the white space around it."""

    at: int
    text: str
    lead: str = ""
    trail: str = ""
    makes_table: bool = False

    @property
    def splice(self) -> Splice:
        return Splice(self.at, self.at, self.lead + self.text + self.trail)

    def added(self, made: frozenset[Made]) -> Added:
        table = {Made.FOLDER} if self.makes_table else set[Made]()
        # White space is recorded for lines only. In an inline table the commas are enough.
        return Added(owned=True, made=made | table, lead=self.lead, trail=self.trail)


class _Site:
    """The statements about one folder in a parsed text, and their positions."""

    def __init__(self, body: str, parsed: Document, folder: str) -> None:
        self._body = body
        self._projects: Table = parsed.table.get(_PROJECTS, {})
        self._target = (_PROJECTS, folder, _LEVEL)
        self._table = self._target[:2]
        self._key = _quoted(folder)
        self._headers: list[Header] = []
        self._fields: list[Field] = []
        for each in parsed.statements:
            if each.path[0] == _PROJECTS:
                if isinstance(each, Header):
                    self._headers.append(each)
                else:
                    self._collect(each)

    def _collect(self, field: Field) -> None:
        self._fields.append(field)
        if field.path == self._target[: len(field.path)] and len(field.path) < 3:
            for inner in toml_text.inline_fields(self._body, field):
                self._collect(inner)

    def level(self) -> Field:
        """Return the field of the trust level. The parsed file has it.

        Raises:
            TrustFileUnusable: this module does not find the field in the text.
        """
        for field in self._fields:
            if field.path == self._target:
                return field
        raise TrustFileUnusable(UnusableReason.NOT_PROVED, "the entry was not found in the text")

    # -- adding -------------------------------------------------------------------------------

    def insert(self) -> _Insert:
        """Return the insertion of a new entry, beside existing entries of the same notation."""
        return (
            self._into_inline(self._table, _ENTRY)
            or self._below_header()
            or self._beside(2, f".{_ENTRY}")
            or self._into_projects()
            or self._as_table()
        )

    def _into_projects(self) -> _Insert | None:
        """Return the insertion if the root has `projects = {…}` or `projects."x".… = …`."""
        if self._target[1] in self._projects:
            return None
        entry = f"{self._key} = {{ {_ENTRY} }}"
        inline = self._into_inline(self._table[:1], entry, makes_table=True)
        return inline or self._beside(1, f".{self._key}.{_ENTRY}")

    def _into_inline(
        self, path: tuple[str, ...], text: str, *, makes_table: bool = False
    ) -> _Insert | None:
        holder = next((field for field in self._fields if field.path == path), None)
        if holder is None:
            return None
        fields = toml_text.inline_fields(self._body, holder)
        at = fields[-1].value_end if fields else holder.value_start + 1
        inside = self._body[at : holder.value_end - 1]
        lead = ", " if fields else " " * bool(inside)
        return _Insert(at=at, text=lead + text, makes_table=makes_table)

    def _below_header(self) -> _Insert | None:
        for header in self._headers:
            if header.path == self._table and not header.is_array:
                first = next((each for each in self._fields if each.header is header), None)
                at = header.start if first is None else first.start
                return self._line(header.end, _ENTRY, like=at)
        return None

    def _beside(self, count: int, text: str) -> _Insert | None:
        """Return the insertion after the last dotted key of another folder, in its notation.

        Args:
            count: how many parts of its path that key has in common with the new entry.
            text: the rest of the new entry.
        """
        likes = [
            field
            for field in self._fields
            if field.path[:count] == self._target[:count]
            and len(field.path) > count
            and field.base < count
            and (count == 2 or field.base == 0)
        ]
        if not likes:
            return None
        like = likes[-1]
        text = self._body[like.start : like.parts[count - 1 - like.base].end] + text
        if like.is_line:
            return self._line(like.value_end, text, like=like.start)
        return _Insert(at=like.value_end, text=f", {text}")

    def _line(self, at: int, text: str, *, like: int) -> _Insert:
        """Return the insertion of a line after the line of `at`, with the indentation of `like`."""
        _, end, after = toml_text.rest_of_line(self._body, at)
        indent = self._body[toml_text.line_start(self._body, like) : like]
        if end:
            return _Insert(at=after, text=text, lead=indent, trail=end)
        return _Insert(at=after, text=text, lead=newline_of(self._body) + indent)

    def _as_table(self) -> _Insert:
        """Return the insertion of a table at the end, after an empty line.

        A missing line end at the end of the file stays missing.
        """
        body, newline = self._body, newline_of(self._body)
        ended = body.endswith("\n")
        lead = "" if not body else newline if ended else newline * 2
        return _Insert(
            at=len(body),
            text=f"[{_PROJECTS}.{self._key}]{newline}{_ENTRY}",
            lead=lead,
            trail=newline if ended or not body else "",
            makes_table=True,
        )

    # -- removing ------------------------------------------------------------------------------

    def cut(self, field: Field, added: Added) -> Splice:
        """Return the splice that removes the value, and a table of ours that becomes empty.

        Sub-tables with a header of their own do not need that table.
        """
        ours = Made.FOLDER in added.made
        if not field.is_line:
            holder = self._holder(field)
            lonely = len(toml_text.inline_fields(self._body, holder)) == 1
            whole = holder if ours and lonely and holder.path == self._table else field
            if whole.is_line:
                return self._cut_line(whole.start, whole, added)
            return self._cut_inline(whole)
        header = field.header
        if ours and header is not None and self._is_all(field, header):
            return self._cut_line(header.start, field, added)
        return self._cut_line(field.start, field, added)

    def _is_all(self, field: Field, header: Header) -> bool:
        """Return True if the folder's own table has no other content than the field.

        A comment in the table is other content. A comment after the table is not.
        """
        between = self._body[header.end : field.start]
        alone, _, _ = toml_text.rest_of_line(self._body, field.value_end)
        return (
            header.path == self._table
            and [each for each in self._fields if each.header is header] == [field]
            and alone
            and toml_text.is_blank(between)
        )

    def _holder(self, field: Field) -> Field:
        return next(each for each in self._fields if each.value_start == field.opened)

    def _cut_inline(self, field: Field) -> Splice:
        """Return the splice that reverses an insertion after the last field or the brace."""
        fields = toml_text.inline_fields(self._body, self._holder(field))
        index = fields.index(field)
        if index > 0:
            return Splice(fields[index - 1].value_end, field.value_end)
        if len(fields) > 1:
            return Splice(field.start, fields[1].start)
        return Splice(field.opened + 1, field.value_end)

    def _cut_line(self, start: int, field: Field, added: Added) -> Splice:
        """Return the splice that removes the text from `start` to the end of the field.

        It also removes the white space that was recorded when the text was added. If the text is
        no longer surrounded by that white space, the whole line is removed.
        """
        body, end = self._body, field.value_end
        alone, _, after = toml_text.rest_of_line(body, end)
        if not alone:
            return Splice(start, end)  # a comment follows
        begin = toml_text.line_start(body, start)
        lead, trail = start - len(added.lead), end + len(added.trail)
        fits = body[max(lead, 0) : start] == added.lead and body[end:trail] == added.trail
        if fits and (added.lead or added.trail) and (begin == lead or "\n" in added.lead):
            return Splice(lead, trail)
        if begin and end == len(body) and added.trail and not added.lead:
            # The line end that was added with the line is gone, so the one before it ends the file.
            begin -= len("\r\n") if body[:begin].endswith("\r\n") else len("\n")
        return Splice(begin, after)


def _quoted(folder: str) -> str:
    """Return the folder as a quoted key, in a form that needs no escapes if there is one."""
    if '"' not in folder and "\\" not in folder and folder.isprintable():
        return f'"{folder}"'
    if "'" not in folder and folder.isprintable():
        return f"'{folder}'"
    return '"' + "".join(map(_escaped, folder)) + '"'


def _escaped(char: str) -> str:
    if char in '"\\':
        return "\\" + char
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) <= 0xFFFF else f"\\U{ord(char):08x}"


def _proved(
    source: Text, splices: Sequence[Splice], before: Document, values: Mapping[str, Any]
) -> bytes:
    """Return the file with the splices, after a check of the parsed result.

    Each folder must have the given value (None: no value), and all else must be unchanged.
    """
    body = apply_all(splices, source.body)
    try:
        after = toml_text.parse(body)
        right = all(
            (_entry_of(after.table, folder) or {}).get(_LEVEL) == value
            for folder, value in values.items()
        )
        right = right and _without(before.table, values) == _without(after.table, values)
    except TrustFileUnusable:
        right = False
    if not right:
        raise TrustFileUnusable(
            UnusableReason.NOT_PROVED, "the edit would change more than our entry"
        )
    return source.to_bytes(body)


def _without(table: Table, folders: Iterable[str]) -> Table:
    """Return the document without the trust levels of these folders, and without emptied tables."""
    projects = dict(table.get(_PROJECTS, {}))
    for folder in folders:
        entry = {key: each for key, each in projects.get(folder, {}).items() if key != _LEVEL}
        projects.pop(folder, None)
        if entry:
            projects[folder] = entry
    rest = {key: each for key, each in table.items() if key != _PROJECTS}
    return {**rest, _PROJECTS: projects}
