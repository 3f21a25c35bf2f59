"""Find defects of the code in log events: exceptions that the service caught and only logged."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from typing import Any, Final

DEFECTS: Final = frozenset(
    {
        "AssertionError", "AttributeError", "ImportError", "ModuleNotFoundError", "NameError",
        "NotImplementedError", "TypeError", "UnboundLocalError",
    }
)  # fmt: skip
"""Exceptions that only code can cause: no damaged database, file or agent."""
_RAISED: Final = re.compile(r"^[ |+-]*([A-Za-z]+)(?::|$)", re.MULTILINE)
_RAISED_IN_JSON: Final = re.compile(r"'exc_type': '([A-Za-z]+)'")
"""In an event of a log of JSON lines, the exceptions are objects, which contain their causes."""


def defect_in(event: Mapping[str, Any]) -> str | None:
    """Return the name of the defect in a log event, or None."""
    exception = str(event.get("exception", ""))
    names = {str(event.get("error")), *_RAISED.findall(exception)}
    names.update(_RAISED_IN_JSON.findall(exception))
    raised = event.get("exc_info")
    if raised:
        kind = type(raised) if isinstance(raised, BaseException) else sys.exc_info()[0]
        names.add("" if kind is None else kind.__name__)
    return min(names & DEFECTS, default=None)
