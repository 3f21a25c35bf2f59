"""A collector of traces that speaks OTLP over HTTP on loopback."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

PATH: Final = "/v1/traces"
ERROR: Final = Status.STATUS_CODE_ERROR


@dataclass(frozen=True, kw_only=True)
class Collected:
    """One span."""

    name: str
    trace_id: str
    span_id: str
    parent_id: str
    kind: int
    has_failed: bool
    start_ns: int
    end_ns: int
    facts: Mapping[str, object]


class Collector:
    """Keeps the spans that it gets.

    Attributes:
        bodies: every request.
        asked: set by the first request.
    """

    def __init__(self, *, answers: bool = True) -> None:
        """Listen.

        Args:
            answers: False: accept requests, and answer none before `answer`.
        """
        self.bodies: list[bytes] = []
        self.asked = threading.Event()
        self._may_answer = threading.Event()
        if answers:
            self._may_answer.set()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.asked.set()
                collector._may_answer.wait()
                if self.path == PATH:
                    collector.bodies.append(body)
                self.send_response(200 if self.path == PATH else 404)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Log nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def answer(self) -> None:
        """Answer every request from now on, and those that wait."""
        self._may_answer.set()

    @property
    def endpoint(self) -> str:
        """Its URL."""
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def spans(self) -> list[Collected]:
        """Every span so far."""
        return [
            _collected(span)
            for body in list(self.bodies)
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    def named(self, name: str) -> list[Collected]:
        """Return the spans of a name."""
        return [span for span in self.spans if span.name == name]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.answer()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _collected(span: Span) -> Collected:
    return Collected(
        name=span.name,
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        kind=span.kind,
        has_failed=span.status.code == ERROR,
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        facts={each.key: _value(each.value) for each in span.attributes},
    )


def _value(value: AnyValue) -> object:
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)
