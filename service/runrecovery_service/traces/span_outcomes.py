"""Counts what becomes of spans, and reports in the log when some are lost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Final

import structlog
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from runrecovery_service.meters import Meters

log = structlog.get_logger()

SENT: Final = "sent"
QUEUE_FULL: Final = "queue_full"
NOT_EXPORTED: Final = "not_exported"
"""What becomes of a span."""
FAILED: Final = "failed"
"""What becomes of a request to the collector that does not take its spans."""
REPORT_S: Final = 60.0
"""The time between two log lines about the same kind of loss."""


@dataclass(slots=True)
class _Losses:
    """Spans lost for one reason. The first are logged at once, more every `REPORT_S` at most."""

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
    """What becomes of the spans of the service.

    Attributes:
        queue_spans: how many ended spans may wait for the collector. More replace the oldest.
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
        """Count a span that is put into the queue now. Any thread may call this."""
        with self._lock:
            if self._waiting < self.queue_spans:
                self._waiting += 1
                return
            self._replaced.add(1, self.now_s())
        self.meters.spans.add(QUEUE_FULL)

    def note_taken(self, count: int) -> None:
        """Count spans that have left the queue.

        They left it a moment ago. A span that another thread ended within that moment counts as
        lost if the queue had been full.
        """
        with self._lock:
            self._waiting -= count

    def note_exported(self, count: int, *, is_taken: bool) -> None:
        """Count the spans of a request, and whether the collector took them."""
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
    """Counts the spans that are put into the queue."""

    def __init__(self, outcomes: SpanOutcomes) -> None:
        self._outcomes = outcomes

    def on_end(self, span: ReadableSpan) -> None:
        """Count a span. Spans that are not recorded do not come here."""
        self._outcomes.note_ended()


class CountingExporter(SpanExporter):
    """Sends through another exporter. Only the thread that sends calls `export`."""

    def __init__(self, exporter: SpanExporter, outcomes: SpanOutcomes) -> None:
        self._exporter = exporter
        self._outcomes = outcomes

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans. Spans that cannot be sent are lost."""
        self._outcomes.note_taken(len(spans))
        try:
            result = self._exporter.export(spans)
        except Exception:  # noqa: BLE001 - whatever the exporter raises, the spans are lost
            result = SpanExportResult.FAILURE
        self._outcomes.note_exported(len(spans), is_taken=result is SpanExportResult.SUCCESS)
        return result

    def shutdown(self) -> None:
        """Let a batch that is being sent end without another retry."""
        self._exporter.shutdown()
