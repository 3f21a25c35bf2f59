"""Times and durations as the pages show them. Pure."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp

from runrecovery_service.lazy_dataclass import dataclass


@dataclass(frozen=True, slots=True)
class Moment:
    """A point of time. The script of the page shows it in the zone of the viewer.

    Attributes:
        iso: for `<time datetime>`, in UTC.
        utc: readable, to the second.
        exact: readable, to the millisecond.
    """

    iso: str
    utc: str
    exact: str


def moment(at: Timestamp) -> Moment | None:
    """Return a time of the contract, or None if the time is unset."""
    when = to_datetime(at)
    return None if when is None else moment_of(when)


def moment_of(when: datetime) -> Moment:
    """Return a time in UTC."""
    when = when.astimezone(UTC)
    milliseconds = f"{when:%Y-%m-%dT%H:%M:%S}.{when.microsecond // 1000:03d}"
    return Moment(
        iso=f"{milliseconds}Z",
        utc=f"{when:%Y-%m-%d %H:%M:%S} UTC",
        exact=f"{milliseconds.replace('T', ' ')} UTC",
    )


def to_datetime(at: Timestamp) -> datetime | None:
    """Return a time of the contract in UTC, or None if the time is unset."""
    return at.ToDatetime(tzinfo=UTC) if at.seconds or at.nanos else None


def duration_text(duration: timedelta | Duration) -> str:
    """Return a duration with two units at most: `340 ms`, `4.2 s`, `3 min 5 s`, `2 d 4 h`."""
    span = duration if isinstance(duration, timedelta) else duration.ToTimedelta()
    seconds = max(span.total_seconds(), 0.0)
    if 0 < seconds < 0.0005:
        return "< 1 ms"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    parts = [
        (whole // 86_400, "d"),
        (whole // 3600 % 24, "h"),
        (whole // 60 % 60, "min"),
        (whole % 60, "s"),
    ]
    first = next(at for at, (count, _) in enumerate(parts) if count)
    return " ".join(f"{count} {unit}" for count, unit in parts[first : first + 2] if count)
