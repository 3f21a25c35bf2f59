"""A real server that plays a script, and one way to call both clients."""

from __future__ import annotations

import asyncio
import itertools
import socket
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeAlias

import grpc
import pytest
from google.protobuf import any_pb2, message_factory
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from runrecovery import AsyncRunRecoveryClient, RunRecoveryClient
from runrecovery.v1 import recovery_service_pb2, run_service_pb2

METHODS: Mapping[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in (run_service_pb2.DESCRIPTOR, recovery_service_pb2.DESCRIPTOR)
    for service in file.services_by_name.values()
    for method in service.methods
}


@dataclass(frozen=True, kw_only=True)
class Fail:
    """An error answer, with the details that the service would send."""

    code: grpc.StatusCode
    reason: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    domain: str = "runrecovery"
    more: Sequence[Message] = ()
    pushback_ms: str | None = None
    trailer: bytes | None = None  # instead of the details

    def abort(self, context: grpc.ServicerContext) -> None:
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
    """Pieces of a stream, and how it ends: well, with a failure, or when the caller leaves."""

    pieces: Sequence[Message]
    then: Fail | None = None
    hold: bool = False


Step: TypeAlias = (
    Message | Fail | Stream | Callable[[Any, grpc.ServicerContext], "Message | Stream"]
)


class ScriptedServer(grpc.GenericRpcHandler):
    """Answers each method by its script, whose last step repeats, and keeps the requests."""

    def __init__(self) -> None:
        self.health = health.HealthServicer()
        self.left = threading.Event()
        self.release = threading.Event()
        self.calls: list[tuple[str, Any]] = []
        self._scripts: dict[str, list[Step]] = {}
        self._played: dict[str, int] = defaultdict(int)
        self._lock = threading.Lock()
        self._servers: list[grpc.Server] = []

    def on(self, method: str, *steps: Step) -> None:
        """Script a method, by its bare name."""
        self._scripts[method] = list(steps)

    def asked(self, method: str) -> list[Any]:
        """The requests that came for a method, in order."""
        return [request for name, request in list(self.calls) if name == method]

    def start(self, address: str = "127.0.0.1:0") -> str:
        """Start, and return `host:port`."""
        server = grpc.server(ThreadPoolExecutor(max_workers=8))
        server.add_generic_rpc_handlers((self,))
        health_pb2_grpc.add_HealthServicer_to_server(self.health, server)
        port = server.add_insecure_port(address)
        server.start()
        self._servers.append(server)
        return f"127.0.0.1:{port}"

    def set_health(self, name: str, *, serving: bool) -> None:
        statuses = health_pb2.HealthCheckResponse
        self.health.set(name, statuses.SERVING if serving else statuses.NOT_SERVING)

    def stop(self) -> None:
        self.release.set()
        while self._servers:
            self._servers.pop().stop(0).wait()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
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

    def _next(self, name: str, request: Any) -> Step:
        with self._lock:
            self.calls.append((name, request))
            script = self._scripts[name]
            step = script[min(self._played[name], len(script) - 1)]
            self._played[name] += 1
            return step

    def _answer(self, name: str, request: Any, context: grpc.ServicerContext) -> Message:
        step = self._next(name, request)
        if isinstance(step, Fail):
            step.abort(context)
        if callable(step):
            step = step(request, context)
        assert isinstance(step, Message)
        return step

    def _stream(self, name: str, request: Any, context: grpc.ServicerContext) -> Iterator[Message]:
        step = self._next(name, request)
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


class Caller:
    """Calls a client's methods by name, whichever client it is."""

    def __init__(
        self, client: RunRecoveryClient | AsyncRunRecoveryClient, *, target: str = ""
    ) -> None:
        self.client = client
        self.target = target

    async def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        method = attrgetter(name)(self.client)
        if isinstance(self.client, RunRecoveryClient):
            return await asyncio.to_thread(method, *args, **kwargs)
        return await method(*args, **kwargs)

    async def collect(
        self, name: str, *args: Any, limit: int | None = None, **kwargs: Any
    ) -> list[Any]:
        """The first `limit` rows of an iterator, which is then left."""
        method = attrgetter(name)(self.client)
        return await self.rows(method(*args, **kwargs), limit=limit)

    async def rows(self, iterator: Any, *, limit: int | None = None) -> list[Any]:
        """The first `limit` rows of an iterator that the client has made; it is then left."""
        if isinstance(self.client, RunRecoveryClient):
            return await asyncio.to_thread(lambda: list(itertools.islice(iterator, limit)))
        rows: list[Any] = []
        async for row in iterator:
            rows.append(row)
            if len(rows) == limit:
                break
        return rows


Connect: TypeAlias = Callable[..., Caller]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    yield scripted
    scripted.stop()


@pytest.fixture(params=["sync", "aio"])
def flavour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def connect(flavour: str) -> AsyncIterator[Connect]:
    """Makes clients of both flavours and closes them."""
    open_clients: list[RunRecoveryClient | AsyncRunRecoveryClient] = []

    def make(target: str, **kwargs: Any) -> Caller:
        kind = RunRecoveryClient if flavour == "sync" else AsyncRunRecoveryClient
        client = kind(target, **kwargs)
        open_clients.append(client)
        return Caller(client, target=target)

    yield make
    for client in open_clients:
        if isinstance(client, RunRecoveryClient):
            client.close()
        else:
            await client.close()


@pytest.fixture
async def caller(server: ScriptedServer, connect: Connect) -> Caller:
    """A client of a scripted server that is up."""
    return connect(server.start())


@pytest.fixture
def reserved() -> Iterator[str]:
    """An address at which nobody listens, and that nobody but this test can get."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}"


@pytest.fixture
def fail() -> type[Fail]:
    return Fail


@pytest.fixture
def stream() -> type[Stream]:
    return Stream


@pytest.fixture
def methods() -> Mapping[str, MethodDescriptor]:
    """Every method of the contract, by its path."""
    return METHODS
