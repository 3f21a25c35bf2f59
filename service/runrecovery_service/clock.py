"""The wall clock, in one place. Everything else takes the time as an argument."""

from __future__ import annotations

from datetime import UTC, datetime


def utc_now() -> datetime:
    """Return the time now, aware, in UTC."""
    return datetime.now(UTC)
