"""The trace of a call is read from its metadata, and nothing of a damaged value is kept."""

from __future__ import annotations

import pytest
from runrecovery_service.rpc.trace_context import read_traceparent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
VALID = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (VALID, VALID),
        (f" {VALID}\t", VALID),
        (f"00-{TRACE}-{SPAN}-00", f"00-{TRACE}-{SPAN}-00"),
        (f"00-{TRACE}-{SPAN}-02", f"00-{TRACE}-{SPAN}-00"),
        (f"00-{TRACE}-{SPAN}-ff", VALID),
        (f"cc-{TRACE}-{SPAN}-01", VALID),
        (f"cc-{TRACE}-{SPAN}-01-what-comes-later", VALID),
    ],
)
def test_a_valid_value_is_read_as_version_00_with_no_flag_but_sampled(sent: str, read: str) -> None:
    assert read_traceparent([("x", "y"), ("traceparent", sent)]) == read


@pytest.mark.parametrize(
    "sent",
    [
        "",
        "00",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01\nLD_PRELOAD=x",
        f"cc-{TRACE}-{SPAN}-01-\n",
        f"cc-{TRACE}-{SPAN}-01-{'x' * 500}",
        f"{VALID},{VALID}",
        VALID.encode(),
    ],
)
def test_a_value_that_is_not_valid_is_ignored(sent: str | bytes) -> None:
    assert read_traceparent([("traceparent", sent)]) is None


def test_a_call_without_a_value_or_with_two_has_no_trace() -> None:
    assert read_traceparent([]) is None
    assert read_traceparent([("traceparent", VALID), ("traceparent", VALID)]) is None
