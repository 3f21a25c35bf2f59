"""Selects the runs of a recovery, with the values that its decisions write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from runrecovery_service.domain.deadline import Due, SteadyTime
from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.recovery_matrix import NOTHING, Fact
from runrecovery_service.domain.usage import TurnUsage
from runrecovery_service.storage.instances import Owner


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryScope:
    """The runs of `owner`, or of `taken_from`, whose epoch is below `before`.

    At a start, `before` is the owner's own epoch. A planned stop and a plan use the next epoch,
    because they decide what the next start would decide.

    Attributes:
        taken_from: the instance that is taken over, with the epoch of the takeover. `owner` then
            gets its runs. None: no takeover.
    """

    owner: Owner
    before: int
    taken_from: Owner | None = None

    @property
    def params(self) -> tuple[str, int]:
        """The parameters of `owner = ? AND owner_epoch < ?`."""
        return (self.taken_from or self.owner).instance, self.before


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyScope(RecoveryScope):
    """The runs that a reconciliation may change, and the values that it writes.

    Attributes:
        reconciliation_key: the key of the report.
        reopen: until when a run that fails for want of its session can be reopened.
        now, steady: the time of every decision, by the wall clock and by the steady clock.
        found: the ends of turns that were found in the kept output, by run key.
        counted: what other turns have used, by run key, where their sessions prove it.
        elsewhere: what is true of runs whose next turn resumes a session, when the files of the
            sessions are on another host.
    """

    reconciliation_key: int
    reopen: Due
    now: datetime
    steady: SteadyTime
    found: Mapping[int, FoundEnd] = field(default_factory=dict)
    counted: Mapping[int, TurnUsage] = field(default_factory=dict)
    elsewhere: Fact = NOTHING
