"""Parses TOML with positions, so that an edit changes no other byte of the text.

The standard library decides whether a text is TOML and what it means. It gives no positions, so
this module finds them. tomlkit 0.15 was tried instead: for a file with 10,000 entries it takes 16
times as long as `tomllib`, it adds lines with plain newlines to a file with CRLF, and it refuses a
byte-order mark.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any, Final, TypeAlias

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.trust.errors import TrustFileUnusable, UnusableReason

Table: TypeAlias = dict[str, Any]  # as tomllib returns it, with any TOML value in it

MOST_PARTS: Final = 32
"""The most parts of one dotted key. The standard library needs quadratic time for them."""
MOST_DEPTH: Final = 100
"""The deepest nesting of arrays and inline tables."""

_BLANK: Final = re.compile(r"[ \t]*")
_BLANK_LINES: Final = re.compile(r"[ \t\r\n]*")
# No possessive quantifier and no atomic group: the `re` of Python 3.11.2 matches them wrongly.
# Every string matches in one way only, so a match that fails takes linear time.
_FILLER: Final = re.compile(r"[ \t\r\n]*(?:#[^\n]*[ \t\r\n]*)*")
_REST: Final = re.compile(r"[ \t]*(#[^\n]*?)?(\r?\n|\Z)")
_KEY: Final = re.compile(r"""[A-Za-z0-9_-]+|"[^"\\\n]*(?:\\.[^"\\\n]*)*"|'[^'\n]*'""")
# Up to two quotes may precede the three quotes that end a multi-line string.
_STRING: Final = re.compile(
    r'"""[^"\\]*(?:(?:\\.|"{1,2}(?!"))[^"\\]*)*"{3,5}'
    r"|'''[^']*(?:'{1,2}(?!')[^']*)*'{3,5}"
    r"""|"[^"\\\n]*(?:\\.[^"\\\n]*)*"|'[^'\n]*'""",
    re.DOTALL,
)
_BARE: Final = re.compile(r"[^,\]}#\r\n]+")
_INSIDE: Final = re.compile(r"#[^\n]*|[^\"'#\[\]{},=]+|[\[\]{},=]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One part of a dotted key."""

    name: str
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The line of a table, `[a.b]`, or of an element of an array, `[[a.b]]`."""

    path: tuple[str, ...]
    is_array: bool
    start: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A key and its value, on a line of their own or in an inline table.

    Attributes:
        path: the whole name, from the root.
        parts: the key as it is written: the last parts of the path.
        header: the header of the line's table; None in the root and in an inline table.
        opened: position of the brace of the field's inline table; -1 for a line.
    """

    path: tuple[str, ...]
    parts: tuple[Part, ...]
    value_start: int
    value_end: int
    header: Header | None = None
    opened: int = -1

    @property
    def start(self) -> int:
        """Position of its key."""
        return self.parts[0].start

    @property
    def is_line(self) -> bool:
        """True if the field is not in an inline table."""
        return self.opened < 0

    @property
    def base(self) -> int:
        """Number of parts of the path that the surrounding table contributes."""
        return len(self.path) - len(self.parts)


@dataclass(frozen=True, slots=True)
class Document:
    """The value of a text, and its headers and fields in order."""

    table: Table
    statements: tuple[Header | Field, ...]


def parse(body: str) -> Document:
    """Return the value and the statements of the text.

    Raises:
        TrustFileUnusable: the text is not TOML 1.0, or exceeds the limits of this module.
    """
    # First, because it refuses in linear time a text for which tomllib would take very long.
    found = tuple(_statements(body))
    return Document(_loads(body), found)


def parse_value(raw: str) -> Any:
    """Return the value of a text.

    Raises:
        TrustFileUnusable: the text is not a TOML value.
    """
    return _loads(f"value = {raw}")["value"]


def _loads(body: str) -> Table:
    try:
        return tomllib.loads(body, parse_float=str.encode)
    except RecursionError:
        raise TrustFileUnusable(UnusableReason.TOO_DEEP, "nested too deeply") from None
    except ValueError as error:  # also raised for a number of more than 4300 digits
        raise TrustFileUnusable(UnusableReason.NOT_PARSABLE, _place(error)) from None


def _place(error: ValueError) -> str:
    """Return the position of the error. The error's own message can quote the file."""
    found = re.search(r"\(at (.*)\)", str(error))
    return f"at {found[1]}" if found else "a number too large"


def _statements(body: str) -> Iterator[Header | Field]:
    """Yield the headers and the lines with values, in order.

    Raises:
        TrustFileUnusable: the text is not TOML, or is nested too deeply.
    """
    header: Header | None = None
    at = _skip_filler(body, 0)
    while at < len(body):
        if body[at] == "[":
            header = _read_header(body, at)
            yield header
            end = header.end
        else:
            field = _read_field(body, at, header.path if header else (), header=header)
            yield field
            end = field.value_end
        if not _REST.match(body, end):
            raise _lost(body, end)
        at = _skip_filler(body, end)


def inline_fields(body: str, holder: Field) -> list[Field]:
    """Return the fields of an inline table; none if the value is not an inline table."""
    fields: list[Field] = []
    if body[holder.value_start] != "{":
        return fields
    at = _skip_filler(body, holder.value_start + 1)
    while body[at] != "}":
        field = _read_field(body, at, holder.path, opened=holder.value_start)
        fields.append(field)
        at = _skip_filler(body, field.value_end)
        if body[at] == ",":
            at = _skip_filler(body, at + 1)
    return fields


def line_start(body: str, at: int) -> int:
    """Return the position at which the line of `at` begins."""
    return body.rfind("\n", 0, at) + 1


def rest_of_line(body: str, at: int) -> tuple[bool, str, int]:
    """Return whether the rest of the line is blank, its line end, and the next line's position."""
    found = _REST.match(body, at)
    if found is None:
        raise _lost(body, at)
    return found[1] is None, found[2], found.end()


def is_blank(text: str) -> bool:
    """Return True if the text is white space only."""
    return _BLANK_LINES.fullmatch(text) is not None


def _skip_filler(body: str, at: int) -> int:
    """Return the position after white space and comments."""
    found = _FILLER.match(body, at)
    assert found is not None  # noqa: S101 - it matches nothing as well
    return found.end()


def _skip_blank(body: str, at: int) -> int:
    found = _BLANK.match(body, at)
    assert found is not None  # noqa: S101 - it matches nothing as well
    return found.end()


def _read_header(body: str, at: int) -> Header:
    brackets = 2 if body.startswith("[[", at) else 1
    parts, end = _read_key(body, _skip_blank(body, at + brackets))
    if not body.startswith("]" * brackets, end):
        raise _lost(body, end)
    path = tuple(part.name for part in parts)
    return Header(path=path, is_array=brackets == 2, start=at, end=end + brackets)


def _read_field(
    body: str, at: int, base: tuple[str, ...], *, header: Header | None = None, opened: int = -1
) -> Field:
    parts, end = _read_key(body, at)
    if not body.startswith("=", end):
        raise _lost(body, end)
    value_start = _skip_blank(body, end + 1)
    return Field(
        path=(*base, *(part.name for part in parts)),
        parts=parts,
        value_start=value_start,
        value_end=_skip_value(body, value_start),
        header=header,
        opened=opened,
    )


def _read_key(body: str, at: int) -> tuple[tuple[Part, ...], int]:
    """Return the parts of a dotted key, and the position after it and its white space."""
    parts: list[Part] = []
    while True:
        found = _KEY.match(body, at)
        if found is None:
            raise _lost(body, at)
        parts.append(Part(name=_unquoted(found[0]), start=at, end=found.end()))
        if len(parts) > MOST_PARTS:
            raise TrustFileUnusable(
                UnusableReason.TOO_DEEP, f"a key of more than {MOST_PARTS} parts"
            )
        end = _skip_blank(body, found.end())
        if not body.startswith(".", end):
            return tuple(parts), end
        at = _skip_blank(body, end + 1)


def _unquoted(raw: str) -> str:
    if raw[0] == '"' and "\\" in raw:
        try:
            return str(tomllib.loads(f"key = {raw}")["key"])
        except tomllib.TOMLDecodeError:
            raise TrustFileUnusable(
                UnusableReason.NOT_PARSABLE, "a key with a bad escape"
            ) from None
    return raw[1:-1] if raw[0] in "\"'" else raw


def _skip_value(body: str, at: int) -> int:
    """Return the position after the value at `at`."""
    if body[at : at + 1] in {"[", "{"}:
        return _skip_nested(body, at)
    found = _STRING.match(body, at)
    if found is not None:
        return found.end()
    if body[at : at + 1] in {'"', "'"}:
        raise _lost(body, at)
    found = _BARE.match(body, at)
    if found is None:
        raise _lost(body, at)
    return at + len(found[0].rstrip(" \t"))


def _skip_nested(body: str, at: int) -> int:
    """Return the position after an array or an inline table.

    Its content is only scanned. tomllib finds everything in it that is not TOML.
    """
    depth = dots = 0
    while True:
        found = _STRING.match(body, at) or _INSIDE.match(body, at)
        if found is None:
            raise _lost(body, at)
        piece, at = found[0], found.end()
        if piece in {"[", "{"}:
            depth += 1
        elif piece in {"]", "}"}:
            depth -= 1
        if piece in {"[", "{", ",", "="}:
            dots = 0
        elif piece[0] not in "#\"'":
            dots += piece.count(".")
        if depth > MOST_DEPTH or dots >= MOST_PARTS:
            raise TrustFileUnusable(UnusableReason.TOO_DEEP, "nested too deeply")
        if depth == 0:
            return at


def _lost(body: str, at: int) -> TrustFileUnusable:
    line = body.count("\n", 0, at) + 1
    return TrustFileUnusable(UnusableReason.NOT_PARSABLE, f"at line {line}")
