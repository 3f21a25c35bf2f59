"""Webhook deliveries that are due or given up. `webhook_outbox.py` records them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Final

from runrecovery_service.domain.webhook import WebhookEvent
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.rows import from_us, from_us_or_none, to_us

ROWS: Final = 5_000
"""The most rows that one transaction changes. Renewals of the lease run between transactions."""

_WORD: Final = re.compile(r"[!-~]+")
"""The form of every undamaged text in a delivery: a name, an id or a code."""

# Finds each run with one index lookup, however many deliveries the run has.
_DUE: Final = (
    "SELECT min(run) AS run FROM webhook_delivery"
    " WHERE instance = ? AND webhook = ? AND given_up_at IS NULL AND run > "
)
_DUE_RUNS: Final = (
    f"WITH RECURSIVE due AS ({_DUE}? UNION ALL"
    f" SELECT ({_DUE}due.run) FROM due WHERE due.run IS NOT NULL)"
    " SELECT run FROM due WHERE run IS NOT NULL"
)

# Each part reads one partial index, and no row of the table.
_OF_WEBHOOK: Final = "FROM webhook_delivery WHERE instance = ? AND webhook = ? AND given_up_at"
_BACKLOG: Final = (
    f"SELECT (SELECT count(*) {_OF_WEBHOOK} IS NULL),"
    f" (SELECT min(created_at) {_OF_WEBHOOK} IS NULL),"
    f" (SELECT count(*) {_OF_WEBHOOK} IS NOT NULL)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One event that a webhook has not received yet.

    Attributes:
        key: the key of the row. SQLite uses the key of a deleted row again.
        webhook, run: the name of the webhook, and the key of the run.
        sequence: the sequence number of the event among the run's events.
        status: the status of the run after the event. Text, because a damaged run can have any
            value.
    """

    key: int
    webhook: str
    run: int
    run_id: str
    engine: str
    sequence: int
    event: WebhookEvent
    status: str
    error_code: str | None
    created_at: datetime


class Unreadable(Exception):
    """The first due delivery of a run is damaged, or its event is of a newer version."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """The deliveries that one webhook has not received.

    Attributes:
        due: the number of deliveries that are still tried.
        oldest_at: the time of the oldest event among the due ones; None: none is due.
        given_up: the number of deliveries that are still kept, but no longer tried.
    """

    due: int = 0
    oldest_at: datetime | None = None
    given_up: int = 0


def due_runs(
    db: Database,
    instance: str,
    webhook: str,
    *,
    without: Collection[int],
    limit: int,
    after: int = 0,
) -> list[int]:
    """Return the keys of runs with due deliveries: keys above `after`, then the others.

    Args:
        without: keys of runs to leave out.
        limit: the most runs to return.
    """
    others = f" AND run NOT IN ({_marks(without)})" if without else ""
    of = (instance, webhook)

    def keys_above(key: int) -> list[int]:
        found = db.fetch_all(f"{_DUE_RUNS}{others} LIMIT ?", (*of, key, *of, *without, limit))
        return [run for (run,) in found]

    runs = keys_above(after)
    if after and len(runs) < limit:
        runs += keys_above(0)
    return list(dict.fromkeys(runs))[:limit]


def next_delivery(db: Database, instance: str, webhook: str, run_key: int) -> Delivery | None:
    """Return the first due delivery of a run; None if none is due.

    Raises:
        Unreadable: its event is not known, or a text is damaged.
    """
    row = db.fetch_one(
        "SELECT id, run_id, engine, sequence, event, status, error_code, created_at"
        " FROM webhook_delivery WHERE run = ? AND webhook = ? AND instance = ?"
        " AND given_up_at IS NULL ORDER BY sequence LIMIT 1",
        (run_key, webhook, instance),
    )
    if row is None:
        return None
    key, run_id, engine, sequence, event, status, error_code, created_at = row
    texts = {"run_id": run_id, "engine": engine, "status": status, "error_code": error_code or "-"}
    for column, text in texts.items():
        if not _WORD.fullmatch(text):
            raise Unreadable(f"{column} is damaged")
    if event not in set(WebhookEvent):
        raise Unreadable("event is not known")
    return Delivery(
        key=key,
        webhook=webhook,
        run=run_key,
        run_id=run_id,
        engine=engine,
        sequence=sequence,
        event=WebhookEvent(event),
        status=status,
        error_code=error_code,
        created_at=from_us(created_at),
    )


def give_up_first(
    db: Database, instance: str, webhook: str, run_key: int, *, now: datetime
) -> None:
    """Give up the first due delivery of a run, which cannot be read."""
    with db.transaction():
        db.execute(
            "UPDATE webhook_delivery SET given_up_at = ? WHERE id = (SELECT id"
            " FROM webhook_delivery WHERE run = ? AND webhook = ? AND instance = ?"
            " AND given_up_at IS NULL ORDER BY sequence LIMIT 1)",
            (to_us(now), run_key, webhook, instance),
        )


def remove_delivered(db: Database, delivery: Delivery) -> None:
    """Delete a delivery that the webhook has received."""
    with db.transaction():
        db.execute(
            "DELETE FROM webhook_delivery"
            " WHERE id = ? AND webhook = ? AND run = ? AND sequence = ?",
            (delivery.key, delivery.webhook, delivery.run, delivery.sequence),
        )


def give_up(
    db: Database,
    instance: str,
    webhook: str,
    *,
    before: datetime,
    runs: Sequence[int] | None,
    now: datetime,
) -> int:
    """Give up at most `ROWS` deliveries of events from before a time; return their number.

    Args:
        runs: the keys of the runs; None: all runs.
    """
    of_runs = "" if runs is None else f" AND run IN ({_marks(runs)})"
    with db.transaction():
        given_up: int = db.execute(
            "UPDATE webhook_delivery SET given_up_at = ? WHERE id IN (SELECT id"
            " FROM webhook_delivery WHERE instance = ? AND webhook = ?"
            f" AND given_up_at IS NULL AND created_at < ?{of_runs} LIMIT ?)",
            (to_us(now), instance, webhook, to_us(before), *(runs or ()), ROWS),
        ).rowcount
    return given_up


def forget_given_up(db: Database, instance: str, webhook: str, *, before: datetime) -> int:
    """Delete at most `ROWS` deliveries that were given up before a time; return their number."""
    with db.transaction():
        deleted: int = db.execute(
            "DELETE FROM webhook_delivery WHERE id IN (SELECT id FROM webhook_delivery"
            " WHERE instance = ? AND webhook = ? AND given_up_at < ? LIMIT ?)",
            (instance, webhook, to_us(before), ROWS),
        ).rowcount
    return deleted


def try_again(db: Database, instance: str, webhook: str) -> int:
    """Make at most `ROWS` given-up deliveries due again; return their number."""
    with db.transaction():
        revived: int = db.execute(
            "UPDATE webhook_delivery SET given_up_at = NULL WHERE id IN (SELECT id"
            " FROM webhook_delivery WHERE instance = ? AND webhook = ?"
            " AND given_up_at IS NOT NULL LIMIT ?)",
            (instance, webhook, ROWS),
        ).rowcount
    return revived


def backlogs(db: Database, instance: str) -> dict[str, Backlog]:
    """Return by name the backlog of each webhook that has due or given-up deliveries."""
    found = {}
    for name in (webhook.name for webhook in db.webhooks):
        due, oldest, given_up = db.fetch_all(_BACKLOG, (instance, name) * 3)[0]
        if due or given_up:
            found[name] = Backlog(due=due, given_up=given_up, oldest_at=from_us_or_none(oldest))
    return found


def _marks(values: Collection[object]) -> str:
    return ", ".join("?" for _ in values)
