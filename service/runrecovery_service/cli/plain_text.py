"""Text without control characters, for terminals."""

from __future__ import annotations


def safe(text: str) -> str:
    """Return the text with control characters escaped: an agent must not control the terminal."""
    if text.isprintable():
        return text
    return "".join(
        mark if mark.isprintable() else mark.encode("unicode_escape").decode() for mark in text
    )
