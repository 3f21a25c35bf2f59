"""Which runs a recovery decides on, and the values that applying the decisions writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from runrecovery_service.domain.deadline import Due, SteadyTime
from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.usage import TurnUsage
from runrecovery_service.storage.instances import Owner


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryScope:
    """The runs of `owner` whose epoch is below `before`.

    At a start, `before` is the owner's own epoch. A planned stop and a plan use the next epoch,
    because they decide what the next start would decide.
    """

    owner: Owner
    before: int

    @property
    def params(self) -> tuple[str, int]:
        """The parameters of `owner = ? AND owner_epoch < ?`."""
        return self.owner.instance, self.before


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyScope(RecoveryScope):
    """The runs that a reconciliation may change, and the values that it writes.

    Attributes:
        reconciliation_key: the key of the report.
        reopen: until when a run that fails for want of its session can be reopened.
        now, steady: the time of every decision, by the wall clock and by the steady clock.
        found: the ends of turns that were found in the kept output, by run key.
        counted: what other turns have used, by run key, where their sessions prove it.
    """

    reconciliation_key: int
    reopen: Due
    now: datetime
    steady: SteadyTime
    found: Mapping[int, FoundEnd] = field(default_factory=dict)
    counted: Mapping[int, TurnUsage] = field(default_factory=dict)
