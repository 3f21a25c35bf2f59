"""Restricts a query to runs with given labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import peewee as pw

from runrecovery_service.storage import tables
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.sql_dialects import DatabaseKind

_R = tables.Run
RARE_LABEL_RUNS: Final = 2000
"""The number of runs below which a label is rare. A query is fastest if it begins with the runs of
a rare label."""


def filter_by_labels(
    db: Database,
    query: pw.ModelSelect[tables.Run],
    labels: Mapping[str, str],
    *,
    by_run: bool,
) -> tuple[pw.ModelSelect[tables.Run], Any]:
    """Restrict a query to runs that have all of these labels.

    Args:
        by_run: whether the query is ordered by the run's key. The rows of each label have this
            order.

    Returns:
        The query, and the column of the run's key to order the query by.
    """
    rarest_first = sorted(labels.items(), key=lambda label: _count_labelled(db, *label))
    key: Any = _R.id  # Any: an alias of a model has no type of its own
    for number, (name, value) in enumerate(rarest_first):
        label = tables.RunLabel.alias()
        has_label = (label.run == _R.id) & (label.key == name) & (label.value == value)
        # Beginning with a label of few runs is fastest. With a label of many runs, SQLite would
        # sort all of them for each page. Reading in the page's order soon finds enough of them.
        leads = number == 0 and (by_run or _count_labelled(db, name, value) < RARE_LABEL_RUNS)
        if leads or db.dialect.kind is not DatabaseKind.SQLITE:
            query = query.join_from(_R, label, on=has_label)
            key = label.run if leads else key
        else:
            query = query.where(pw.fn.EXISTS(label.select(pw.SQL("1")).where(has_label)))
    return query, key


def _count_labelled(db: Database, name: str, value: str) -> int:
    """Return how many runs have a label; the count stops at RARE_LABEL_RUNS."""
    row = db.fetch_one(
        "SELECT count(*) FROM (SELECT 1 FROM run_label WHERE key = ? AND value = ? LIMIT ?) AS few",
        (name, value, RARE_LABEL_RUNS),
    )
    return 0 if row is None else int(row[0])
