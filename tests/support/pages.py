"""The code blocks of the documentation."""

from __future__ import annotations

import re

from support.engines import REPOSITORY


def code_blocks(page: str, *, language: str = "") -> list[str]:
    """Return the code blocks of a page in one language, in order."""
    text = (REPOSITORY / page).read_text("utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [code for tag, code in found if tag == language]
