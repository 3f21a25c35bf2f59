"""An instance as its peers see it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime

from runrecovery_service.domain.run import RunStatus
from runrecovery_service.lazy_dataclass import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceState:
    """An instance, its lease, its runs and its slots.

    Attributes:
        is_alive: whether its lease has not run out, by the clock of the database.
        lease_until: when its lease runs out; None: it has given up its lease.
        version: the version of its software; empty: it has recorded none.
        max_running: the number of its slots.
        slots_held: the number of its slots that runs hold.
        runs: the number of its unfinished runs by status, without quarantined runs.
        stopped_at: when its planned stop ended; None: no planned stop since its latest start.
        taken_over_by: the instance that has taken it over since its latest start; None: no
            instance has.
        host_return_until: until when runs wait for its host to return; None: no run waits.
    """

    name: str
    epoch: int
    is_alive: bool
    lease_until: datetime | None
    host_id: str
    version: str
    engines: tuple[str, ...]
    max_running: int
    slots_held: int
    runs: Mapping[RunStatus, int]
    started_at: datetime
    stopped_at: datetime | None
    taken_over_by: str | None
    taken_over_at: datetime | None
    takeover_done_at: datetime | None
    host_return_until: datetime | None
