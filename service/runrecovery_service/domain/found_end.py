"""The end of a turn that a recovery reads from the stored output of the turn's process."""

from __future__ import annotations

from runrecovery_service.domain.recovery_matrix import Fact
from runrecovery_service.domain.turn import Asked, Succeeded
from runrecovery_service.domain.usage import TurnUsage
from runrecovery_service.lazy_dataclass import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundEnd:
    """The result or question at the end of the stored output of a process that exited with 0.

    Attributes:
        wait_s: how long the question waits; None: without a limit.
        used: the usage of the turn; None: its agent reported none.
        is_last: whether the run has used up its budget, so that no turn can follow.
    """

    end: Asked | Succeeded
    wait_s: float | None = None
    used: TurnUsage | None = None
    is_last: bool = False

    @property
    def fact(self) -> Fact:
        """The fact of the recovery matrix that is true because of this end."""
        if not isinstance(self.end, Asked):
            return Fact.RESULT
        return Fact.OVER_BUDGET if self.is_last else Fact.QUESTION
