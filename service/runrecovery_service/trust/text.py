"""Decodes a file without loss, and replaces parts of its text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.trust.errors import TrustFileUnusable, UnusableReason

_BOM: Final = "\ufeff"


@dataclass(frozen=True, slots=True)
class Text:
    """A file's text, with its byte-order mark apart."""

    body: str
    bom: str = ""

    @classmethod
    def read(cls, data: bytes, *, most: int) -> Text:
        """Decode a file.

        Raises:
            TrustFileUnusable: the file is larger than `most` bytes or is not UTF-8.
        """
        if len(data) > most:
            raise TrustFileUnusable(
                UnusableReason.TOO_LARGE, f"{len(data)} bytes, more than {most}"
            )
        try:
            body = data.decode()
        except UnicodeDecodeError as error:
            raise TrustFileUnusable(UnusableReason.NOT_UTF8, f"at byte {error.start}") from None
        bom = _BOM if body.startswith(_BOM) else ""
        return cls(body.removeprefix(_BOM), bom)

    def to_bytes(self, body: str) -> bytes:
        """Return the file with this body."""
        return (self.bom + body).encode()


@dataclass(frozen=True, slots=True)
class Splice:
    """The replacement of `body[start:end]` by `new`."""

    start: int
    end: int
    new: str = ""

    def apply(self, body: str) -> str:
        """Return the body with the change."""
        return body[: self.start] + self.new + body[self.end :]


def apply_all(splices: Sequence[Splice], body: str) -> str:
    """Return the body with all replacements, which must be in order and must not overlap."""
    pieces: list[str] = []
    at = 0
    for splice in splices:
        pieces += (body[at : splice.start], splice.new)
        at = splice.end
    return "".join((*pieces, body[at:]))


def lie_apart(splices: Mapping[str, Splice]) -> dict[str, Splice]:
    """Return the replacements in order, without those that overlap an earlier one."""
    apart: dict[str, Splice] = {}
    end = 0
    for name, splice in sorted(splices.items(), key=lambda each: each[1].start):
        if splice.start >= end:
            apart[name] = splice
            end = splice.end
    return apart


def newline_of(body: str, at: int | None = None) -> str:
    """Return the line end of the line before `at` (default: the last line), else of the first line.

    A text without a line end gets a plain newline.
    """
    last = body.rfind("\n", 0, at)
    if last < 0:
        last = body.find("\n")
    return "\r\n" if last > 0 and body[last - 1] == "\r" else "\n"
