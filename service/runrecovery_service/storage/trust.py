"""Trust entries: the service's entries in the files of agent CLIs, for the workspaces of runs.

A row is written before its entry is added, and changed after the entry is removed. So every entry
in a file is recorded. The rows of one file change only while `agents.trust_keeper` has the lock
next to the file.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from runrecovery_service.domain.errors import Fenced
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.rows import from_us_or_none, to_us
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.tables import live

ROWS_PER_STATEMENT: Final = 500
FAR: Final = timedelta(minutes=2)
"""The longest delay of a check. A time further ahead comes from a clock that was wrong."""

After = tuple[int, str, str]
"""The position of a row in the order in which `stale_entries` returns rows."""


class NotRemoved(StrEnum):
    """Why an entry could not be removed."""

    PLACE = "place"
    """The folder of the file, or its lock, does not exist."""
    FILE = "file"
    """The file does not exist or is empty."""
    RECORD = "record"
    """The record is damaged, or the removal of its entry raised an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustEntry:
    """A recorded entry.

    Attributes:
        file: the real path of the CLI's file.
        place: the identity of the file's lock, which distinguishes files of the same path.
        cli: the agent CLI to which the file belongs.
        added: `trust.entry.Added` as text.
        ours: whether the entry was added on this host.
        removed_at: when the entry was removed.
        away, away_since: why and since when removals of the entry have failed.
    """

    file: str
    folder: str
    place: str
    cli: str
    run_key: int
    run_id: str
    attempt: int
    added: str
    created_us: int = 0
    ours: bool = True
    removed_at: datetime | None = None
    away: NotRemoved | None = None
    away_since: datetime | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """The primary key of the row."""
        return self.file, self.folder, self.place

    @property
    def after(self) -> After:
        """The position in the order of `stale_entries`."""
        return self.created_us, self.folder, self.place


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryUpdate:
    """A change to the row of an entry that stays recorded.

    Attributes:
        look_at: the time of the next check.
        removed_at: when the entry was removed; None: the entry is still in the file. After the
            removal the row stays, so that the file is checked again.
        away, away_since: why and since when removals of the entry have failed.
    """

    look_at: datetime
    removed_at: datetime | None = None
    away: NotRemoved | None = None
    away_since: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryOutcome:
    """The result of editing a file.

    Attributes:
        forget: entries whose rows are to be deleted.
        marks: the changes to other rows, each with its entries.
    """

    forget: tuple[TrustEntry, ...] = ()
    marks: Mapping[EntryUpdate, Sequence[TrustEntry]] = field(default_factory=dict)


def _ours(db: Database) -> str:
    """Return an SQL condition for entries of this host. Parameter: the host.

    In a SQLite store every entry counts as this host's, even under another host id.
    """
    return "? IS NOT NULL" if db.dialect.kind is DatabaseKind.SQLITE else "t.host_id = ?"


_STALE: Final = f"(r.id IS NULL OR r.attempt > t.attempt OR NOT ({live('r.')}))"
"""SQL: no run needs the entry. The run has ended, is quarantined or removed, or has a new
workspace."""
_FROM: Final = "FROM trust_entry t LEFT JOIN run r ON r.id = t.run"
_WANTED: Final = (
    f"(t.removed_at IS NOT NULL OR {_STALE})"
    " AND (t.look_at IS NULL OR t.look_at <= ? OR t.look_at > ?)"
)
_NEWEST_FIRST: Final = "ORDER BY t.created_at DESC, t.folder DESC, t.place DESC"


def _select(db: Database) -> str:
    """Return the first part of a query for entries. Parameter: the host."""
    ours = f"CASE WHEN {_ours(db)} THEN 1 ELSE 0 END"
    return (
        "SELECT t.file, t.folder, t.place, t.cli, t.run, COALESCE(r.run_id, ''), t.attempt,"
        f" t.added, t.created_at, {ours}, t.removed_at, t.away, t.away_since {_FROM}"
    )


def _entry(row: Row) -> TrustEntry:
    (
        file, folder, place, cli, run_key, run_id, attempt, added, created, ours, removed, away,
        away_since,
    ) = row  # fmt: skip
    return TrustEntry(
        file=file,
        folder=folder,
        place=place,
        cli=cli,
        run_key=run_key,
        run_id=run_id,
        attempt=attempt,
        added=added,
        created_us=created,
        ours=bool(ours),
        removed_at=from_us_or_none(removed),
        away=None if away is None else NotRemoved(away),
        away_since=from_us_or_none(away_since),
    )


def _due(now: datetime | None) -> tuple[int, int]:
    """Return the parameters of `_WANTED` for checks that are due at `now`; None: for all."""
    if now is None:
        return (0, -1)
    return (to_us(now), to_us(now + FAR))


def recorded_entries(db: Database, host_id: str, file: str, place: str) -> dict[str, str]:
    """Return the text `added` of each recorded entry of a file, by folder."""
    rows = db.fetch_all(
        f"SELECT t.folder, t.added FROM trust_entry t WHERE t.file = ? AND t.removed_at IS NULL"
        # If the lock was removed and created again, the place has changed. Of several entries for
        # one folder, the last in this order counts: one with this place, else the newest.
        f" AND (t.place = ? OR {_ours(db)})"
        " ORDER BY CASE WHEN t.place = ? THEN 1 ELSE 0 END, t.created_at",
        (file, place, host_id, place),
    )
    return dict(rows)


def record_entry(
    db: Database, entry: TrustEntry, *, host_id: str, owner: Owner, now: datetime
) -> None:
    """Record an entry, or update the row of the same entry.

    Raises:
        Fenced: this epoch is no longer allowed to launch the run.
    """
    with db.transaction():
        found = db.fetch_one(
            "SELECT 1 FROM run WHERE id = ? AND run_id = ? AND owner = ? AND owner_epoch = ?"
            " AND attempt = ?",
            (entry.run_key, entry.run_id, owner.instance, owner.epoch, entry.attempt),
        )
        if found is None:
            raise Fenced(f"run {entry.run_id!r}")
        db.execute(
            "INSERT INTO trust_entry (file, folder, place, host_id, cli, run, attempt, instance,"
            " added, created_at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (file, folder, place) DO UPDATE SET host_id = excluded.host_id,"
            " cli = excluded.cli, run = excluded.run, attempt = excluded.attempt,"
            " instance = excluded.instance, added = excluded.added,"
            " created_at = excluded.created_at, removed_at = NULL, away = NULL,"
            " away_since = NULL, look_at = NULL",
            (
                entry.file,
                entry.folder,
                entry.place,
                host_id,
                entry.cli,
                entry.run_key,
                entry.attempt,
                owner.instance,
                entry.added,
                to_us(now),
            ),
        )


def stale_files(db: Database, host_id: str, *, now: datetime | None) -> list[tuple[str, str, bool]]:
    """Return the files with entries to remove or to check again.

    Args:
        now: the time up to which a check must be due; None: all entries.

    Returns:
        The path and place of each file, and whether the entries are of this host.
    """
    rows = db.fetch_all(
        f"SELECT DISTINCT t.file, t.place, CASE WHEN {_ours(db)} THEN 1 ELSE 0 END {_FROM}"
        f" WHERE {_WANTED} ORDER BY t.file",
        (host_id, *_due(now)),
    )
    return [(file, place, bool(ours)) for file, place, ours in rows]


def stale_entries(
    db: Database, host_id: str, file: str, *, now: datetime | None, after: After | None, limit: int
) -> list[TrustEntry]:
    """Return the entries of a file to remove or to check again, the newest first.

    New entries are added at the end of the file, so in this order each removal is next to the one
    before.
    """
    rest = "" if after is None else " AND (t.created_at, t.folder, t.place) < (?, ?, ?)"
    rows = db.fetch_all(
        f"{_select(db)} WHERE t.file = ? AND {_WANTED}{rest} {_NEWEST_FIRST} LIMIT ?",
        (host_id, file, *_due(now), *(after or ()), limit),
    )
    return [_entry(row) for row in rows]


def entries_of_run(db: Database, host_id: str, run_id: str, *, owner: Owner) -> list[TrustEntry]:
    """Return the entries of a run that are not removed; none if another epoch owns the run."""
    rows = db.fetch_all(
        f"{_select(db)} WHERE r.run_id = ? AND t.removed_at IS NULL AND r.owner = ?"
        f" AND r.owner_epoch = ? {_NEWEST_FIRST}",
        (host_id, run_id, owner.instance, owner.epoch),
    )
    return [_entry(row) for row in rows]


def record_outcome(db: Database, done: EntryOutcome, *, only_stale: bool) -> None:
    """Record the result of editing a file.

    Args:
        only_stale: keep the rows of entries that are needed again, because a run was reopened.
    """
    with db.transaction():
        _each(db, "DELETE FROM trust_entry AS t", (), done.forget, only_stale=only_stale)
        for mark, entries in done.marks.items():
            values = (
                *(None if at is None else to_us(at) for at in (mark.removed_at, mark.away_since)),
                mark.away,
                to_us(mark.look_at),
            )
            update = (
                "UPDATE trust_entry AS t SET removed_at = ?, away_since = ?, away = ?, look_at = ?"
            )
            _each(db, update, values, entries, only_stale=only_stale)


def _each(
    db: Database,
    change: str,
    values: tuple[object, ...],
    entries: Iterable[TrustEntry],
    *,
    only_stale: bool,
) -> None:
    needed = f"SELECT 1 FROM run r WHERE r.id = t.run AND NOT {_STALE}"
    stale_yet = f" AND (t.removed_at IS NOT NULL OR NOT EXISTS ({needed}))" if only_stale else ""
    folders: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        folders.setdefault((entry.file, entry.place), []).append(entry.folder)
    for (file, place), names in folders.items():
        for at in range(0, len(names), ROWS_PER_STATEMENT):
            some = names[at : at + ROWS_PER_STATEMENT]
            marks = ", ".join("?" for _ in some)
            db.execute(
                f"{change} WHERE t.file = ? AND t.place = ? AND t.folder IN ({marks}){stale_yet}",
                (*values, file, place, *some),
            )
