"""Parses JSON objects, and refuses those that the database or protobuf could not hold exactly.

The output of an engine is not trusted. Refused are NaN, numbers beyond a double, NUL, lone
surrogates, deep nesting and duplicate keys.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from itertools import count
from typing import Final, NoReturn

from runrecovery_service.domain.run import JsonObject, JsonValue
from runrecovery_service.engines.dialect import ProtocolError

MAX_DEPTH: Final = 32
"""Deepest nesting of objects and lists in a line. Protobuf readers refuse more than 100 nested
messages, and an object in a Struct takes three of them. So no caller could read a run with a deeper
output."""


def read_object(line: bytes) -> JsonObject:
    """Return the JSON object of a line in UTF-8.

    Raises:
        ProtocolError: the line is not a JSON object, or a value cannot be stored exactly.
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
    """Return the JSON object that begins at `begin`, and the position after it.

    Raises:
        ProtocolError: there is no JSON object, or a value cannot be stored exactly.
    """
    try:
        value, end = _DECODER.raw_decode(text, begin)
    except RecursionError:
        raise _too_deep() from None
    except ValueError:  # not JSON, or an integer of thousands of digits
        # "from None": the cause would contain the text, which can contain a session handle.
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
_HALF_OF_PAIR: Final = re.compile("[\ud800-\udfff]")


def _too_deep() -> ProtocolError:
    return ProtocolError(f"a message is nested deeper than {MAX_DEPTH}")


def _check(root: JsonObject) -> None:
    """Raise ProtocolError for a value that cannot be stored. Iterative, because input can be deep.

    Every line of every agent is checked here, so the code avoids slow things: generators and unions
    of types.
    """
    level: list[JsonObject | list[JsonValue]] = [root]
    for depth in count(1):
        below: list[JsonObject | list[JsonValue]] = []
        for container in level:
            for value in _parts(container):
                if type(value) is dict or type(value) is list:
                    below.append(value)
                else:
                    _check_leaf(value)
        if not below:
            return
        if depth == MAX_DEPTH:
            raise _too_deep()
        level = below


def _parts(container: JsonObject | list[JsonValue]) -> Iterable[JsonValue]:
    return [*container, *container.values()] if isinstance(container, dict) else container


def _check_leaf(value: JsonValue) -> None:
    if isinstance(value, str):
        if "\0" in value:
            raise ProtocolError("a text holds a NUL character")
        if not value.isascii() and _HALF_OF_PAIR.search(value):
            raise ProtocolError("a text holds half of a surrogate pair")
    elif isinstance(value, int | float) and not _fits_double(value):
        raise ProtocolError("a number is out of range")


def _fits_double(number: float) -> bool:
    try:
        return math.isfinite(number)
    except OverflowError:  # an int that no double can hold
        return False
