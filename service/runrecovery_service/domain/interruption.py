"""The interruption of a turn by the service. `resume_backoff.py` says when the turn is resumed."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from runrecovery_service.domain.run import Interaction
from runrecovery_service.lazy_dataclass import dataclass


class InterruptionCause(StrEnum):
    """Why the process of an interrupted turn ended."""

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
        at: when the service noticed the interruption.
        times: how often the turn has been interrupted, this interruption included.
        reply: the reply that the interrupted process had received; None: no reply.
    """

    at: datetime
    cause: InterruptionCause
    times: int
    reply: Interaction | None = None
