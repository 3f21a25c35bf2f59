"""A defect that the service only logs is recognised by the tests, however it was logged."""

from __future__ import annotations

import pytest
import structlog
from support.defects import defect_in

TRACEBACK = "Traceback (most recent call last):\n  File x, line 1, in y\nTypeError: 1 argument"
IN_JSON = [{"exc_type": "ExceptionGroup", "exceptions": [[{"exc_type": "NameError"}]]}]
GROUP = "  + ExceptionGroup: unhandled (1 sub-exception)\n    | NameError: name 'x'"


@pytest.mark.parametrize(
    ("event", "defect"),
    [
        ({"event": "trust.not_cleared", "error": "TypeError"}, "TypeError"),
        ({"event": "service.defect", "exc_info": AttributeError("x")}, "AttributeError"),
        ({"event": "execution.dispatch_failed", "exception": TRACEBACK}, "TypeError"),
        ({"event": "execution.session_failed", "exception": GROUP}, "NameError"),
        ({"event": "execution.dispatch_failed", "exception": IN_JSON}, "NameError"),
        ({"event": "trust.not_cleared", "error": "StorageFull"}, None),
        ({"event": "execution.launch_failed", "reason": "TypeError: not of ours"}, None),
        ({"event": "service.serving"}, None),
    ],
)
def test_a_defect_is_recognised_in_a_log_event(
    event: dict[str, object], defect: str | None
) -> None:
    assert defect_in(event) == defect


def test_a_defect_is_recognised_in_an_unformatted_traceback() -> None:
    try:
        undefined  # type: ignore[name-defined] # noqa: B018
    except NameError:
        assert defect_in({"event": "x", "exc_info": True}) == "NameError"


@pytest.mark.expects_defects("TypeError")
def test_a_test_marked_expects_defects_may_cause_them() -> None:
    structlog.get_logger().warning("trust.not_cleared", error="TypeError")
