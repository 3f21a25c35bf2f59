"""Text of agents and callers as harmless HTML, which shows every character.

Escape sequences of terminals are removed. Every other character without a visible form is shown by
its name: an agent must neither hide text from the reader nor change the order in which it is read.
"""

from __future__ import annotations

import re
from itertools import islice
from typing import Final

from markupsafe import Markup, escape

_TERMINAL_SEQUENCE: Final = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]"  # CSI: colours, cursor
    r"|\x9b[0-?]*[ -/]*[@-~]"  # the same by one character
    r"|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)"  # OSC: titles, links
    r"|\x1b[PX^_][^\x1b]*\x1b\\"  # DCS, SOS, PM, APC
    r"|\x1b[ -/]*[0-~]"
)
_INVISIBLE: Final = re.compile(
    "([\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"
    "\ud800-\udfff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff])\\1*"
)
"""Matches invisible characters, one or equal ones in a row: control characters except tab and
newline, characters that change the direction of text, and characters without width. U+200C and
U+200D are not among them, because writing systems and emoji need them."""

MAX_NAMED: Final = 20_000
"""How many invisible characters of one text are shown by their names; equal ones in a row count
once. An agent can write a million, and naming them all would block the service for many seconds."""


def without_terminal_sequences(text: str) -> str:
    """Return the text without escape sequences of terminals, and with newlines of one kind."""
    return _TERMINAL_SEQUENCE.sub("", text.replace("\r\n", "\n"))


def shown(text: str, limit: int | None = None) -> Markup:
    """Return text as HTML. After `MAX_NAMED` named characters, an ellipsis replaces the rest.

    Args:
        limit: the most characters to show. An ellipsis replaces the rest.
    """
    kept, is_whole = _beginning(text, limit)
    html = _INVISIBLE.sub(_names, str(escape(kept)))
    return Markup(html if is_whole else f"{html}…")  # noqa: S704 - escaped one line before


def is_shown_whole(text: str, limit: int) -> bool:
    """Return whether `shown` shows the whole text."""
    return _beginning(text, limit)[1]


def _beginning(text: str, limit: int | None) -> tuple[str, bool]:
    """Return the part of a text to show, and whether it is the whole text."""
    is_whole = limit is None or len(text) <= limit
    text = without_terminal_sequences(text if is_whole else text[:limit])
    beyond = next(islice(_INVISIBLE.finditer(text), MAX_NAMED, None), None)
    return (text, is_whole) if beyond is None else (text[: beyond.start()], False)


def shown_line(text: str, limit: int | None = None) -> Markup:
    """Return text as HTML for one line, in which newlines and tabs are shown by their names too."""
    html = str(shown(text, limit))
    html = html.replace("\n", _named("\n")).replace("\t", _named("\t"))
    return Markup(html)  # noqa: S704 - escaped by `shown`


def shown_name(text: str) -> Markup:
    """Return a name as HTML; a narrow page breaks it after an underscore."""
    return Markup(shown_line(text).replace("_", Markup("_<wbr>")))  # noqa: S704 - escaped by `shown`


def _names(found: re.Match[str]) -> str:
    return _named(found[1], len(found[0]))


def _named(char: str, times: int = 1) -> str:
    more = f" &times;{times}" if times > 1 else ""
    return f'<span class="ctl">U+{ord(char):04X}{more}</span>'
