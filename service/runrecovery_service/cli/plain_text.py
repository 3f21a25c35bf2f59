"""Text without control characters, for terminals."""

from __future__ import annotations


def safe(text: str) -> str:
    """Return the text with control characters escaped: an agent must not control the terminal.

    A byte of a path that is not UTF-8 is shown as the byte, for example `\\xff`.
    """
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _escape(char) for char in text)


def _escape(char: str) -> str:
    code = ord(char)
    if 0xDC80 <= code <= 0xDCFF:  # Python's replacement for the undecodable byte `code - 0xDC00`
        return f"\\x{code - 0xDC00:02x}"
    return char.encode("unicode_escape").decode()
