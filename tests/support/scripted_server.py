"""A server whose answers a test scripts, method by method."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
from google.protobuf import any_pb2, message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from runrecovery.v1 import recovery_service_pb2, run_service_pb2

METHODS: Mapping[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in (run_service_pb2.DESCRIPTOR, recovery_service_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}


@dataclass(frozen=True, kw_only=True)
class Fail:
    """An error, with the details that the service would send."""

    code: grpc.StatusCode
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    domain: str = "runrecovery"
    more: Sequence[Message] = ()
    pushback_ms: str | None = None
    trailer: bytes | None = None  # instead of the details

    def abort(self, context: grpc.ServicerContext) -> None:
        """End a call with this error."""
        trailers: list[tuple[str, str | bytes]] = []
        if self.reason or self.more or self.trailer is not None:
            trailers.append(("grpc-status-details-bin", self.trailer or self._status()))
        if self.pushback_ms is not None:
            trailers.append(("grpc-retry-pushback-ms", self.pushback_ms))
        context.set_trailing_metadata(tuple(trailers))
        context.abort(self.code, "scripted failure")

    def _status(self) -> bytes:
        status = status_pb2.Status(code=self.code.value[0], message="scripted failure")
        info = error_details_pb2.ErrorInfo(
            reason=self.reason, domain=self.domain, metadata=self.metadata
        )
        for detail in (*self.more, *([info] if self.reason else [])):
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        data: bytes = status.SerializeToString()
        return data


@dataclass(frozen=True)
class Stream:
    """The messages of a stream and its end.

    Attributes:
        then: the error at the end; without one the stream ends with OK.
        hold: whether the end waits until the server is stopped.
    """

    pieces: Sequence[Message]
    then: Fail | None = None
    hold: bool = False


Step: TypeAlias = (
    Message | Fail | Stream | Callable[[Any, grpc.ServicerContext], "Message | Stream"]
)


class ScriptedServer(grpc.GenericRpcHandler):
    """Answers the calls of a method by the steps of its script, and keeps the requests.

    The last step of a script answers all further calls.

    Attributes:
        calls: the requests so far, each with the name of its method.
        tokens: the values of `authorization` of each of these calls.
        left: set when a stream has ended, also because its caller went away.
    """

    def __init__(self) -> None:
        self.health = health.HealthServicer()
        self.left = threading.Event()
        self.release = threading.Event()
        self.calls: list[tuple[str, Any]] = []
        self.tokens: list[list[str | bytes]] = []
        self._scripts: dict[str, list[Step]] = {}
        self._played: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._servers: list[grpc.Server] = []

    def on(self, method: str, *steps: Step) -> None:
        """Script a method, by its bare name."""
        self._scripts[method] = list(steps)

    def asked(self, method: str) -> list[Any]:
        """Return the requests of a method, in order."""
        return [request for name, request in list(self.calls) if name == method]

    def start(
        self, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None
    ) -> str:
        """Start, and return `host:port`. With credentials the connections are encrypted."""
        server = grpc.server(ThreadPoolExecutor(max_workers=8))
        server.add_generic_rpc_handlers((self,))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
        server.start()
        self._servers.append(server)
        return f"127.0.0.1:{port}"

    def set_health(self, name: str, *, serving: bool) -> None:
        """Set the answer of health for a service name."""
        statuses = health_pb2.HealthCheckResponse
        self.health.set(name, statuses.SERVING if serving else statuses.NOT_SERVING)

    def stop(self) -> None:
        """End all streams and stop."""
        self.release.set()
        while self._servers:
            self._servers.pop().stop(0).wait()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See `grpc.GenericRpcHandler`."""
        method = METHODS.get(details.method)
        if method is None:
            return None
        parse = message_factory.GetMessageClass(method.input_type).FromString
        if method.server_streaming:
            return grpc.unary_stream_rpc_method_handler(
                lambda request, context: self._stream(method.name, request, context),
                request_deserializer=parse,
                response_serializer=lambda message: message.SerializeToString(),
            )
        return grpc.unary_unary_rpc_method_handler(
            lambda request, context: self._answer(method.name, request, context),
            request_deserializer=parse,
            response_serializer=lambda message: message.SerializeToString(),
        )

    def _next(self, name: str, request: Any, context: grpc.ServicerContext) -> Step:
        metadata = context.invocation_metadata()
        with self._lock:
            self.calls.append((name, request))
            self.tokens.append([value for key, value in metadata if key == "authorization"])
            script = self._scripts[name]
            step = script[min(self._played[name], len(script) - 1)]
            self._played[name] += 1
            return step

    def _answer(self, name: str, request: Any, context: grpc.ServicerContext) -> Message:
        step = self._next(name, request, context)
        if isinstance(step, Fail):
            step.abort(context)
        if callable(step):
            step = step(request, context)
        assert isinstance(step, Message)
        return step

    def _stream(self, name: str, request: Any, context: grpc.ServicerContext) -> Iterator[Message]:
        step = self._next(name, request, context)
        if isinstance(step, Fail):
            step = Stream((), then=step)
        if callable(step):
            step = step(request, context)
        assert isinstance(step, Stream)
        context.add_callback(self.left.set)
        yield from step.pieces
        if step.hold:
            self.release.wait(30)
        if step.then is not None:
            step.then.abort(context)
