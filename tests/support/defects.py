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


def defect_in(event: Mapping[str, Any]) -> str | None:
    """Return the name of the defect in a log event, or None."""
    names = {str(event.get("error")), *_RAISED.findall(str(event.get("exception", "")))}
    raised = event.get("exc_info")
    if raised:
        kind = type(raised) if isinstance(raised, BaseException) else sys.exc_info()[0]
        names.add("" if kind is None else kind.__name__)
    return min(names & DEFECTS, default=None)
