"""Reports each call of a registered method as a span below the span of its caller."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias, TypeVar

import grpc

from runrecovery_service.rpc.call_meter import code_of
from runrecovery_service.rpc.trace_context import TRACEPARENT, read_traceparent
from runrecovery_service.spans import SpanKind, Tracer

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
R = TypeVar("R")

FAULTS: Final = frozenset(
    {"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"}
)
"""The codes that are failures of the server. By OpenTelemetry's conventions for RPC, all others are
failures of the caller."""


class CallTracer:
    """Wraps handlers with a span each. Use it on the event loop."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def wrap(
        self, method: str, respond: Callable[[bytes, Context], Awaitable[R]]
    ) -> Callable[[bytes, Context], Awaitable[R]]:
        """Return the handler of a method, wrapped in a span that sets its `TRACEPARENT`."""
        service, _, name = method.rpartition(".")
        span_name = f"{service}/{name}"
        facts = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}

        async def call(payload: bytes, context: Context) -> R:
            parent = read_traceparent(context.invocation_metadata() or ())
            span = self._tracer.start(span_name, parent, facts, kind=SpanKind.SERVER)
            TRACEPARENT.set(span.traceparent)
            code = "OK"
            try:
                return await respond(payload, context)
            except BaseException:
                code = code_of(context)
                raise
            finally:
                span.end({"rpc.response.status_code": code}, error=code if code in FAULTS else None)

        return call
