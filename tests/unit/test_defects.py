"""A defect that an edge caught and logged is seen by the tests, however it was logged."""

from __future__ import annotations

import pytest
import structlog
from support.defects import defect_in

TRACEBACK = "Traceback (most recent call last):\n  File x, line 1, in y\nTypeError: 1 argument"
GROUP = "  + ExceptionGroup: unhandled (1 sub-exception)\n    | NameError: name 'x'"


@pytest.mark.parametrize(
    ("event", "defect"),
    [
        ({"event": "trust.not_cleared", "error": "TypeError"}, "TypeError"),
        ({"event": "service.defect", "exc_info": AttributeError("x")}, "AttributeError"),
        ({"event": "execution.dispatch_failed", "exception": TRACEBACK}, "TypeError"),
        ({"event": "execution.session_failed", "exception": GROUP}, "NameError"),
        ({"event": "trust.not_cleared", "error": "StorageFull"}, None),
        ({"event": "execution.launch_failed", "reason": "TypeError: not of ours"}, None),
        ({"event": "service.serving"}, None),
    ],
)
def test_a_log_event_tells_of_a_defect(event: dict[str, object], defect: str | None) -> None:
    assert defect_in(event) == defect


def test_a_traceback_that_is_not_formatted_yet_tells_of_it() -> None:
    try:
        undefined  # type: ignore[name-defined] # noqa: B018
    except NameError:
        assert defect_in({"event": "x", "exc_info": True}) == "NameError"


@pytest.mark.expects_defects("TypeError")
def test_a_test_that_causes_a_defect_says_so() -> None:
    structlog.get_logger().warning("trust.not_cleared", error="TypeError")
