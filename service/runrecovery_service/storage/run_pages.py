"""Pages of runs in the order of their creation."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import reduce
from typing import Any, Final

import peewee as pw

from runrecovery_service.domain.run import Page, RecoveryState, Run, RunFilter, View
from runrecovery_service.storage import runs, tables
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.label_filter import filter_by_labels
from runrecovery_service.storage.rows import to_us

_R = tables.Run

ENGINES_MERGED: Final = 100
"""The most engines whose runs are read from the index. SQLite merges at most 500 queries."""


def page(
    db: Database,
    wanted: RunFilter,
    *,
    after: tuple[int, ...] | None,
    limit: int,
    view: View = View.FULL,
    oldest_first: bool = False,
) -> Page[Run]:
    """Return a page of runs, newest first, or oldest first."""
    engines = wanted.engines_listed
    if engines == ():
        return Page(rows=(), after=None)
    query, key = filter_by_labels(db, runs.select(view), wanted.labels, by_run=True)
    if engines is not None and _reads_index(wanted, len(engines)):
        conditions = [
            _R.id.in_(_first_of_each(wanted, engines, after, limit, oldest_first=oldest_first))
        ]
    else:
        conditions = _conditions(_R, wanted)
        if engines is not None:
            conditions.append(_R.engine.in_(engines))
    if after is not None:
        conditions.append(_is_after(key, after, oldest_first=oldest_first))
    if conditions:
        query = query.where(*conditions)
    query = query.order_by(key.asc() if oldest_first else key.desc())
    return runs.page_of(db, [query], limit, lambda row: (row[0],))


def _reads_index(wanted: RunFilter, engines: int) -> bool:
    """Return whether a page is read fastest by the index of engines.

    With one engine it is: the index has fewer runs to read than the table. With several engines and
    a status, the table can be faster. If one engine has many runs but none with the status, the
    index would lead to all of its runs, although another engine fills the page.
    """
    if wanted.labels or engines > ENGINES_MERGED:
        return False
    return engines == 1 or not wanted.statuses


def _is_after(key: Any, after: tuple[int, ...], *, oldest_first: bool) -> Any:
    """Return the condition for runs after the last run of the previous page."""
    return key > after[0] if oldest_first else key < after[0]


def _first_of_each(
    wanted: RunFilter,
    engines: Sequence[str],
    after: tuple[int, ...] | None,
    limit: int,
    *,
    oldest_first: bool,
) -> pw.SelectQuery:
    """Return a query for the keys of a page, of one run after it, and perhaps of more.

    The query reads the first runs of each engine from an index. Without the index, a page of few
    engines would read the runs of all others.
    """
    run = tables.Run.alias()
    # Repeats the condition of the index. Other statements lack it, so that they do not use the
    # index.
    conditions = [pw.SQL("run_id <> ''"), *_conditions(run, wanted)]
    if after is not None:
        conditions.append(_is_after(run.id, after, oldest_first=oldest_first))
    parts = [
        run.select(run.id)
        .where(run.engine == engine, *conditions)
        .order_by(run.id.asc() if oldest_first else run.id.desc())
        .limit(limit + 1)
        for engine in engines
    ]
    keys = [pw.Select((part.alias("first"),), (pw.SQL("first.id"),)) for part in parts]
    return reduce(operator.add, keys)


def _conditions(run: Any, wanted: RunFilter) -> list[Any]:  # Any: an alias has no type of its own
    """Return the conditions of a filter, without engines and labels."""
    conditions: list[Any] = []
    if wanted.statuses:
        conditions += [
            run.status.in_([status.value for status in wanted.statuses]),
            run.recovery_state != RecoveryState.QUARANTINED.value,
        ]
    if wanted.after is not None:
        conditions.append(run.created_at >= to_us(wanted.after))
    if wanted.before is not None:
        conditions.append(run.created_at < to_us(wanted.before))
    return conditions
