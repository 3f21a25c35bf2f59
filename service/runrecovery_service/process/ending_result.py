"""The result of ending one launch's processes."""

from __future__ import annotations

from dataclasses import field, replace
from typing import Final

from runrecovery_service.domain.reconciliation import Orphan
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.process.markers import Identity, Proof

BY_SERVICE, BY_SHIM = "service", "shim"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """The numbers of found and ended processes of a launch, without the recorded shim.

    Attributes:
        found: processes that were alive when they were found.
        ended: found processes that are dead now.
        dead: pid and start ticks of these dead processes.
        refused: one sentence for each process that could not or must not be ended.
        orphans: each found process, with the signals that it got.
        gone: no process of the launch is alive, its shim included.
    """

    found: int = 0
    ended: int = 0
    dead: frozenset[Identity] = field(default=frozenset(), repr=False, compare=False)
    refused: tuple[str, ...] = ()
    orphans: tuple[Orphan, ...] = field(default=(), repr=False, compare=False)
    gone: bool

    def with_shim_kills(self, killed: frozenset[Identity]) -> Ending:
        """Add the processes that the shim killed by itself. No process is counted twice."""
        unseen = killed - self.dead
        by_shim = tuple(
            Orphan(
                pid=pid, evidence=Proof.DESCENT, signals=("SIGKILL",), ended=True, ended_by=BY_SHIM
            )
            for pid, _ in sorted(unseen)
        )
        return replace(
            self,
            found=self.found + len(unseen),
            ended=self.ended + len(unseen),
            dead=self.dead | killed,
            orphans=by_shim + self.orphans,
        )


NOTHING_LEFT: Final = Ending(gone=True)
"""The ending of a launch whose processes had all gone before the first scan."""
