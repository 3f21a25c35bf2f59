"""Text that cannot steer a terminal."""

from __future__ import annotations


def safe(text: str) -> str:
    """Return text whose control characters are written out: agents must not steer a terminal."""
    if text.isprintable():
        return text
    return "".join(
        mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text
    )
