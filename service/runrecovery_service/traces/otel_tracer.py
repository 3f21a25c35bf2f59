"""Starts spans of OpenTelemetry's SDK."""

from __future__ import annotations

from contextvars import ContextVar
from datetime import datetime
from hashlib import sha256
from typing import Final

import structlog
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)

from runrecovery_service import __version__, daemon_threads
from runrecovery_service.spans import NO_FACTS, Facts, SpanKind

log = structlog.get_logger()

FLUSH_S: Final = 3.0
"""The time that a stop gives to ended spans. Spans not sent by then are lost."""
KINDS: Final = {SpanKind.INTERNAL: trace.SpanKind.INTERNAL, SpanKind.SERVER: trace.SpanKind.SERVER}


_KEY: Final[ContextVar[str | None]] = ContextVar("span_key", default=None)
"""The key of the span that is being started; None: the span gets random ids."""


class KeyedIds(RandomIdGenerator):
    """Makes the ids of a span: from the key of the span, or random ones without a key."""

    def generate_trace_id(self) -> int:
        """Return the id of a new trace."""
        key = _KEY.get()
        return super().generate_trace_id() if key is None else _digest(key, 0, 16)

    def generate_span_id(self) -> int:
        """Return the id of a new span."""
        key = _KEY.get()
        return super().generate_span_id() if key is None else _digest(key, 16, 24)


def _digest(key: str, begin: int, end: int) -> int:
    return int.from_bytes(sha256(key.encode()).digest()[begin:end])


class OtelSpan:
    """One span.

    Attributes:
        traceparent: the context of the span. If the SDK is disabled, the context of its parent.
    """

    def __init__(self, span: trace.Span, parent: str | None) -> None:
        self._span = span
        context = span.get_span_context()
        self.traceparent = _to_traceparent(context) if context.is_valid else parent
        self._has_ended = False

    def end(self, facts: Facts = NO_FACTS, *, error: str | None = None) -> None:
        """End the span. A second call has no effect."""
        if self._has_ended:
            return
        self._has_ended = True
        self._span.set_attributes(facts)
        if error is not None:
            self._span.set_attribute("error.type", error)
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


class OtelTracer:
    """Starts spans, and sends them when it stops."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("runrecovery_service", __version__)

    def start(
        self,
        name: str,
        parent: str | None,
        facts: Facts = NO_FACTS,
        *,
        kind: SpanKind = SpanKind.INTERNAL,
        started_at: datetime | None = None,
        key: str | None = None,
    ) -> OtelSpan:
        """Return a new span."""
        token = _KEY.set(key)
        try:
            span = self._tracer.start_span(
                name,
                context=_to_context(parent),
                kind=KINDS[kind],
                attributes=facts,
                start_time=None if started_at is None else _to_ns(started_at),
            )
        finally:
            _KEY.reset(token)
        return OtelSpan(span, parent)

    async def stop(self) -> None:
        """Send the spans that have ended, for at most `FLUSH_S`."""
        try:
            # In a thread that the end of the process does not wait for: a collector may hang.
            await daemon_threads.run_within(FLUSH_S, self._provider.shutdown)
        except TimeoutError:
            log.warning("traces.not_flushed", seconds=FLUSH_S)


def _to_context(parent: str | None) -> Context:
    """Return the context that a `traceparent` of version 00 names; an empty one for None."""
    try:
        _, trace_id, span_id, flags = (parent or "").split("-")
        context = SpanContext(
            int(trace_id, 16),
            int(span_id, 16),
            is_remote=True,
            trace_flags=TraceFlags(int(flags, 16)),
        )
    except ValueError:  # no parent, or a damaged row of the store: it must not stop a launch
        return Context()
    return set_span_in_context(NonRecordingSpan(context), Context())


def _to_ns(time: datetime) -> int:
    return round(time.timestamp() * 1e6) * 1000


def _to_traceparent(context: SpanContext) -> str:
    sampled = context.trace_flags & TraceFlags.SAMPLED
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{sampled:02x}"
