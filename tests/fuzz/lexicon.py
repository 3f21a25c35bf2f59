"""The ids and tokens of one target, for which cases hold placeholders of the same length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

ENGINES: Final = (b"held", b"held", b"quick", b"sticky", b"seeded", b"nobody")
REQUEST_IDS: Final = tuple(b"00000000-0000-4000-8000-%012d" % number for number in range(8))
"""The first one was used while the target was prepared."""
ROLES: Final = (
    "running", "queued", "waiting", "sticky", "succeeded", "failed", "canceled",
    "damaged", "kept", "interrupted", "lost",
)  # fmt: skip
"""What the runs of a target are for; `target.py` has the status of each."""
NUMBER_CHARS: Final = 4


def run_id(role: str, number: int = 0) -> str:
    """Return the id of the run that plays a role; 0 is the placeholder."""
    return f"fz-{role}-{number:0{NUMBER_CHARS}}"


def etag_slot(role: str) -> bytes:
    """Return the placeholder of a role's etag: `key-version`, three and one hexadecimal digits."""
    return b"@e%c@@" % (ord("a") + ROLES.index(role))


@dataclass(slots=True)
class Lexicon:
    """Placeholders, and the ids and tokens that they stand for now.

    Attributes:
        meant: by placeholder.
        tokens: placeholders of page tokens, cursors, and altered ones.
        report_ids: ids of reports.
        canned: whole requests, by the path of their method.
    """

    meant: dict[bytes, bytes] = field(default_factory=dict)
    tokens: list[bytes] = field(default_factory=list)
    report_ids: list[bytes] = field(default_factory=list)
    canned: Mapping[str, Sequence[bytes]] = field(default_factory=dict)

    run_ids: Sequence[bytes] = tuple(run_id(role).encode() for role in ROLES)
    etags: Sequence[bytes] = tuple(etag_slot(role) for role in ROLES)

    def all_words(self) -> list[bytes]:
        """Every id and token, for fields in which they do not belong."""
        return [*self.run_ids, *self.etags, *self.tokens, *self.report_ids, *REQUEST_IDS]

    def add(self, kind: str, value: bytes) -> bytes:
        """Keep an id or token, and return its placeholder."""
        number = sum(slot.startswith(b"@" + kind.encode()) for slot in self.meant)
        slot = f"@{kind}{number:02}".encode().ljust(len(value), b"@")
        self.meant[slot] = value
        return slot

    def mean(self, slot: bytes, value: bytes) -> None:
        """Let a placeholder stand for something else from now on."""
        if len(slot) == len(value):
            self.meant[slot] = value

    def fill(self, payload: bytes) -> bytes:
        """Return the payload with ids and tokens in place of the placeholders."""
        for slot, value in self.meant.items():
            payload = payload.replace(slot, value)
        return payload
