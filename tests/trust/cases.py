"""The three editors with their test files, which are parsed here without the code under test."""

from __future__ import annotations

import copy
import json
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from runrecovery_service.trust import claude, codex, gemini
from runrecovery_service.trust.entry import Editor
from trust import corpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One CLI: its editor, its corpus, and how its file is read."""

    name: str
    editor: Editor
    files: dict[str, bytes | None]
    load: Callable[[bytes], Any]
    path: Callable[[str], tuple[str, ...]]
    value: object

    def means(self, data: bytes | None) -> Any:
        """Return the parsed file; empty if there is no file or only white space."""
        text = (data or b"").removeprefix(b"\xef\xbb\xbf")
        return self.load(text) if text.strip() else {}

    def at(self, data: bytes | None, folder: str) -> object:
        """Return the entry's value; "absent" if there is none."""
        found = self.means(data)
        for key in self.path(folder):
            if key not in found:
                return "absent"
            found = found[key]
        return found

    def with_entry(self, data: bytes | None, folder: str) -> Any:
        """Return the parsed file with the entry of the folder added."""
        wanted = copy.deepcopy(self.means(data))
        *above, last = self.path(folder)
        found = wanted
        for key in above:
            found = found.setdefault(key, {})
        found[last] = self.value
        return wanted


def _toml(text: bytes) -> Any:
    # nan is not itself; digits are.
    return tomllib.loads(text.decode(), parse_float=lambda digits: f"float {digits}")


KINDS = {
    kind.name: kind
    for kind in (
        Kind(
            name="codex",
            editor=codex.EDITOR,
            files=corpus.CODEX,
            load=_toml,
            path=lambda folder: ("projects", folder, "trust_level"),
            value="trusted",
        ),
        Kind(
            name="gemini",
            editor=gemini.EDITOR,
            files=corpus.GEMINI,
            load=lambda text: json.loads(text, parse_int=str),
            path=lambda folder: (folder,),
            value="TRUST_FOLDER",
        ),
        Kind(
            name="claude",
            editor=claude.EDITOR,
            files=corpus.CLAUDE,
            load=json.loads,
            path=lambda folder: ("projects", folder, "hasTrustDialogAccepted"),
            value=True,
        ),
    )
}
FILES = [(kind, name) for kind, each in KINDS.items() for name in each.files]
