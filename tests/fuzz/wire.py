"""Writes protobuf's wire format by hand, also in forms that no library would write."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from enum import IntEnum
from functools import lru_cache
from typing import Final

U64: Final = (1 << 64) - 1


class Wire(IntEnum):
    """How a field is written."""

    VARINT = 0
    FIXED64 = 1
    SIZED = 2
    OPEN = 3
    CLOSE = 4
    FIXED32 = 5


def varint(number: int) -> bytes:
    """Write a number; a negative one as 64 bits of two's complement."""
    number &= U64
    written = bytearray()
    while number > 127:
        written.append(number & 127 | 128)
        number >>= 7
    written.append(number)
    return bytes(written)


def tag(field: int, wire: Wire) -> bytes:
    """Write the tag of a field: its number and its wire type."""
    return varint(field << 3 | wire)


def number(field: int, value: int) -> bytes:
    """Write an integer, a bool or an enum."""
    return tag(field, Wire.VARINT) + varint(value)


def double(field: int, value: float) -> bytes:
    """Write a double."""
    return tag(field, Wire.FIXED64) + struct.pack("<d", value)


def sized(field: int, data: bytes) -> bytes:
    """Write a text, bytes or a message."""
    return tag(field, Wire.SIZED) + varint(len(data)) + data


def entry(field: int, key: bytes, value: bytes) -> bytes:
    """Write one entry of a map of texts to texts or messages."""
    return sized(field, sized(1, key) + sized(2, value))


# -- google.protobuf.Value -------------------------------------------------------------------------

NULL, NUMBER, TEXT, BOOL, OBJECT, LIST = range(1, 7)
"""The members of Value."""


def json_value(of: object) -> bytes:
    """Write a Value."""
    match of:
        case None:
            return number(NULL, 0)
        case bool():
            return number(BOOL, of)
        case int() | float():
            return double(NUMBER, of)
        case str():
            return sized(TEXT, of.encode("utf-8", "surrogatepass"))
        case dict():
            return sized(OBJECT, json_struct(of.items()))
        case list():
            return sized(LIST, b"".join(sized(1, json_value(item)) for item in of))
        case _:
            raise TypeError(f"not JSON: {of!r}")


def json_struct(items: Iterable[tuple[str, object]]) -> bytes:
    """Write a Struct. A key that is given twice is written twice."""
    return b"".join(
        entry(1, key.encode("utf-8", "surrogatepass"), json_value(value)) for key, value in items
    )


@lru_cache(maxsize=64)
def deep_value(depth: int, *, lists: bool) -> bytes:
    """Write a Value of nested objects or lists, this many levels deep."""
    value = sized(TEXT, b"bottom")
    for _ in range(depth):
        value = sized(LIST, sized(1, value)) if lists else sized(OBJECT, entry(1, b"k", value))
    return value
