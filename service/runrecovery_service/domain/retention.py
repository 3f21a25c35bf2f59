"""Retention: the ages at which data of ended runs is removed, and counts of removals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import field
from datetime import datetime
from enum import StrEnum

from runrecovery_service.lazy_dataclass import dataclass


class RetentionKind(StrEnum):
    """A kind of data that retention removes. Each kind has an age of its own."""

    RUNS = "runs"
    """Ended runs: every row and every file."""
    OUTPUTS = "outputs"
    """The stored output of ended runs."""
    WORKSPACES = "workspaces"
    """The other files of ended runs: workspaces and the files of launches."""
    EVENTS = "events"
    """The events of ended runs."""
    RECEIPTS = "receipts"
    """The records of requests that were carried out, by request_id."""
    REPORTS = "reports"
    """The reports of recoveries that no run names any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionPolicy:
    """Ages in seconds, counted from the end of the run, the request or the recovery.

    An age of None: this kind of data is kept for ever.

    Attributes:
        max_ended_runs: the most ended runs that are kept; the oldest are removed first. None: no
            limit.
    """

    ended_runs: float | None = None
    outputs: float | None = None
    workspaces: float | None = None
    events: float | None = None
    receipts: float | None = None
    reports: float | None = None
    max_ended_runs: int | None = None

    @property
    def kinds(self) -> tuple[RetentionKind, ...]:
        """The kinds of data that have an age or a limit."""
        ages = {
            RetentionKind.RUNS: self.max_ended_runs if self.ended_runs is None else self.ended_runs,
            RetentionKind.OUTPUTS: self.outputs,
            RetentionKind.WORKSPACES: self.workspaces,
            RetentionKind.EVENTS: self.events,
            RetentionKind.RECEIPTS: self.receipts,
            RetentionKind.REPORTS: self.reports,
        }
        return tuple(kind for kind, age in ages.items() if age is not None)


@dataclass(frozen=True, slots=True, order=True)
class RunPosition:
    """The position of a run when runs are ordered by their end (µs since 1970), then by key."""

    ended_us: int
    key: int


FIRST = RunPosition(-1, 0)
"""The position before every run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PruneResult:
    """The counts of one call of Prune. A dry run has the counts that a real call would have.

    Attributes:
        counts: how many of each kind were removed, for the kinds that have an age.
        sizes: the bytes of the removed files, by kind.
        oldest_kept: when the oldest ended run that is kept ended; None: no ended run is kept.
        done: whether nothing is left to remove.
        unknown_folders: how many folders belong to runs that the store does not know. Only a dry
            run counts them, and they are never removed.
    """

    counts: Mapping[RetentionKind, int]
    sizes: Mapping[RetentionKind, int]
    oldest_kept: datetime | None
    done: bool
    unknown_folders: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class RetentionTotals:
    """The counts of removals since the start of the service.

    Attributes:
        removed: how many of each kind were removed.
        bytes_freed: the sizes of the removed files, by kind.
        pages_freed: pages that SQLite gave back to the file system.
        not_removed: files and folders that the system did not let the service remove.
        swept_at, sweep_s: when the latest sweep ended, and how long it took.
    """

    removed: Counter[RetentionKind] = field(default_factory=Counter)
    bytes_freed: Counter[RetentionKind] = field(default_factory=Counter)
    pages_freed: int = 0
    not_removed: int = 0
    swept_at: datetime | None = None
    sweep_s: float = 0.0
