"""Counts sent and lost spans, and logs the losses."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import field
from time import monotonic
from typing import Final

import structlog
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.metric_counters import Meters

log = structlog.get_logger()

SENT: Final = "sent"
QUEUE_FULL: Final = "queue_full"
NOT_EXPORTED: Final = "not_exported"
"""The outcomes of a span: sent, or lost for one of two reasons."""
FAILED: Final = "failed"
"""The outcome of a request whose spans the collector did not accept."""
REPORT_S: Final = 60.0
"""The time between two log lines about the same kind of loss."""


@dataclass(slots=True)
class _Losses:
    """Spans lost for one reason. The first loss is logged at once, later ones every `REPORT_S`."""

    reason: str
    spans: int = 0
    logged_s: float | None = None

    def add(self, count: int, now_s: float) -> bool:
        """Count lost spans, and return whether they were logged."""
        self.spans += count
        if self.logged_s is not None and now_s < self.logged_s + REPORT_S:
            return False
        log.warning("traces.spans_lost", reason=self.reason, spans=self.spans)
        self.spans, self.logged_s = 0, now_s
        return True


@dataclass(slots=True, kw_only=True, eq=False)
class SpanOutcomes:
    """Counts the outcomes of spans and of the requests that carry them.

    Attributes:
        queue_spans: the most ended spans that wait. A further one replaces the oldest.
    """

    meters: Meters
    queue_spans: int
    now_s: Callable[[], float] = monotonic
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _waiting: int = field(default=0, init=False)
    _replaced: _Losses = field(default_factory=lambda: _Losses(QUEUE_FULL), init=False)
    _refused: _Losses = field(default_factory=lambda: _Losses(NOT_EXPORTED), init=False)
    _outage_spans: int = field(default=0, init=False)
    _is_outage_logged: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for outcome in (SENT, QUEUE_FULL, NOT_EXPORTED):
            self.meters.spans.show_zero(outcome)
        for outcome in (SENT, FAILED):
            self.meters.span_exports.show_zero(outcome)

    def note_ended(self) -> None:
        """Count a span that enters the queue. Any thread may call this."""
        with self._lock:
            if self._waiting < self.queue_spans:
                self._waiting += 1
                return
            self._replaced.add(1, self.now_s())
        self.meters.spans.add(QUEUE_FULL)

    def note_taken(self, count: int) -> None:
        """Count spans that the sending thread has taken from the queue.

        The queue shrinks a moment before this call. A span that another thread ends in between can
        be counted as lost, although the queue keeps it.
        """
        with self._lock:
            self._waiting -= count

    def note_exported(self, count: int, *, is_taken: bool) -> None:
        """Count the spans of a request to the collector, by whether the collector accepted them."""
        self.meters.spans.add(SENT if is_taken else NOT_EXPORTED, many=count)
        self.meters.span_exports.add(SENT if is_taken else FAILED)
        if not is_taken:
            self._outage_spans += count
            self._is_outage_logged |= self._refused.add(count, self.now_s())
            return
        if self._is_outage_logged:
            log.info("traces.exported_again", spans_lost=self._outage_spans)
        self._outage_spans, self._is_outage_logged = 0, False


class QueueCounter(SpanProcessor):
    """Counts the spans that enter the queue."""

    def __init__(self, outcomes: SpanOutcomes) -> None:
        self._outcomes = outcomes

    def on_end(self, span: ReadableSpan) -> None:
        """Count a span. The SDK calls this for recorded spans only."""
        self._outcomes.note_ended()


class CountingExporter(SpanExporter):
    """Sends spans by another exporter, and counts them. One thread calls `export`."""

    def __init__(self, exporter: SpanExporter, outcomes: SpanOutcomes) -> None:
        self._exporter = exporter
        self._outcomes = outcomes

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans, once. Spans of a failed request are lost."""
        self._outcomes.note_taken(len(spans))
        try:
            result = self._exporter.export(spans)
        except Exception:  # noqa: BLE001 - after any error the spans are lost
            result = SpanExportResult.FAILURE
        self._outcomes.note_exported(len(spans), is_taken=result is SpanExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        """Shut the exporter down: a batch under way is not retried any more."""
        self._exporter.shutdown()
