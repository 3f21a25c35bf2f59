"""Builds the metrics of a service. Imported only when `metrics_listen` is set."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Protocol

from runrecovery_service import __version__
from runrecovery_service.clock import Clock
from runrecovery_service.domain.retention import RetentionKind
from runrecovery_service.execution.dispatcher import Dispatcher
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.logs import LOGGED_EVENTS, LOGGED_LINES
from runrecovery_service.metric_counters import Meters
from runrecovery_service.metrics import gauges, snapshot
from runrecovery_service.metrics.collector import Collector, Counts, StoredCounts
from runrecovery_service.metrics.exposition import CONTENT_TYPE, render
from runrecovery_service.metrics.gauges import Present
from runrecovery_service.metrics.http_server import MetricsServer
from runrecovery_service.metrics.snapshot import Family
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.rpc.call_meter import CallMeter
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.health import NAMES
from runrecovery_service.storage import usage
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.run_counts import count_unfinished
from runrecovery_service.storage.store_timer import OPERATIONS, STORE_ERRORS
from runrecovery_service.webhooks.webhooks import Webhooks

if TYPE_CHECKING:  # not imported where retention is off
    from runrecovery_service.retention.sweep import RetentionSweep

ALERTED_EVENTS: Final = (
    "recovery.orphan_refused",
    "recovery.safe_mode",
    "recovery.warning",
    "storage.failed",
    "service.disk_low",
    "service.lease_not_renewed",
    "service.reloaded",
    "service.containment",
    "execution.tree_not_ended",
    "execution.straggler_ended",
)
"""The warnings that are worth an alert (docs/operations.md#watch)."""

WEBHOOK_ERRORS: Final = ("webhook.disabled", "webhook.given_up", "webhook.delivery_damaged")
"""Errors about one receiver. No alert pages for them, because the service works."""
TRY_OUTCOMES: Final = ("delivered", "failed")


class Lease(Protocol):
    """The lease of the instance."""

    @property
    def left_s(self) -> float:
        """Seconds until the lease ends unless it is renewed."""
        ...


class Owns(Protocol):
    """The part of `ownership.Ownership` that the metrics read."""

    @property
    def owner(self) -> Owner:
        """The instance and its epoch."""
        ...

    @property
    def storage(self) -> Storage:
        """The store."""
        ...

    @property
    def lease(self) -> Lease:
        """The lease."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """The objects from which the metrics are read."""

    ownership: Owns
    gate: Gate
    dispatcher: Dispatcher
    status: RecoveryStatus
    calls: CallMeter
    webhooks: Webhooks
    retention: RetentionSweep | None

    def present(self, stored: StoredCounts) -> Present:
        """Return the service as it is now. Call it on the event loop."""
        return Present(
            version=__version__,
            instance=self.ownership.owner.instance,
            epoch=self.ownership.owner.epoch,
            now=stored.clock.now(),
            state=self.gate.state,
            is_healthy=NAMES[""](self.gate),
            is_disk_low=self.gate.disk_low,
            engines=tuple(sorted(self.dispatcher.supervisors.catalog.names)),
            engines_in_use=self.dispatcher.turns.engines_in_use,
            slots=self.dispatcher.capacity,
            lease_left_s=self.ownership.lease.left_s,
            open_streams=dict(self.calls.open_streams),
            webhooks_failing_since=self.webhooks.failing_since,
            report=self.status.report,
            removed={
                kind.value: 0 if self.retention is None else self.retention.totals.removed[kind]
                for kind in RetentionKind
            },
            runs=None if stored.counts is None else stored.counts.runs,
            usage=[] if stored.counts is None else stored.counts.usage,
            backlogs=None if stored.counts is None else stored.counts.backlogs,
            counted_at=stored.read_at,
        )


def build_metrics(sources: Sources, clock: Clock, *, max_connections: int) -> MetricsServer:
    """Return the server of the metrics; it does not listen yet."""
    _show_zeros(sources.calls.meters)
    store, owner = sources.ownership.storage, sources.ownership.owner
    stored = StoredCounts(
        read=lambda: store.read(_count, owner, with_webhooks=bool(sources.webhooks.senders)),
        clock=clock,
    )

    def all_families() -> Iterator[Family]:
        present = sources.present(stored)
        for webhook in present.webhooks_failing_since:  # a reload can add webhooks
            for outcome in TRY_OUTCOMES:
                sources.calls.meters.webhook_tries.show_zero(webhook, outcome)
        yield from gauges.families_of(present)
        yield from snapshot.families_of(sources.calls.meters, LOGGED_EVENTS, LOGGED_LINES)

    return MetricsServer(
        Collector(stored=stored, families=all_families, render=render),
        content_type=CONTENT_TYPE,
        max_connections=max_connections,
    )


def _count(db: Database, owner: Owner, *, with_webhooks: bool) -> Counts:
    runs, used = count_unfinished(db, owner), usage.by_model(db, owner)
    if not with_webhooks:
        return Counts(runs=runs, usage=used, backlogs={})
    from runrecovery_service.storage.webhook_deliveries import backlogs  # noqa: PLC0415 - see Counts

    return Counts(runs=runs, usage=used, backlogs=backlogs(db, owner.instance))


def _show_zeros(meters: Meters) -> None:
    """Show 0 for every event and level that an alert reads."""
    for event in ALERTED_EVENTS:
        LOGGED_EVENTS.show_zero(event, "warning")
    for event in WEBHOOK_ERRORS:
        LOGGED_EVENTS.show_zero(event, "error")
    for level in ("error", "warning"):
        LOGGED_LINES.show_zero(level)
    for operation in OPERATIONS:
        for error in STORE_ERRORS:
            meters.storage_errors.show_zero(operation, error.__name__)
