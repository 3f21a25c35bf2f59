"""The interface for finding the ends of turns in their output files. `execution/` implements it."""

from __future__ import annotations

from collections.abc import Callable

from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.storage.found_ends import OpenTurn

FindEnd = Callable[[OpenTurn], FoundEnd | None]
"""Returns the end of a turn that the kept output shows; None if the output shows no end.
Blocking."""


def find_no_end(turn: OpenTurn) -> None:
    """Return None: search nothing."""
