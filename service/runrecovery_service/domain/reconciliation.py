"""The report of one restart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from datetime import datetime
from enum import StrEnum

from runrecovery_service.domain.run import RecoveryState
from runrecovery_service.lazy_dataclass import dataclass


class Cause(StrEnum):
    """Why a reconciliation was started."""

    STARTUP = "STARTUP"
    SHUTDOWN = "SHUTDOWN"
    """A planned stop, which makes the decisions that the next start would make."""
    TAKEOVER = "TAKEOVER"
    """An instance decides on the runs of another one, whose lease has run out."""


class ContainmentLevel(StrEnum):
    """How reliably a start finds processes that lost their service. In ascending order."""

    NONE = "NONE"
    """A process that the probe had launched was not found again."""
    COOKIE = "COOKIE"
    """Processes are found while they keep their environment or their parents."""
    WATERMARK = "WATERMARK"
    """Processes are found unless they change their limits on purpose."""

    @property
    def is_strict(self) -> bool:
        """True if even a process that cleans its environment and loses its parents is found."""
        return self is ContainmentLevel.WATERMARK


@dataclass(frozen=True, slots=True, kw_only=True)
class Containment:
    """The level that this start's probe has shown by a test. `detail` is a sentence for people."""

    level: ContainmentLevel
    detail: str


class ReconciliationState(StrEnum):
    """The progress of a reconciliation."""

    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    FAILED = "FAILED"


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """One part of a reconciliation and its wall time in seconds."""

    name: str
    duration_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionCount:
    """The number of runs that one rule decided."""

    rule: str
    recovery_state: RecoveryState
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class OrphanCounts:
    """How many processes of earlier epochs were found alive, ended, and refused (not ended).

    `already_gone` is the number of launches without any living process.
    """

    found: int = 0
    ended: int = 0
    already_gone: int = 0
    refused: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Orphan:
    """A process that outlived the service that had launched it, and the signals that it got.

    Attributes:
        evidence: which marker showed that it belongs to its launch (`process.markers.Proof`).
        signals: the names of the signals that it was sent, in order.
        ended: whether it was found dead after the signals.
        ended_by: who ended it: `service`, or `shim`, the guard of its launch.
    """

    pid: int
    evidence: str
    signals: tuple[str, ...]
    ended: bool
    ended_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BindingCounts:
    """How many sessions, questions, slots and trust entries a recovery took from ended runs."""

    sessions: int = 0
    pending_interactions: int = 0
    slots: int = 0
    trust_entries: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustRemoval:
    """An entry by which an agent CLI trusted the workspace of a run, and its removal.

    `outcome` is a value of `trust.entry.Outcome`. `run_id` is empty if the run has been deleted.
    """

    run_id: str
    file: str
    folder: str
    outcome: str

    @property
    def changed_file(self) -> bool:
        """True if the removal changed the file, False if the file had no entry of the service."""
        return self.outcome in {"removed", "restored"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustClearing:
    """The trust entries that a recovery removed from the files of agent CLIs, and those that stay.

    Attributes:
        failures: one sentence for each failed removal. The removal fails again, until somebody
            repairs the cause.
        kept: one sentence for each reason why entries stay. Each reason is reported only once.
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
        """All sentences about entries that were not removed."""
        return self.failures + self.kept


@dataclass(frozen=True, slots=True, kw_only=True)
class Reconciliation:
    """The report of one recovery, complete or still in progress.

    Of `runs_total` runs, `runs_scanned` have been decided. Of these, `runs_unchanged` kept the
    decision of an earlier restart. `decisions` are in the order of the matrix. `containment` is
    None until the probe has ended, and in the report of a stop or takeover. `trust_removals` has at
    most the first 100. `recovered_instance` is the instance that was taken over; None: the recovery
    was about `instance` itself.
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
    recovered_instance: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveredFilter:
    """Selects recovered runs: after <= recovered_at < before. Empty fields do not filter.

    `engines` are the engines whose runs the caller is allowed to see; None: all.
    """

    engines: frozenset[str] | None = None
    states: frozenset[RecoveryState] = field(default_factory=frozenset)
    reason: str | None = None
    engine: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    after: datetime | None = None
    before: datetime | None = None
    reconciliation_id: str | None = None
