"""Timestamps and durations of the contract, both ways."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_S: Final = 86_400
_FIRST_S: Final = int((datetime.min.replace(tzinfo=UTC) - EPOCH).total_seconds())
"""Start of year 1."""
_LAST_S: Final = (datetime.max.replace(tzinfo=UTC) - EPOCH) // timedelta(seconds=1)
"""Last second of year 9999."""
_MAX_DURATION_S: Final = 315_576_000_000
"""10,000 years, the limit of a protobuf Duration."""


def write_time(target: Timestamp, time: datetime) -> None:
    """Write an aware time into a Timestamp, exact to the microsecond."""
    since = time - EPOCH
    target.seconds = since.days * _DAY_S + since.seconds
    if since.microseconds:
        target.nanos = since.microseconds * 1000
    elif not target.seconds:
        target.SetInParent()


def read_time(stamp: Timestamp) -> datetime:
    """Return a Timestamp as an aware UTC time, rounded up to the next microsecond.

    Recorded times are whole microseconds. Rounding up therefore keeps the meaning of a filter's
    bounds.

    Raises:
        ValueError: the year is outside 1 to 9999, or nanos outside 0 to 999,999,999.
    """
    if not 0 <= stamp.nanos < 1_000_000_000:
        raise ValueError("nanos must be 0 to 999999999")
    if not _FIRST_S <= stamp.seconds <= _LAST_S:
        raise ValueError("must be in the years 1 to 9999")
    microseconds = -(-stamp.nanos // 1000)
    if stamp.seconds == _LAST_S:  # datetime has no microsecond after year 9999's last
        microseconds = min(microseconds, 999_999)
    return EPOCH + timedelta(seconds=stamp.seconds, microseconds=microseconds)


def read_optional_time(message: Message, field: str) -> datetime | None:
    """Return the time in a field of a message as `read_time` does; None if the field is unset."""
    return read_time(getattr(message, field)) if message.HasField(field) else None


def read_duration_s(span: Duration) -> float:
    """Return a Duration in seconds.

    Raises:
        ValueError: longer than 10,000 years, or seconds and nanos differ in sign.
    """
    if abs(span.seconds) > _MAX_DURATION_S or abs(span.nanos) > 999_999_999:
        raise ValueError("must be at most 10000 years, nanos at most 999999999")
    if span.seconds * span.nanos < 0:
        raise ValueError("seconds and nanos must have one sign")
    return span.seconds + span.nanos / 1e9


def write_duration(target: Duration, seconds: float) -> None:
    """Write seconds into a Duration, rounded to the microsecond."""
    whole, us = divmod(round(seconds * 1_000_000), 1_000_000)
    target.seconds = whole
    target.nanos = us * 1000
