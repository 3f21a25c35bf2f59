"""Which runs a recovery decides on, and the values that its decisions write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from datetime import datetime

from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.recovery_matrix import NOTHING, Fact
from runrecovery_service.domain.steady_time import Due, SteadyTime
from runrecovery_service.domain.usage import TurnUsage
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage.instances import Owner


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryScope:
    """The runs of `owner`, or of `taken_from`, whose epoch is below `before`.

    At a start, `before` is the owner's own epoch. A planned stop and a plan use the next epoch,
    because they decide as the next start would.

    Attributes:
        taken_from: the instance that is taken over, with the epoch of the takeover. Its runs become
            those of `owner`. None: no takeover.
    """

    owner: Owner
    before: int
    taken_from: Owner | None = None

    @property
    def params(self) -> tuple[str, int]:
        """The parameters of the condition `owner = ? AND owner_epoch < ?`."""
        return (self.taken_from or self.owner).instance, self.before


@dataclass(frozen=True, slots=True, kw_only=True)
class ApplyScope(RecoveryScope):
    """The runs that a recovery may change, and the values that it writes.

    Attributes:
        reconciliation_key: the key of the report.
        reopen: until when a run can be reopened that fails because its session was lost.
        now, steady: the time of all decisions, by the wall clock and by the steady clock.
        found: by run key: the end of the turn that was found in the kept output.
        counted: by run key: the usage of a killed turn, as the agent CLI's session file shows it.
        elsewhere: the facts of runs whose next turn resumes a session, if the session files are on
            another host.
    """

    reconciliation_key: int
    reopen: Due
    now: datetime
    steady: SteadyTime
    found: Mapping[int, FoundEnd] = field(default_factory=dict)
    counted: Mapping[int, TurnUsage] = field(default_factory=dict)
    elsewhere: Fact = NOTHING
