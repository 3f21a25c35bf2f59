"""Receipts: a repeated request has no second effect, and gets the run of the first request."""

from __future__ import annotations

from datetime import datetime

from runrecovery_service.domain.errors import RequestedRunRemoved, RequestIdReused
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import tables
from runrecovery_service.storage.database import Database, Stale
from runrecovery_service.storage.rows import to_us
from runrecovery_service.storage.statements import Statement, param

_T = tables.RequestReceipt


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Identifies a request: its request_id, caller, method, and a digest of the rest.

    Attributes:
        request_id: a UUID in lower case.
        caller: the name of the caller; None: no callers are configured.
    """

    request_id: str
    method: str
    fingerprint: bytes
    caller: str | None = None

    @property
    def key(self) -> str:
        """The primary key of the receipt, which includes the caller, so that callers share none."""
        return self.request_id if self.caller is None else f"{self.request_id}/{self.caller}"


_FIND = Statement(
    # Prefers the caller's own receipt to one without a caller. The latter was recorded before
    # callers were configured, and counts for every caller.
    lambda: (
        _T.select(_T.method, _T.fingerprint, _T.run)
        .where(_T.request_id.in_((param("key"), param("request_id"))))
        .order_by(_T.request_id.desc())
    )
)
_ADD = Statement(
    lambda: _T.insert(
        {
            _T.request_id: param("request_id"),
            _T.method: param("method"),
            _T.fingerprint: param("fingerprint"),
            _T.run: param("run"),
            _T.created_at: param("now"),
            _T.owner: tables.Run.select(tables.Run.owner).where(tables.Run.id == param("run")),
        }
    ).on_conflict_ignore()
)


def find_effect(db: Database, receipt: Receipt | None) -> int | None:
    """Return the key of the run that this request has already changed; None for a new request.

    Raises:
        RequestIdReused: the request_id was used with another method or payload.
        RequestedRunRemoved: retention has removed the run.
    """
    if receipt is None:
        return None
    row = _FIND.run(db, key=receipt.key, request_id=receipt.request_id).fetchone()
    if row is None:
        return None
    method, fingerprint, run_key = row
    if (method, fingerprint) != (receipt.method, receipt.fingerprint.hex()):
        raise RequestIdReused(receipt.request_id)
    if db.fetch_one("SELECT 1 FROM run WHERE id = ?", (run_key,)) is None:
        raise RequestedRunRemoved(receipt.request_id)
    return int(run_key)


def record_effect(db: Database, receipt: Receipt | None, *, run_key: int, now: datetime) -> None:
    """Record that the request has changed a run, in the caller's transaction.

    Raises:
        Stale: the same request_id was recorded since `find_effect`.
    """
    if receipt is None:
        return
    added = _ADD.run(
        db,
        request_id=receipt.key,
        method=receipt.method,
        fingerprint=receipt.fingerprint.hex(),
        run=run_key,
        now=to_us(now),
    )
    if added.rowcount != 1:
        raise Stale
