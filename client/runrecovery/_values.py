"""Converts plain Python values into messages of the contract."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import TypeAlias

from google.protobuf import duration_pb2, struct_pb2, timestamp_pb2

JsonValue: TypeAlias = (
    "bool | int | float | str | Sequence[JsonValue] | Mapping[str, JsonValue] | None"
)
"""Any JSON value."""

# Numbers are sent as doubles, which cannot represent every larger integer.
LARGEST_INTEGER = 2**53


def to_struct(fields: Mapping[str, JsonValue]) -> struct_pb2.Struct:
    """Return a JSON object as a message.

    Raises:
        TypeError: a value in it is not JSON.
        ValueError: a number in it cannot be sent unchanged.
    """
    return struct_pb2.Struct(fields={_key(key): to_value(value) for key, value in fields.items()})


def to_value(value: JsonValue) -> struct_pb2.Value:
    """Return a JSON value as a message; raises as `to_struct` does."""
    match value:
        case None:
            return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
        case bool():
            return struct_pb2.Value(bool_value=value)
        case int() | float():
            return struct_pb2.Value(number_value=_number(value))
        case str():
            return struct_pb2.Value(string_value=value)
        case Mapping():
            return struct_pb2.Value(struct_value=to_struct(value))
        case list() | tuple():
            values = struct_pb2.ListValue(values=[to_value(item) for item in value])
            return struct_pb2.Value(list_value=values)
        case _:
            raise TypeError(f"not a JSON value: {type(value).__name__}")


def to_timestamp(at: datetime | None) -> timestamp_pb2.Timestamp | None:
    """Return an aware time as a message; None stays None.

    Raises:
        ValueError: the time has no time zone.
    """
    if at is None:
        return None
    if at.utcoffset() is None:
        raise ValueError("a time needs a time zone, for example datetime.now(timezone.utc)")
    stamp = timestamp_pb2.Timestamp()
    stamp.FromDatetime(at)
    return stamp


def to_duration(seconds: float | None) -> duration_pb2.Duration | None:
    """Return seconds as a message; None stays None.

    Raises:
        ValueError: the number cannot be sent.
    """
    if seconds is None:
        return None
    span = duration_pb2.Duration()
    try:
        span.FromTimedelta(timedelta(seconds=seconds))
    except (OverflowError, ValueError) as error:
        raise ValueError(f"{seconds} seconds cannot be sent") from error
    return span


def _key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"a JSON object's keys are strings, not {type(key).__name__}")
    return key


def _number(value: float) -> float:
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise ValueError(f"{value} does not fit a JSON number exactly; send it as a string")
    if not math.isfinite(value):
        raise ValueError(f"{value} is not a JSON number")
    return float(value)
