"""When a failed delivery is tried again."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest
from runrecovery_service.webhooks.retries import pause_s, retry_after_s

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def test_pauses_double_up_to_five_minutes() -> None:
    pauses = [pause_s(failures, jitter=0.0) for failures in range(1, 12)]

    assert pauses == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert pause_s(10**9, jitter=0.0) == 300


def test_jitter_shortens_a_pause_by_up_to_half() -> None:
    assert [pause_s(5, jitter=jitter) for jitter in (0.0, 0.5, 1.0)] == [16, 12, 8]


def test_an_endpoint_can_ask_for_an_hour_and_no_more() -> None:
    assert pause_s(1, jitter=0.0, retry_after_s=90) == 90
    assert pause_s(1, jitter=0.0, retry_after_s=1e9) == 3600
    assert pause_s(9, jitter=0.0, retry_after_s=5) == 256


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        (None, 0),
        ("120", 120),
        ("9" * 5000, 3600),
        ("Tue, 24 Nov 2026 12:01:30 GMT", 90),
        ("Tue, 24 Nov 2026 11:00:00 GMT", 0),
        ("Tue, 24 Nov 2026 12:01:30", 0),
        ("Mon, 01 Jan 99999999999 00:00:00 GMT", 0),
        ("Tue, 24 Nov 2026 12:01:30 +99999999999999999999", 0),
        ("-5", 0),
        ("1.5", 0),
        ("soon", 0),
        ("", 0),
        ("²", 0),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float) -> None:
    assert retry_after_s(header, now=NOW) == seconds
