"""The decisions of all recoveries in one order. A reader can resume after any decision.

The order is by report, then by run key; within the feed both only grow. The feed ends at the first
report that is RUNNING; decisions of later reports are not shown yet. A reader therefore never
misses a decision that is committed later with an earlier position. Other instances close the report
of a dead instance (`reports.close_abandoned`), and a closed report takes no decisions.
"""

from __future__ import annotations

from dataclasses import field
from hashlib import sha256
from typing import Final

from runrecovery_service.domain.errors import DecisionsPruned, WatchCursorInvalid
from runrecovery_service.domain.reconciliation import RecoveredFilter
from runrecovery_service.domain.recovery_matrix import REOPEN_RULE
from runrecovery_service.domain.run import RecoveryInfo
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import tables
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.rows import (
    RECOVERY_COLUMNS,
    json_object,
    recovery_from_row,
)

_DECISION: Final = ", ".join(
    f"{'e' if column.model is tables.RecoveryEvent else 'c'}.{column.name}"
    for column in RECOVERY_COLUMNS
)
_DECISIONS_AFTER: Final = (
    f"SELECT e.reconciliation, e.run, r.run_id, r.engine, r.labels, {_DECISION}"
    " FROM recovery_event e JOIN reconciliation c ON c.id = e.reconciliation"
    " JOIN run r ON r.id = e.run"
    # A reopening is not a decision. Its row has the same position as the decision that it undoes.
    f" WHERE e.rule <> '{REOPEN_RULE}'"
    " AND (e.reconciliation, e.run) > (?, ?) AND e.reconciliation <= ?"
    " ORDER BY e.reconciliation, e.run LIMIT ?"
)


@dataclass(frozen=True, slots=True, order=True)
class FeedCursor:
    """The position of the last decision that was read.

    Attributes:
        report, run: the keys of the decision's report and run.
        stamp: identifies the report: a store that was restored from a backup uses its keys again. 0
            before the first report.
    """

    report: int
    run: int
    stamp: int = field(default=0, compare=False)


START: Final = FeedCursor(0, 0)


def stamp_of(reconciliation_id: str) -> int:
    """Return 63 bits of the hash of a report's id."""
    return int.from_bytes(sha256(reconciliation_id.encode()).digest()[:8]) >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedDecision:
    """A decision and its run."""

    cursor: FeedCursor
    run_id: str
    engine: str
    labels: dict[str, str]
    recovery: RecoveryInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedPage:
    """Decisions in the feed's order.

    Attributes:
        upto: the cursor of the last decision that was read, whether or not it matches the filter.
        more: whether further decisions may follow.
    """

    decided: tuple[FeedDecision, ...]
    upto: FeedCursor
    more: bool


def end_cursor(db: Database) -> FeedCursor:
    """Return the cursor of the latest decision."""
    row = db.fetch_one(
        "SELECT e.reconciliation, e.run, c.reconciliation_id FROM recovery_event e"
        " JOIN reconciliation c ON c.id = e.reconciliation WHERE e.reconciliation <= ?"
        " ORDER BY e.reconciliation DESC, e.run DESC LIMIT 1",
        (_last_readable_report(db),),
    )
    return START if row is None else FeedCursor(row[0], row[1], stamp_of(row[2]))


def demand_valid(db: Database, cursor: FeedCursor) -> None:
    """Raise if a cursor is not from this store, or is from before a restore of this store.

    Raises:
        WatchCursorInvalid: this store has no report of the cursor.
        DecisionsPruned: the report was removed by retention.
    """
    if cursor.report == 0:
        return
    row = db.fetch_one(
        "SELECT reconciliation_id FROM reconciliation WHERE id = ?", (cursor.report,)
    )
    if row is not None and stamp_of(row[0]) == cursor.stamp:
        return
    later = db.fetch_one("SELECT 1 FROM reconciliation WHERE id > ? LIMIT 1", (cursor.report,))
    if row is None and later is not None:
        raise DecisionsPruned
    raise WatchCursorInvalid


def decisions_after(
    db: Database, cursor: FeedCursor, wanted: RecoveredFilter, *, limit: int
) -> FeedPage:
    """Return the decisions after a cursor that match the filter.

    At most `limit` decisions are read. The page can be empty although `more` is True.
    """
    rows = db.fetch_all(
        _DECISIONS_AFTER, (cursor.report, cursor.run, _last_readable_report(db), limit)
    )
    decided = []
    upto = cursor
    for report, key, run_id, engine, labels, *columns in rows:
        recovery = recovery_from_row(tuple(columns))
        if recovery is None:
            continue
        upto = FeedCursor(report, key, stamp_of(recovery.reconciliation_id))
        shown = {name: str(value) for name, value in json_object(labels).items()}
        if matches(wanted, recovery, engine=engine, labels=shown):
            decided.append(
                FeedDecision(
                    cursor=upto, run_id=run_id, engine=engine, labels=shown, recovery=recovery
                )
            )
    return FeedPage(decided=tuple(decided), upto=upto, more=len(rows) == limit)


def matches(
    wanted: RecoveredFilter, recovery: RecoveryInfo, *, engine: str, labels: dict[str, str]
) -> bool:
    """Return whether a decision matches the filter."""
    return (
        (not wanted.states or recovery.recovery_state in wanted.states)
        and wanted.reason in {None, recovery.recovery_reason}
        and wanted.engine in {None, engine}
        and (wanted.engines is None or engine in wanted.engines)
        and wanted.reconciliation_id in {None, recovery.reconciliation_id}
        and (wanted.after is None or wanted.after <= recovery.recovered_at)
        and (wanted.before is None or recovery.recovered_at < wanted.before)
        and wanted.labels.items() <= labels.items()
    )


def _last_readable_report(db: Database) -> int:
    """Return the key of the first RUNNING report; if none is RUNNING, of the latest report."""
    row = db.fetch_one(
        "SELECT COALESCE((SELECT min(id) FROM reconciliation WHERE state = 'RUNNING'),"
        " (SELECT max(id) FROM reconciliation), 0)"
    )
    return 0 if row is None else int(row[0])
