"""Bars that show amounts as parts in proportion. A bar is `BAR_UNITS` wide. Pure.

The pages draw them as SVG, because their policy allows no style in an element.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from runrecovery_service.lazy_dataclass import dataclass

BAR_UNITS: Final = 1000
"""Width of a whole bar."""
MIN_UNITS: Final = 6
"""Width of the narrowest part, so that it can be seen."""


@dataclass(frozen=True, slots=True)
class BarPart:
    """A part of a bar. `text` describes it to the reader."""

    start: int
    width: int
    tone: str
    text: str


def shares(amounts: Sequence[float]) -> list[int]:
    """Return the width of each part, in proportion to its amount. An amount of 0 has no width."""
    total = sum(amounts)
    some = sum(1 for amount in amounts if amount > 0)
    if some * MIN_UNITS > BAR_UNITS:
        return [BAR_UNITS // some if amount > 0 else 0 for amount in amounts]
    rest = BAR_UNITS - some * MIN_UNITS
    found = [MIN_UNITS + int(rest * amount / total) if amount > 0 else 0 for amount in amounts]
    if some:
        found[found.index(max(found))] += BAR_UNITS - sum(found)  # what rounding has left
    return found


def bar(parts: Sequence[tuple[float, str, str]]) -> tuple[BarPart, ...]:
    """Return a bar of parts: amount, tone and text of each."""
    found: list[BarPart] = []
    start = 0
    for (_, tone, text), width in zip(parts, shares([part[0] for part in parts]), strict=True):
        if width:
            found.append(BarPart(start, width, tone, text))
        start += width
    return tuple(found)
