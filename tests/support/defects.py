"""Exceptions that an edge of the service caught and only logged, and that no test foresaw."""

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
"""What code alone is the cause of: no database, file or agent, however damaged."""
_RAISED: Final = re.compile(r"^[ |+-]*([A-Za-z]+)(?::|$)", re.MULTILINE)


def defect_in(event: Mapping[str, Any]) -> str | None:
    """Return the name of the defect that a log event tells of, if it does."""
    names = {str(event.get("error")), *_RAISED.findall(str(event.get("exception", "")))}
    raised = event.get("exc_info")
    if raised:
        kind = type(raised) if isinstance(raised, BaseException) else sys.exc_info()[0]
        names.add("" if kind is None else kind.__name__)
    return min(names & DEFECTS, default=None)
