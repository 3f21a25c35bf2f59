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
        evidence: what proved whose it is; the words of `process.markers`.
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
    trust_entries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustRemoval:
    """An entry by which an agent CLI trusted the workspace of a run, and what became of it.

    `outcome` is a word of `trust.entry.Outcome`. `run_id` is empty when the run is gone.
    """

    run_id: str
    file: str
    folder: str
    outcome: str

    @property
    def took_out(self) -> bool:
        """True when something was taken out by it; else there was nothing of ours."""
        return self.outcome in {"removed", "restored"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustClearing:
    """What was taken out of the files of agent CLIs, and what could not be, a sentence each.

    Attributes:
        failures: what went wrong; it goes wrong each time, until somebody mends it.
        kept: what is said once for each entry, and is not said again.
    """

    removals: tuple[TrustRemoval, ...] = ()
    failures: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()

    def __add__(self, other: TrustClearing) -> TrustClearing:
        return TrustClearing(
            removals=self.removals + other.removals,
            failures=self.failures + other.failures,
            kept=tuple(dict.fromkeys(self.kept + other.kept)),
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """All that could not be taken out."""
        return self.failures + self.kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciliation:
    """The report of one restart, complete or as far as it has come.

    `runs_scanned` of `runs_total` are done; of these `runs_unchanged` kept the decision of an
    earlier restart. `decisions` are in the order of the matrix. `containment` is None until the
    probe has ended, and in the report of a stop. `trust_removals` are the first 100.
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
    trust_removals: tuple[TrustRemoval, ...] = ()


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
