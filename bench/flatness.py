"""Whether a size that is measured again and again stays the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

SLACK: Final = 1.2
"""How much larger the last quarter may be than the second: sizes grow in steps, memory varies."""


def has_grown(sizes: Sequence[float]) -> bool:
    """Return whether the largest size of the last quarter exceeds that of the second one."""
    quarter = len(sizes) // 4
    return max(sizes[-quarter:]) > SLACK * max(sizes[quarter : 2 * quarter])
