"""JSON objects from outside, as far as the store and the wire can hold them exactly.

What an engine prints is not trusted: NaN, numbers beyond a double, NUL, lone surrogates, deep
nesting and keys that come twice are refused here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from itertools import count
from typing import Final, NoReturn

from runrecovery_service.domain.run import JsonObject, JsonValue
from runrecovery_service.engines.dialect import ProtocolError

MAX_DEPTH: Final = 32
"""Deepest nesting of objects and lists in a line. Protobuf readers give up at 100 messages, and an
object inside a Struct takes three of them: a deeper output could be stored but no caller could read
the run any more."""


def read_object(line: bytes) -> JsonObject:
    """Read one JSON object, UTF-8.

    Raises:
        ProtocolError: it is none, or holds what could not be kept exactly.
    """
    try:
        text = line.decode("utf-8")
    except ValueError:
        raise _no_json() from None
    found, after = read_first_object(text, len(text) - len(text.lstrip(_BLANKS)))
    if text[after:].strip(_BLANKS):
        raise _no_json()
    return found


def read_first_object(text: str, begin: int) -> tuple[JsonObject, int]:
    """Read the JSON object that begins there, and return it with where it ends.

    Raises:
        ProtocolError: there is none, or it holds what could not be kept exactly.
    """
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # not JSON, or an integer of thousands of digits
        # "from None": the cause would carry the text, and with it perhaps a session handle.
        raise _no_json() from None
    if not isinstance(value, dict):
        raise ProtocolError("a line is not a JSON object")
    _check(value)
    return value, end


def _no_json() -> ProtocolError:
    return ProtocolError("a line is not JSON")


def _no_constant(name: str) -> NoReturn:
    raise ProtocolError(f"{name} is not JSON")


def _unique(pairs: list[tuple[str, JsonValue]]) -> JsonObject:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ProtocolError("an object has a key twice")
    return found


_DECODER: Final = json.JSONDecoder(parse_constant=_no_constant, object_pairs_hook=_unique)
_BLANKS: Final = " \t\r\n"


def _too_deep() -> ProtocolError:
    return ProtocolError(f"a message is nested deeper than {MAX_DEPTH}")


def _check(root: JsonObject) -> None:
    """Refuse what the database or protobuf could not hold. Iterative: the depth is theirs."""
    level: list[JsonValue] = [root]
    for depth in count(1):
        inside = [value for value in level if isinstance(value, dict | list)]
        for value in level:
            if not isinstance(value, dict | list):
                _check_leaf(value)
        if not inside:
            return
        if depth > MAX_DEPTH:
            raise _too_deep()
        level = [part for value in inside for part in _parts(value)]


def _parts(value: JsonObject | list[JsonValue]) -> Iterator[JsonValue]:
    yield from value
    if isinstance(value, dict):
        yield from value.values()


def _check_leaf(value: float | str | None) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise ProtocolError("a text holds a NUL character")
        if any("\ud800" <= char <= "\udfff" for char in value):
            raise ProtocolError("a text holds half of a surrogate pair")
    elif value is not None and not _fits_double(value):
        raise ProtocolError("a number is out of range")


def _fits_double(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int that no double can hold
        return False
