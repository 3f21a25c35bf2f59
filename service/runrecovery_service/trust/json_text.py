"""Parses JSON with positions, so that an edit changes no other byte of the text.

The standard library decides whether a text is JSON. It gives no positions, and its writer would
change white space, repeated names and the digits of numbers. So this module finds the positions.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, NoReturn, TypeAlias

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.trust.errors import TrustFileUnusable, UnusableReason

Model: TypeAlias = "str | bool | bytes | list[Model] | tuple[tuple[str, Model], ...] | None"
"""A JSON value without loss: an object is a tuple of pairs, which may repeat a name, and a number
is its digits."""

_BLANK: Final = re.compile(r"[ \t\n\r]*")


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER: Final = json.JSONDecoder(
    object_pairs_hook=tuple,
    parse_float=str.encode,
    parse_int=str.encode,
    parse_constant=_no_constant,
)


def parse(body: str) -> Model:
    """Return the value of the text.

    Raises:
        TrustFileUnusable: the text is not JSON, or is nested too deeply.
    """
    try:
        model: Model = _DECODER.decode(body)
    except RecursionError:
        raise TrustFileUnusable(UnusableReason.TOO_DEEP, "nested too deeply") from None
    except json.JSONDecodeError as error:
        where = f"{error.msg}, line {error.lineno} column {error.colno}"
        raise TrustFileUnusable(UnusableReason.NOT_PARSABLE, where) from None
    except ValueError as error:
        raise TrustFileUnusable(UnusableReason.NOT_PARSABLE, str(error)) from None
    return model


def skip_blank(body: str, at: int) -> int:
    """Return where the white space at `at` ends."""
    found = _BLANK.match(body, at)
    assert found is not None  # noqa: S101 - it matches nothing as well
    return found.end()


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonMember:
    """A name and its value in an object, with their positions."""

    key: str
    key_start: int
    key_end: int
    value: Model
    value_start: int
    value_end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Object:
    """An object. `start` is its opening brace, `end` is after its closing brace."""

    start: int
    end: int
    members: tuple[JsonMember, ...]
    _last: Mapping[str, int]
    _counts: Mapping[str, int]

    @classmethod
    def of(cls, members: Sequence[JsonMember], *, start: int, end: int) -> Object:
        """Return the object with these members."""
        return cls(
            start=start,
            end=end,
            members=tuple(members),
            _last={member.key: index for index, member in enumerate(members)},
            _counts=Counter(member.key for member in members),
        )

    def find(self, key: str) -> int | None:
        """Return the index of the last member with this name, which is the one that applies."""
        return self._last.get(key)

    def count(self, key: str) -> int:
        """Return the number of members with this name."""
        return self._counts.get(key, 0)

    def gap_before(self, index: int, body: str) -> str:
        """Return the white space before a member."""
        before = self.start + 1 if index == 0 else self.members[index - 1].value_end
        gap = body[before : self.members[index].key_start]
        return gap[gap.rfind(",") + 1 :]

    def cut(self, index: int) -> tuple[int, int]:
        """Return the span to remove with a member, including its comma.

        It exactly reverses an insertion after the last member or after the opening brace.
        """
        member = self.members[index]
        if index > 0:
            return self.members[index - 1].value_end, member.value_end
        if len(self.members) > 1:
            return member.key_start, self.members[1].key_start
        return self.start + 1, member.value_end


def read_object(body: str, at: int) -> Object | None:
    """Return the object at `at` of a parsed text; None if there is another value."""
    if body[at] != "{":
        return None
    members: list[JsonMember] = []
    start, at = at, skip_blank(body, at + 1)
    while body[at] != "}":
        if body[at] == ",":
            at = skip_blank(body, at + 1)
        member = _read_member(body, at)
        members.append(member)
        at = skip_blank(body, member.value_end)
    return Object.of(members, start=start, end=at + 1)


def _read_member(body: str, key_start: int) -> JsonMember:
    key, key_end = _DECODER.raw_decode(body, key_start)
    value_start = skip_blank(body, skip_blank(body, key_end) + 1)
    value, value_end = _DECODER.raw_decode(body, value_start)
    return JsonMember(
        key=key,
        key_start=key_start,
        key_end=key_end,
        value=value,
        value_start=value_start,
        value_end=value_end,
    )
