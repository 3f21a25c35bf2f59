"""Decides when a failed delivery is tried again."""

from __future__ import annotations

from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Final

FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 300.0
"""The longest pause. An endpoint that works again gets every delivery within this time."""
LONGEST_RETRY_AFTER_S: Final = 3_600.0
"""The longest pause that an endpoint can ask for."""


def pause_s(failures: int, *, jitter: float, retry_after_s: float = 0.0) -> float:
    """Return the seconds until the next try.

    Args:
        failures: how often the delivery has failed in a row, at least 1.
        jitter: a random number from 0 to 1, by which the pause is shortened by up to half. The
            tries of many runs then do not coincide.
        retry_after_s: the pause that the endpoint has asked for; 0: none.
    """
    longest = min(FIRST_PAUSE_S * 2.0 ** min(failures - 1, 20), LONGEST_PAUSE_S)
    return max(longest * (1 - jitter / 2), min(retry_after_s, LONGEST_RETRY_AFTER_S))


def retry_after_s(header: str | None, *, now: datetime) -> float:
    """Return the seconds until the time in a Retry-After header; 0 without a valid header."""
    if header is None:
        return 0.0
    if header.isascii() and header.isdigit():
        return float(min(int(header[:10]), LONGEST_RETRY_AFTER_S))
    try:
        return max(0.0, (parsedate_to_datetime(header) - now).total_seconds())
    except (ValueError, TypeError, OverflowError):  # not a date, without time zone, or out of range
        return 0.0
