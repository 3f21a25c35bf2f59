"""The gRPC server: registers every service, listens, is replaced if it dies, and stops."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import grpc
import structlog
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from runrecovery.v1 import recovery_service_pb2, run_service_pb2

from runrecovery_service.domain.start_errors import ThreadsRefused
from runrecovery_service.rpc import standard_handlers
from runrecovery_service.rpc.call_meter import CallMeter
from runrecovery_service.rpc.callers import CallerGuard
from runrecovery_service.rpc.gate import Access, Gate
from runrecovery_service.rpc.health import HealthServicer
from runrecovery_service.rpc.listen_address import Holder, ListenAddress, parse_listen_address
from runrecovery_service.rpc.method_wrapper import Method, MethodWrapper
from runrecovery_service.rpc.open_calls import OpenCalls
from runrecovery_service.rpc.recovery_service import RecoveryDeps, RecoveryService
from runrecovery_service.rpc.reflection import V1, V1ALPHA, ReflectionServicer
from runrecovery_service.rpc.roles import role_of
from runrecovery_service.rpc.run_service import RunDeps, RunService
from runrecovery_service.rpc.server_sockets import ServerSockets
from runrecovery_service.rpc.tls import ServerTls
from runrecovery_service.rpc.trace_context import TRACED, with_trace

if TYPE_CHECKING:  # not imported where traces are off
    from runrecovery_service.rpc.call_tracer import CallTracer

RUN_SERVICE: Final = run_service_pb2.DESCRIPTOR.services_by_name["RunService"]
RECOVERY_SERVICE: Final = recovery_service_pb2.DESCRIPTOR.services_by_name["RecoveryService"]
HEALTH: Final = health_pb2.DESCRIPTOR.services_by_name["Health"]
ALWAYS_OPEN: Final = frozenset({"GetRecoveryStatus", "ListReconciliations", "GetReconciliation"})
"""Methods of RecoveryService that answer in every state of the service."""

HANDSHAKE_S: Final = 20.0
"""A new connection that has not finished its handshake after this time is closed."""
MAX_WATCHES_PER_CONNECTION: Final = 1_000
CALLS_PER_CONNECTION: Final = 100
"""How many calls one connection may have beside its watches. Further calls wait in the client."""
KEEPALIVE_MS: Final = 60_000
"""A connection that was silent for this long is pinged."""
KEEPALIVE_TIMEOUT_MS: Final = 20_000
"""A connection whose ping is not answered within this time is closed."""
MIN_PING_INTERVAL_MS: Final = 9_000
"""Clients that ping more often are disconnected. The docs allow a ping every 10 s; the margin is
for pings that are delayed on their way. The Python client pings every 30 s."""

IDLE_S: Final = 300.0
PROBE_REQUEST_BYTES: Final = 4096
"""A health request has a name."""
PROBE_CALLS_PER_CONNECTION: Final = 4
PROBE_IDLE_S: Final = 5.0
PROBE_MAX_AGE_S: Final = 10.0
"""A probe connects, calls and leaves. One that stays would take the place of the next probe."""

CHECK_INTERVAL_S: Final = 0.2
"""How often the server is checked for having ended by itself."""
STOP_CHECK_S: Final = 0.01
"""How often a server that stops is checked."""
FLUSH_S: Final = 0.05
"""Time for gRPC to send the last responses before the connections are closed."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Limits of the server.

    Attributes:
        stall_s: a stream is closed when its reader has taken nothing for this many seconds.
        max_connections: concurrent connections.
        idle_s: a connection without calls is closed after this many seconds.
        handshake_s: a connection without a finished handshake is closed after this many seconds.
        calls_per_connection: calls and streams of one connection at one time. None: from the limit
            of streams.
        max_age_s: every connection is closed after this many seconds. None: it may stay.
    """

    max_concurrent_calls: int
    max_concurrent_streams: int
    stall_s: float
    max_request_bytes: int
    max_connections: int = 10_000
    idle_s: float = IDLE_S
    handshake_s: float = HANDSHAKE_S
    calls_per_connection: int | None = None
    max_age_s: float | None = None


class GrpcServer:
    """The gRPC server of one start, replaced by a new one if it dies. Use it on the event loop.

    A call whose path is not UTF-8 ends the server of grpc.aio (seen in grpcio 1.85): it closes its
    port for good, while the process keeps running. Anybody who reaches the port could do that, so a
    new server takes its place within `CHECK_INTERVAL_S`; callers see UNAVAILABLE and retry. A
    server whose Unix socket file was removed is replaced as well.
    """

    def __init__(
        self,
        build: Callable[[], grpc.aio.Server],
        calls: OpenCalls,
        *,
        gate: Gate | None = None,
        tls: ServerTls | None = None,
        guard: CallerGuard | None = None,
    ) -> None:
        """Make the server; it does not listen yet.

        Args:
            calls: the calls that a stop waits for.
            gate: is informed whether the address is the service's. None: nothing is.
            tls: None: connections are not encrypted.
            guard: logs at a stop which calls it has refused.
        """
        self._build = build
        self._guard = guard
        self._tls = tls
        self._gate = gate
        self._calls = calls
        self._server = build()
        self._sockets: ServerSockets | None = None
        self._address: ListenAddress | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._spare: int | None = None
        self._holder_unknown = False
        self._last_replace_error = ""

    async def bind(
        self, listen: str, *, keeper_ended: Callable[[asyncio.Task[None]], None] | None = None
    ) -> int:
        """Listen on the address and answer from now on; return the port.

        Args:
            keeper_ended: called when the task that keeps the server reachable has ended.

        Raises:
            ListenFailed: the address is taken or not permitted.
        """
        address = parse_listen_address(listen)
        port = await self._start(address)
        self._keeper = asyncio.create_task(self._watch_server(address))
        if keeper_ended is not None:
            self._keeper.add_done_callback(keeper_ended)
        # Reserved for the stop, which needs a descriptor to list the sockets.
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        return port

    async def stop(self, *, grace_s: float) -> None:
        """Refuse new connections, wait up to `grace_s` seconds for open calls, and close.

        Calls on open connections are answered until then. No call gets CANCELLED.
        """
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        try:
            if self._keeper is not None:
                self._keeper.cancel()
                await asyncio.gather(self._keeper, return_exceptions=True)
                # A server that has just ended by itself has no calls left.
                if await self._wait_for_end(STOP_CHECK_S) is None:
                    await self._finish_calls(grace_s)
        finally:
            try:
                await self._end()
            finally:
                if self._guard is not None:
                    self._guard.log_refusals()
                if self._address is not None:
                    self._address.release()

    async def _finish_calls(self, grace_s: float) -> None:
        if self._sockets is not None:
            self._sockets.stop_listening()
        deadline = asyncio.get_running_loop().time() + grace_s
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                await self._calls.wait_until_none()
        await asyncio.sleep(FLUSH_S)
        if self._sockets is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(deadline):
                    await self._sockets.wait_until_sent()

    async def _end(self) -> None:
        """Close the connections, then gRPC's server.

        In this order: a closing gRPC server answers every call that reaches it with CANCELLED.
        """
        try:
            if self._sockets is not None:
                await self._sockets.close_connections()
        finally:
            await self._server.stop(None)

    async def _start(self, address: ListenAddress) -> int:
        port, self._sockets = await address.bind(self._bind_port)
        self._address = address
        await self._server.start()
        return port

    def _bind_port(self, address: str) -> int:
        if self._tls is None:
            return self._server.add_insecure_port(address)
        return self._server.add_secure_port(address, self._tls.credentials())

    async def _watch_server(self, address: ListenAddress) -> None:
        """Watch the server. When it ended by itself or lost its address, replace it."""
        while True:
            error = await self._wait_for_end(CHECK_INTERVAL_S)
            if error is not None:
                log.error("rpc.server_ended", error=f"{type(error).__name__}: {error}")
            elif not self._must_replace(self._holder(address)):
                continue
            with suppress(Exception):  # it has ended already; only the new server matters
                await self._end()
            while not await self._replace(address):  # noqa: ASYNC110 - there is no event to wait for
                await asyncio.sleep(CHECK_INTERVAL_S)

    def _holder(self, address: ListenAddress) -> Holder:
        """Return which process has the address; OURS while that cannot be determined."""
        try:
            holder = address.holder()
        except OSError as error:
            if not self._holder_unknown:
                log.warning("rpc.address_not_seen", error=error.strerror)
            self._holder_unknown = True
            return Holder.OURS
        self._holder_unknown = False
        return holder

    def _must_replace(self, holder: Holder) -> bool:
        """Return whether the server must be replaced because nobody has its address.

        When another process has the address, a new server could not bind it. Health is then
        NOT_SERVING for connected callers until the address is free again.
        """
        if holder is Holder.NOBODY:
            log.error("rpc.address_lost", holder="nobody")
        elif self._gate is not None:
            if holder is Holder.ANOTHER and self._gate.listens:
                log.error("rpc.address_lost", holder="another service")
            self._gate.set_listens(listens=holder is not Holder.ANOTHER)
        return holder is Holder.NOBODY

    async def _wait_for_end(self, seconds: float) -> Exception | None:
        """Return the error that ended the server; None when it still runs after this time."""
        try:
            await self._server.wait_for_termination(seconds)
        except Exception as error:  # noqa: BLE001 - after any error the server answers nobody
            return error
        return None

    async def _replace(self, address: ListenAddress) -> bool:
        self._server = self._build()
        try:
            await self._start(address)
        except Exception as error:  # noqa: BLE001 - otherwise the service would never listen again
            if str(error) != self._last_replace_error:
                self._last_replace_error = str(error)
                log.error("rpc.server_not_replaced", error=str(error))  # noqa: TRY400 - one line without a traceback
            await self._server.stop(None)  # it may have bound a part of the address
            return False
        self._last_replace_error = ""
        log.warning("rpc.server_replaced")
        return True


def start_grpc() -> None:
    """Start the thread of gRPC that every server of this process needs. Call it on the event loop.

    Without this call the first server starts the thread, and ends the process with a segmentation
    fault when the system refuses it (seen in grpcio 1.85).

    Raises:
        ThreadsRefused: the system refuses the thread.
    """
    try:
        grpc.aio.init_grpc_aio()
    except RuntimeError as error:
        raise ThreadsRefused(str(error)) from error


def build_server(
    gate: Gate,
    *,
    run_deps: RunDeps,
    recovery_deps: RecoveryDeps,
    limits: ServerLimits,
    tls: ServerTls | None = None,
    guard: CallerGuard | None = None,
    public_reflection: bool = False,
    meter: CallMeter | None = None,
    tracer: CallTracer | None = None,
) -> GrpcServer:
    """Return the server with every service; it does not listen yet.

    Args:
        tls: None: connections are not encrypted.
        guard: admits callers; None: everyone may call everything.
        public_reflection: reflection needs no caller.
        meter, tracer: of the calls of the contract; None: metrics or traces are off.
    """
    wrapper = MethodWrapper(
        gate,
        max_calls=limits.max_concurrent_calls,
        max_streams=limits.max_concurrent_streams,
        stall_s=limits.stall_s,
        guard=guard,
        meter=meter,
        tracer=tracer,
    )
    services = (RUN_SERVICE.full_name, RECOVERY_SERVICE.full_name, HEALTH.full_name)
    all_handlers = (
        handlers(RUN_SERVICE, RunService(run_deps, gate), wrapper),
        handlers(RECOVERY_SERVICE, RecoveryService(recovery_deps, gate), wrapper),
        health_handlers(HealthServicer(gate), wrapper.calls),
        *reflection_handlers(
            ReflectionServicer(services, gate),
            wrapper.calls,
            guard=None if public_reflection else guard,
        ),
    )

    def build() -> grpc.aio.Server:
        server = grpc.aio.server(options=_options(limits))
        server.add_generic_rpc_handlers(all_handlers)
        return server

    return GrpcServer(build, wrapper.calls, gate=gate, tls=tls, guard=guard)


def build_probe_server(gate: Gate, *, max_connections: int) -> GrpcServer:
    """Return a server that answers health checks only, in plaintext; it does not listen yet.

    It has no Watch, and closes each connection after `PROBE_MAX_AGE_S`.
    """
    calls, limits = OpenCalls(), probe_limits(max_connections)

    def build() -> grpc.aio.Server:
        server = grpc.aio.server(options=_options(limits))
        # A watch stays open, so a few of them would use up the connections that probes need.
        server.add_generic_rpc_handlers(
            (health_handlers(HealthServicer(gate), calls, watch=False),)
        )
        return server

    return GrpcServer(build, calls)


def probe_limits(max_connections: int) -> ServerLimits:
    """Return the limits of a server that is probed."""
    return ServerLimits(
        max_concurrent_calls=max_connections,
        max_concurrent_streams=max_connections,
        stall_s=PROBE_IDLE_S,
        max_request_bytes=PROBE_REQUEST_BYTES,
        max_connections=max_connections,
        idle_s=PROBE_IDLE_S,
        handshake_s=PROBE_IDLE_S,
        calls_per_connection=PROBE_CALLS_PER_CONNECTION,
        max_age_s=PROBE_MAX_AGE_S,
    )


def handlers(
    service: ServiceDescriptor, servicer: object, wrapper: MethodWrapper
) -> grpc.GenericRpcHandler:
    """Return the wrapped methods of a service of the contract.

    The servicer needs a method in snake case for each name in the contract. A missing method raises
    AttributeError here, at the start.
    """
    return grpc.method_handlers_generic_handler(
        service.full_name,
        {
            described.name: _handler(
                described, getattr(servicer, _to_snake_case(described.name)), wrapper
            )
            for described in service.methods
        },
    )


def health_handlers(
    servicer: HealthServicer, calls: OpenCalls, *, watch: bool = True
) -> grpc.GenericRpcHandler:
    """Return the methods of grpc.health.v1.Health, with or without Watch."""
    check, named = health_pb2.HealthCheckRequest, health_pb2.HealthListRequest
    found = {
        "Check": standard_handlers.unary(calls, check, servicer.Check),
        "List": standard_handlers.unary(calls, named, servicer.List),
    }
    if watch:
        found["Watch"] = standard_handlers.stream(calls, check, servicer.Watch)
    return grpc.method_handlers_generic_handler(HEALTH.full_name, found)


def reflection_handlers(
    servicer: ReflectionServicer, calls: OpenCalls, *, guard: CallerGuard | None = None
) -> tuple[grpc.GenericRpcHandler, ...]:
    """Return the one servicer under the names of both versions."""

    def handler(version: str) -> grpc.RpcMethodHandler[bytes, bytes]:
        return standard_handlers.bidirectional_stream(
            calls,
            reflection_pb2.ServerReflectionRequest,
            servicer.ServerReflectionInfo,
            guard=guard,
            method=f"{version}.ServerReflectionInfo",
        )

    return tuple(
        grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler(name)})
        for name in (V1, V1ALPHA)
    )


def _handler(
    described: MethodDescriptor, answer: Callable[..., Any], wrapper: MethodWrapper
) -> grpc.RpcMethodHandler[bytes, bytes]:
    role = role_of(described.full_name)
    if role is None:
        raise LookupError(f"{described.full_name} needs a role in rpc/roles.py")
    method = Method(
        name=described.full_name,
        role=role,
        access=access_of(described),
        request=message_factory.GetMessageClass(described.input_type),
    )
    # No (de)serializers: the wrapper parses and serializes, so that it also maps their errors.
    if described.server_streaming:
        return grpc.unary_stream_rpc_method_handler(wrapper.stream(method, answer))
    handler = wrapper.unary(method, answer)
    if described.name in TRACED:
        handler = with_trace(handler)
    return grpc.unary_unary_rpc_method_handler(handler)


def access_of(described: MethodDescriptor) -> Access:
    """Return when a method may be called; READ for methods that the contract marks as such."""
    if described.name in ALWAYS_OPEN:
        return Access.ALWAYS
    if described.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS:
        return Access.READ
    return Access.MUTATION


def _to_snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _options(limits: ServerLimits) -> tuple[tuple[str, int], ...]:
    calls = limits.calls_per_connection
    if calls is None:
        watches = min(limits.max_concurrent_streams, MAX_WATCHES_PER_CONNECTION)
        calls = watches + CALLS_PER_CONNECTION
    age = (
        ()
        if limits.max_age_s is None
        else (
            ("grpc.max_connection_age_ms", int(limits.max_age_s * 1000)),
            ("grpc.max_connection_age_grace_ms", int(limits.idle_s * 1000)),
        )
    )
    return (
        # By default a second server silently shares a taken port.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        # A larger request gets RESOURCE_EXHAUSTED from gRPC itself, without details.
        ("grpc.max_receive_message_length", limits.max_request_bytes),
        # Further connections are closed at once, so that descriptors remain for runs and database.
        ("grpc.max_allowed_incoming_connections", limits.max_connections),
        ("grpc.server_handshake_timeout_ms", int(limits.handshake_s * 1000)),
        # gRPC receives requests before the service sees a token: unfinished ones take memory.
        ("grpc.max_concurrent_streams", calls),
        # Idle connections and those of dead callers would use up max_connections.
        ("grpc.max_connection_idle_ms", int(limits.idle_s * 1000)),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.max_pings_without_data", 0),  # a watch may be silent without a limit
        *age,
    )
