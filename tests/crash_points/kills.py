"""Names of kills. A forked service imports this module, so it imports only light ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True, slots=True)
class Kill:
    """One kill of a service.

    Attributes:
        points: the full names of crash points. The first one that is passed has the kill.
        times: the pass of the point at which the service is killed, counted in one process.
        with_shims: whether the shims are killed before, so that their agents become orphans.
        instance: the instance that is killed; empty if there is only one.
    """

    points: tuple[str, ...]
    times: int = 1
    with_shims: bool = False
    instance: str = ""

    def __str__(self) -> str:
        place = f"{self.instance}/" if self.instance else ""
        how = "+shims" if self.with_shims else ""
        return f"{place}{'|'.join(self.points)}#{self.times}{how}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return the kill of a text that `str` has made."""
        instance, _, named = text.rpartition("/")
        names, _, rest = named.partition("#")
        times, plus, _ = rest.partition("+")
        return cls(tuple(names.split("|")), int(times or 1), bool(plus), instance)
