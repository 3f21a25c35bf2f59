"""Checks that every store and message can hold a text: it has no NUL and no lone surrogate."""

from __future__ import annotations

import re
from typing import Final

_NOT_STORABLE: Final = re.compile("[\0\ud800-\udfff]")


def is_storable(text: str) -> bool:
    """Return True if the text can be stored as it is."""
    return _NOT_STORABLE.search(text) is None


def storable(text: str) -> str:
    """Return the text with a replacement character for each one that cannot be stored."""
    return _NOT_STORABLE.sub("\N{REPLACEMENT CHARACTER}", text)
