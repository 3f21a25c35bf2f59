"""The interruption of a turn by the service, and when the turn is resumed."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final

from runrecovery_service.domain.run import Interaction

FIRST_DELAY_S: Final = 10.0
LONGEST_DELAY_S: Final = 300.0


class InterruptionCause(StrEnum):
    """The cause that ended the process of the turn."""

    RESTART = "RESTART"
    """The service was restarted or stopped."""
    SUSPENSION = "SUSPENSION"
    """The service, or its machine, stood still for longer than the lease."""
    SHIM_LOST = "SHIM_LOST"
    """The shim that guarded the process was killed or stopped."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Interruption:
    """The latest interruption of a turn that is to be resumed.

    Attributes:
        at: when the service noticed it.
        times: how often the turn has been interrupted, this time included.
        reply: the reply that the interrupted process had received; None: it had received none.
    """

    at: datetime
    cause: InterruptionCause
    times: int
    reply: Interaction | None = None


def resume_delay_s(resumes: int) -> float:
    """Return how long to wait before a turn that was resumed `resumes` times is resumed again.

    The first resume does not wait, because most restarts are planned. A turn that is interrupted
    again and again may itself be the cause of the restarts.
    """
    if resumes <= 0:
        return 0.0
    return min(LONGEST_DELAY_S, FIRST_DELAY_S * 2.0 ** min(resumes - 1, 10))
