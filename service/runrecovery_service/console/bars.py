"""Bars that show amounts as parts in proportion. A bar is `BAR_UNITS` wide. Pure.

The pages draw bars as SVG, because the Content-Security-Policy forbids `style` attributes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from runrecovery_service.lazy_dataclass import dataclass

BAR_UNITS: Final = 1000
"""Width of a whole bar."""
MIN_UNITS: Final = 6
"""Width of the narrowest part, so that people can see this part."""


@dataclass(frozen=True, slots=True)
class BarPart:
    """A part of a bar. `text` describes it to the reader."""

    start: int
    width: int
    tone: str
    text: str


def shares(amounts: Sequence[float]) -> list[int]:
    """Return the width of each part, in proportion to its amount. The width of an amount 0 is 0."""
    total = sum(amounts)
    some = sum(1 for amount in amounts if amount > 0)
    if some * MIN_UNITS > BAR_UNITS:
        return [BAR_UNITS // some if amount > 0 else 0 for amount in amounts]
    rest = BAR_UNITS - some * MIN_UNITS
    found = [MIN_UNITS + int(rest * amount / total) if amount > 0 else 0 for amount in amounts]
    if some:
        found[found.index(max(found))] += BAR_UNITS - sum(found)  # the rest after rounding
    return found


def bar(parts: Sequence[tuple[float, str, str]]) -> tuple[BarPart, ...]:
    """Return a bar whose parts are given by amount, tone (a colour's name) and text."""
    found: list[BarPart] = []
    start = 0
    for (_, tone, text), width in zip(parts, shares([part[0] for part in parts]), strict=True):
        if width:
            found.append(BarPart(start, width, tone, text))
        start += width
    return tuple(found)
