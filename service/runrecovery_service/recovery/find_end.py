"""The interface that finds the ends of turns in kept output. `execution/` implements it."""

from __future__ import annotations

from collections.abc import Callable

from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.storage.found_ends import OpenTurn

FindEnd = Callable[[OpenTurn], FoundEnd | None]
"""Returns the end of a turn that lies in its kept output, None if nothing proves one. Blocking."""


def find_no_end(turn: OpenTurn) -> None:
    """Return None: nothing is searched."""
