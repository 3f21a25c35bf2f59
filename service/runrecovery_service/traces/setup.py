"""Builds the tracer that sends spans to the collector of `[traces]`, with OpenTelemetry's SDK."""

from __future__ import annotations

import logging
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, Sampler, TraceIdRatioBased

from runrecovery_service import __version__
from runrecovery_service.config.settings import TraceSettings
from runrecovery_service.domain.start_errors import TracesRefused
from runrecovery_service.metric_counters import Meters
from runrecovery_service.traces.collector_session import CollectorSession
from runrecovery_service.traces.otel_tracer import KeyedIds, OtelTracer
from runrecovery_service.traces.span_outcomes import (
    CountingExporter,
    QueueCounter,
    SpanOutcomes,
)

QUEUE_SPANS: Final = 4096
"""The most ended spans that wait for the collector. A further one replaces the oldest."""
BATCH_SPANS: Final = 512
DELAY_MS: Final = 1000
EXPORT_S: Final = 5.0
"""The time limit for one batch, retries included."""


def build_tracer(settings: TraceSettings, *, instance: str, meters: Meters) -> OtelTracer:
    """Return the tracer. It starts the thread that sends.

    Args:
        meters: count sent and lost spans.

    Raises:
        TracesRefused: OpenTelemetry refuses a variable of its own in the environment.
        RuntimeError: the system refuses a thread.
    """
    # The SDK logs every retry. `SpanOutcomes` reports what is lost.
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)
    try:
        return OtelTracer(_provider(settings, instance, meters))
    except ValueError as error:
        raise TracesRefused(str(error)) from error


def _provider(settings: TraceSettings, instance: str, meters: Meters) -> TracerProvider:
    provider = TracerProvider(
        sampler=sampler(settings),
        id_generator=KeyedIds(),
        resource=Resource(
            {
                "service.name": "runrecovery",
                "service.version": __version__,
                "service.instance.id": instance,
            }
        ),
        shutdown_on_exit=False,  # the exit of the process would wait for a collector that hangs
    )
    exporter = OTLPSpanExporter(
        endpoint=traces_url(settings.endpoint),
        timeout=EXPORT_S,
        session=CollectorSession(EXPORT_S),
    )
    outcomes = SpanOutcomes(meters=meters, queue_spans=QUEUE_SPANS)
    provider.add_span_processor(QueueCounter(outcomes))
    provider.add_span_processor(
        BatchSpanProcessor(
            CountingExporter(exporter, outcomes),
            max_queue_size=QUEUE_SPANS,
            max_export_batch_size=BATCH_SPANS,
            schedule_delay_millis=DELAY_MS,
        )
    )
    return provider


def traces_url(endpoint: str) -> str:
    """Return the URL for spans: `/v1/traces` below the endpoint, as OTLP defines it."""
    return f"{endpoint.rstrip('/')}/v1/traces"


def sampler(settings: TraceSettings) -> Sampler:
    """Return the sampler, which decides which traces are recorded."""
    by_ratio = TraceIdRatioBased(settings.sample_ratio)
    if settings.sample_by_caller:
        return ParentBased(by_ratio)
    # By the trace id alone, so that all spans of a run are recorded, or none.
    return by_ratio
