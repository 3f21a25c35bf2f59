"""Records webhook deliveries in the transaction of the event that they report.

A row of `webhook_delivery` is one event that one webhook has not received yet. The row has
everything that is sent, because events and runs may be removed while deliveries are still due.

A cursor into the events would not do. Events are ordered only within their run. PostgreSQL does not
commit in the order in which it assigns numbers, so a reader of a common number could skip events.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import Final

from runrecovery_service.domain.run import Run, RunEventKind, RunStatus
from runrecovery_service.domain.start_errors import RecoveryInterrupted
from runrecovery_service.domain.webhook import WebhookEvent, WebhookFilter
from runrecovery_service.storage import instances
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.rows import to_us
from runrecovery_service.storage.tables import sql_words

ROWS_AT_ONCE: Final = 5_000
"""The most rows that one transaction changes. Renewals of the lease run between transactions."""
_COLUMNS: Final = (
    "webhook, instance, run, run_id, engine, sequence, event, status, error_code, created_at"
)
_TERMINAL: Final = sql_words(tuple(s.value for s in RunStatus if s.is_terminal))
_ENDS: Final = f"e.status_after IN ({_TERMINAL}) AND e.status_before <> e.status_after"
_ASKS: Final = f"e.status_after = '{RunStatus.WAITING_USER}' AND e.status_before <> e.status_after"


def record_event(
    db: Database,
    run: Run,
    *,
    kind: RunEventKind,
    status: RunStatus,
    error_code: object,
    now: datetime,
) -> None:
    """Record the next event of a run for each webhook that receives events of this kind.

    Args:
        run: the run as it was before the change.
        status, error_code: the values of the run after the change.
    """
    for webhook in db.webhooks:
        event = webhook.select(kind, status, run.engine)
        if event is not None:
            db.execute(
                f"INSERT INTO webhook_delivery ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    webhook.name,
                    run.owner,
                    run.key,
                    run.run_id,
                    run.engine,
                    run.event_count + 1,
                    event.value,
                    status.value,
                    error_code,
                    to_us(now),
                ),
            )


def record_decisions(db: Database, instance: str, *, which: str, params: Sequence[object]) -> None:
    """Record decisions of a recovery for each webhook that receives them.

    Args:
        instance: the instance that delivers the decisions.
        which: an SQL condition for decisions `e` of runs `r`, with parameters `params`.
    """
    for webhook in db.webhooks:
        for event, condition in _decisions_of(webhook):
            engines = sorted(webhook.engines or ())
            of_engine = "" if webhook.engines is None else f" AND r.engine IN ({_marks(engines)})"
            db.execute(
                f"INSERT INTO webhook_delivery ({_COLUMNS})"
                " SELECT ?, ?, r.id, r.run_id, r.engine, e.sequence, ?, e.status_after,"
                " e.error_code, e.recovered_at FROM recovery_event e JOIN run r ON r.id = e.run"
                f" WHERE {which} AND {condition}{of_engine} ORDER BY r.id",
                (webhook.name, instance, event.value, *params, *engines),
            )


def _decisions_of(webhook: WebhookFilter) -> Iterator[tuple[WebhookEvent, str]]:
    """Yield the events under which a webhook receives decisions, each with its SQL condition."""
    if WebhookEvent.RECOVERED in webhook.events:
        yield WebhookEvent.RECOVERED, "1 = 1"
        return
    if WebhookEvent.ENDED in webhook.events:
        yield WebhookEvent.ENDED, _ENDS
    if WebhookEvent.WAITING_USER in webhook.events:
        yield WebhookEvent.WAITING_USER, _ASKS


def take_back(
    db: Database, owner: Owner, *, stopping: Callable[[], bool], rows: int = ROWS_AT_ONCE
) -> int:
    """Move the deliveries of this instance's runs back from its successors. PostgreSQL only.

    A takeover moves all deliveries to the successor, even those of runs that wait for this
    instance. They must be delivered before later events of the same run, which this instance
    delivers.

    Returns:
        The number of deliveries that were moved.

    Raises:
        RecoveryInterrupted: `stopping` has returned True.
    """
    taken = 0
    while True:
        if stopping():
            raise RecoveryInterrupted
        with db.transaction():
            count: int = db.execute(
                "UPDATE webhook_delivery SET instance = ? WHERE id IN (SELECT d.id"
                " FROM webhook_delivery d JOIN run r ON r.id = d.run"
                " WHERE d.instance <> ? AND r.owner = ? LIMIT ?)",
                (owner.instance, owner.instance, owner.instance, rows),
            ).rowcount
        if not count:
            return taken
        taken += count


def forget_removed(
    db: Database, owner: Owner, *, stopping: Callable[[], bool], rows: int = ROWS_AT_ONCE
) -> dict[str, int]:
    """Delete the deliveries of webhooks that are no longer configured; return counts by webhook.

    Args:
        rows: the most rows of one transaction.

    Raises:
        Fenced: a newer epoch of this instance has started.
        RecoveryInterrupted: `stopping` has returned True.
    """
    kept = [webhook.name for webhook in db.webhooks]
    others = f" AND webhook NOT IN ({_marks(kept)})" if kept else ""
    names = db.fetch_all(
        f"SELECT DISTINCT webhook FROM webhook_delivery WHERE instance = ?{others} ORDER BY 1",
        (owner.instance, *kept),
    )
    return {name: _forget(db, owner, name, stopping, rows) for (name,) in names}


def _forget(
    db: Database, owner: Owner, webhook: str, stopping: Callable[[], bool], rows: int
) -> int:
    deleted = 0
    for which in ("given_up_at IS NULL", "given_up_at IS NOT NULL"):  # each has an index
        found = f"SELECT id FROM webhook_delivery WHERE instance = ? AND webhook = ? AND {which}"
        count = rows
        while count:
            if stopping():
                raise RecoveryInterrupted
            with db.transaction():
                instances.demand_current(db, owner)
                count = db.execute(
                    f"DELETE FROM webhook_delivery WHERE id IN ({found} LIMIT ?)",
                    (owner.instance, webhook, rows),
                ).rowcount
            deleted += count
    return deleted


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" for _ in values)
