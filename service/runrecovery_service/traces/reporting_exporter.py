"""Reports in the log when the collector cannot be reached, and when it can again."""

from __future__ import annotations

from collections.abc import Sequence

import structlog
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

log = structlog.get_logger()


class ReportingExporter(SpanExporter):
    """Sends through another exporter. Only the thread that sends calls `export`."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._lost = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans. Spans that cannot be sent are lost."""
        try:
            result = self._exporter.export(spans)
        except Exception:  # noqa: BLE001 - whatever the exporter raises, the spans are lost
            result = SpanExportResult.FAILURE
        if result is not SpanExportResult.SUCCESS:
            if not self._lost:
                log.warning("traces.not_exported")
            self._lost += len(spans)
        elif self._lost:
            log.info("traces.exported_again", spans_lost=self._lost)
            self._lost = 0
        return result

    def shutdown(self) -> None:
        """Let a batch that is being sent end without another retry."""
        self._exporter.shutdown()
