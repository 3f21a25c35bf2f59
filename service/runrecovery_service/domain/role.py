"""The roles of callers. `rpc/method_roles.py` has the role that each method needs."""

from __future__ import annotations

from enum import IntEnum


class Role(IntEnum):
    """The rights of a caller. Each role includes the ones before it."""

    VIEWER = 1
    """Read runs, their questions, events and output, and the decisions about them."""
    REPLIER = 2
    """Also answer questions and cancel runs."""
    CREATOR = 3
    """Also create and reopen runs."""
    OPERATOR = 4
    """Everything: also the reports and plans of recoveries, which are about all runs."""
