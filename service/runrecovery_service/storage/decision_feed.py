"""The decisions of all restarts in one order, to be read on from any place of it.

The order is that of the restarts, and of the runs' keys within each; both only grow. A restart that
is at work bars those behind it, so that nothing is committed behind a place that was read past. One
whose instance is not alive is closed by others (`recovery.close_abandoned`), and can commit nothing
any more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final

from runrecovery_service.domain.errors import WatchCursorInvalid
from runrecovery_service.domain.reconciliation import RecoveredFilter
from runrecovery_service.domain.recovery_matrix import REOPEN_RULE
from runrecovery_service.domain.run import RecoveryInfo
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
_BEHIND: Final = (
    f"SELECT e.reconciliation, e.run, r.run_id, r.engine, r.labels, {_DECISION}"
    " FROM recovery_event e JOIN reconciliation c ON c.id = e.reconciliation"
    " JOIN run r ON r.id = e.run"
    # What a caller set back shares its place with the decision that it undid, and is none.
    f" WHERE e.rule <> '{REOPEN_RULE}'"
    " AND (e.reconciliation, e.run) > (?, ?) AND e.reconciliation <= ?"
    " ORDER BY e.reconciliation, e.run LIMIT ?"
)


@dataclass(frozen=True, slots=True, order=True)
class FeedCursor:
    """The last decision that was read: keys of its reconciliation and its run.

    `stamp` is of the reconciliation's own id: a store that was restored from a backup gives its
    keys out again. 0 at the very start, before the first reconciliation.
    """

    report: int
    run: int
    stamp: int = field(default=0, compare=False)


START: Final = FeedCursor(0, 0)


def stamp_of(reconciliation_id: str) -> int:
    """Return 63 bits of a report's id."""
    return int.from_bytes(sha256(reconciliation_id.encode()).digest()[:8]) >> 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedDecision:
    """A decision and the run that it is about."""

    place: FeedCursor
    run_id: str
    engine: str
    labels: dict[str, str]
    recovery: RecoveryInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedPage:
    """Decisions in their order, and the place up to which everything was read."""

    decided: tuple[FeedDecision, ...]
    upto: FeedCursor
    more: bool


def end_cursor(db: Database) -> FeedCursor:
    """Return the place behind every decision so far."""
    row = db.fetch_one(
        "SELECT e.reconciliation, e.run, c.reconciliation_id FROM recovery_event e"
        " JOIN reconciliation c ON c.id = e.reconciliation WHERE e.reconciliation <= ?"
        " ORDER BY e.reconciliation DESC, e.run DESC LIMIT 1",
        (_bar(db),),
    )
    return START if row is None else FeedCursor(row[0], row[1], stamp_of(row[2]))


def demand_valid(db: Database, place: FeedCursor) -> None:
    """Refuse a place that is none of this store, or of one that was restored since.

    Raises:
        WatchCursorInvalid: there is no such restart, or another one has its key.
    """
    if place.report == 0:
        return
    row = db.fetch_one("SELECT reconciliation_id FROM reconciliation WHERE id = ?", (place.report,))
    if row is None or stamp_of(row[0]) != place.stamp:
        raise WatchCursorInvalid


def decisions_after(
    db: Database, place: FeedCursor, wanted: RecoveredFilter, *, limit: int
) -> FeedPage:
    """Return the next decisions behind a place that the filter lets through.

    At most `limit` are looked at: a filter that lets little through has to be asked again.
    """
    rows = db.fetch_all(_BEHIND, (place.report, place.run, _bar(db), limit))
    decided = []
    upto = place
    for report, key, run_id, engine, labels, *columns in rows:
        recovery = recovery_from_row(tuple(columns))
        if recovery is None:
            continue
        upto = FeedCursor(report, key, stamp_of(recovery.reconciliation_id))
        shown = {name: str(value) for name, value in json_object(labels).items()}
        if matches(wanted, recovery, engine=engine, labels=shown):
            decided.append(
                FeedDecision(
                    place=upto, run_id=run_id, engine=engine, labels=shown, recovery=recovery
                )
            )
    return FeedPage(decided=tuple(decided), upto=upto, more=len(rows) == limit)


def matches(
    wanted: RecoveredFilter, recovery: RecoveryInfo, *, engine: str, labels: dict[str, str]
) -> bool:
    """True when the filter lets a decision through."""
    return (
        (not wanted.states or recovery.recovery_state in wanted.states)
        and wanted.reason in {None, recovery.recovery_reason}
        and wanted.engine in {None, engine}
        and wanted.reconciliation_id in {None, recovery.reconciliation_id}
        and (wanted.after is None or wanted.after <= recovery.recovered_at)
        and (wanted.before is None or recovery.recovered_at < wanted.before)
        and wanted.labels.items() <= labels.items()
    )


def _bar(db: Database) -> int:
    """Return the first restart that is at work, or the last one of all."""
    row = db.fetch_one(
        "SELECT COALESCE((SELECT min(id) FROM reconciliation WHERE state = 'RUNNING'),"
        " (SELECT max(id) FROM reconciliation), 0)"
    )
    return 0 if row is None else int(row[0])
