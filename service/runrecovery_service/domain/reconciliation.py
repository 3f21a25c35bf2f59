"""The report of one restart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from runrecovery_service.domain.run import RecoveryState


class Cause(StrEnum):
    """What began a reconciliation."""

    STARTUP = "STARTUP"
    SHUTDOWN = "SHUTDOWN"
    """A planned stop, which decides what the next start otherwise would."""


class ContainmentLevel(StrEnum):
    """How surely the processes of a run are found once nobody watches over them. Rising."""

    NONE = "NONE"
    """A process that was launched here was not found again."""
    COOKIE = "COOKIE"
    """Found while they keep the environment that they were launched with, or their parents."""
    WATERMARK = "WATERMARK"
    """Found whatever they do, short of changing their limits with privileges."""

    @property
    def is_strict(self) -> bool:
        """True when a process that scrubs and hides itself is found all the same."""
        return self is ContainmentLevel.WATERMARK


@dataclass(frozen=True, slots=True, kw_only=True)
class Containment:
    """What this start's own probe proved; `detail` is a sentence for people."""

    level: ContainmentLevel
    detail: str


class ReconciliationState(StrEnum):
    """How far a reconciliation has come."""

    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One part of a reconciliation and the wall time it took, in seconds."""

    name: str
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionCount:
    """How many runs one rule decided."""

    rule: str
    recovery_state: RecoveryState
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OrphanCounts:
    """Processes of earlier epochs: found alive, ended, not ended; launches with nothing left."""

    found: int = 0
    ended: int = 0
    already_gone: int = 0
    refused: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """A process that outlived the service that had launched it, and what was done to it.

    Attributes:
        evidence: what proved whose it is; the words of `process.evidence`.
        signals: names of what it was sent, in order.
        ended: it was seen dead afterwards.
        by: `service`, or `shim`, the guard of its launch.
    """

    pid: int
    evidence: str
    signals: tuple[str, ...]
    ended: bool
    by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BindingCounts:
    """What ended runs still held and what was therefore cleared."""

    sessions: int = 0
    pending_interactions: int = 0
    slots: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciliation:
    """The report of one restart, complete or as far as it has come.

    `runs_scanned` of `runs_total` are done; of these `runs_unchanged` kept the decision of an
    earlier restart. `decisions` are in the order of the matrix. `containment` is None until the
    probe has ended, and in the report of a stop.
    """

    reconciliation_id: str
    instance: str
    epoch: int
    cause: Cause
    state: ReconciliationState
    started_at: datetime
    finished_at: datetime | None
    phases: tuple[Phase, ...]
    decisions: tuple[DecisionCount, ...]
    orphans: OrphanCounts
    bindings: BindingCounts
    quarantined: int
    warnings: tuple[str, ...]
    runs_scanned: int
    runs_total: int
    runs_unchanged: int
    safe_mode: bool
    containment: Containment | None
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredFilter:
    """Which recovered runs to list; empty fields do not filter. Times: after <= t < before."""

    states: frozenset[RecoveryState] = field(default_factory=frozenset)
    reason: str | None = None
    engine: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    after: datetime | None = None
    before: datetime | None = None
    reconciliation_id: str | None = None
