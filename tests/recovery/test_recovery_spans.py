"""The spans of a recovery: its phases are below it, and a failure marks what failed."""

from __future__ import annotations

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.recovery.recovery_spans import begin_spans
from runrecovery_service.storage.instances import Owner
from runrecovery_service.traces.otel_tracer import OtelTracer


def test_a_phase_that_fails_marks_itself_and_the_recovery() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    owner = Owner("i", 7, "t")
    spans = begin_spans(OtelTracer(provider), owner, cause=Cause.STARTUP, reconciliation_id="x")

    with spans.phase("orphans"):
        pass
    with pytest.raises(ConnectionError), spans.phase("sessions"):
        raise ConnectionError
    spans.failed("StorageUnavailable")

    orphans, sessions, recovery = exporter.get_finished_spans()
    assert [span.name for span in (orphans, sessions, recovery)] == [
        "orphans", "sessions", "recovery"
    ]  # fmt: skip
    assert orphans.parent is not None
    assert sessions.parent is not None
    assert recovery.context.span_id == orphans.parent.span_id == sessions.parent.span_id
    assert dict(orphans.attributes or {}) == {}
    assert dict(sessions.attributes or {}) == {"error.type": "ConnectionError"}
    assert dict(recovery.attributes or {}) == {
        "runrecovery.reconciliation_id": "x",
        "runrecovery.cause": "STARTUP",
        "runrecovery.instance": "i",
        "runrecovery.epoch": 7,
        "error.type": "StorageUnavailable",
    }
