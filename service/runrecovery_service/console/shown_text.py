"""Text of agents and callers as harmless HTML, which shows every character.

Escape sequences of terminals are removed. Every other character without a visible form is shown by
its name: an agent must neither hide text from the reader nor change the order in which it is read.
"""

from __future__ import annotations

import re
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
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f"
    "\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff9-\ufffb"
    "\ud800-\udfff\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""Control characters except tab and newline, characters that change the direction of text, and
characters without width. U+200C and U+200D stay: writing systems and emoji need them."""


def without_terminal_sequences(text: str) -> str:
    """Return the text without escape sequences of terminals, and with newlines of one kind."""
    return _TERMINAL_SEQUENCE.sub("", text.replace("\r\n", "\n"))


def shown(text: str, limit: int | None = None) -> Markup:
    """Return text as HTML.

    Args:
        limit: the most characters to show; an ellipsis stands for the rest.
    """
    is_cut = limit is not None and len(text) > limit
    text = without_terminal_sequences(text[:limit] if is_cut else text)
    parts: list[Markup] = []
    end = 0
    for found in _INVISIBLE.finditer(text):
        parts.append(escape(text[end : found.start()]))
        parts.append(_named(found.group()))
        end = found.end()
    parts.append(escape(text[end:]))
    if is_cut:
        parts.append(Markup("…"))
    return Markup("").join(parts)


def shown_line(text: str, limit: int | None = None) -> Markup:
    """Return text as HTML for one line: newlines and tabs are shown by their names, too."""
    html = shown(text, limit)
    if "\n" not in html and "\t" not in html:
        return html
    return Markup(html.replace("\n", _named("\n")).replace("\t", _named("\t")))  # noqa: S704 - escaped by `shown`


def shown_name(text: str) -> Markup:
    """Return a name as HTML; a narrow page breaks it after an underscore."""
    return Markup(shown_line(text).replace("_", Markup("_<wbr>")))  # noqa: S704 - escaped by `shown`


def _named(char: str) -> Markup:
    return Markup('<span class="ctl">U+{0:04X}</span>').format(ord(char))
