"""The gRPC server: every service registered, every method behind the guard."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from runrecovery.v1 import recovery_service_pb2, run_service_pb2

from runrecovery_service.rpc.gate import Access, Gate
from runrecovery_service.rpc.guard import Guard, Method
from runrecovery_service.rpc.health import HealthServicer
from runrecovery_service.rpc.recovery_service import RecoveryRooms, RecoveryService
from runrecovery_service.rpc.reflection import V1, V1ALPHA, ReflectionServicer
from runrecovery_service.rpc.run_service import RunRooms, RunService

RUN_SERVICE: Final = run_service_pb2.DESCRIPTOR.services_by_name["RunService"]
RECOVERY_SERVICE: Final = recovery_service_pb2.DESCRIPTOR.services_by_name["RecoveryService"]
ALWAYS_OPEN: Final = frozenset({"GetRecoveryStatus", "ListReconciliations", "GetReconciliation"})
"""Methods of RecoveryService that answer whatever the service is doing."""

MIN_PING_INTERVAL_MS: Final = 10_000
"""Clients that ping more often are cut off; ours pings every 30 s."""


class ListenFailed(OSError):
    """The address cannot be listened on: taken, not ours, or not an address."""

    def __init__(self, listen: str) -> None:
        super().__init__(f"cannot listen on {listen}: taken, not permitted, or not an address")
        self.listen = listen


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What the server takes: calls at one time, and bytes of one request."""

    max_concurrent_calls: int
    max_request_bytes: int


class GrpcServer:
    """The server of one start. Build and use it on the event loop."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    async def bind(self, listen: str) -> int:
        """Listen on `host:port` and answer from now on; return the port (for port 0: which).

        Raises:
            ListenFailed: somebody else listens there, or nobody may.
        """
        try:
            port = self._server.add_insecure_port(listen)
        except RuntimeError:  # all that grpc says
            raise ListenFailed(listen) from None
        if not port:
            raise ListenFailed(listen)
        await self._server.start()
        return port

    async def stop(self, *, grace_s: float) -> None:
        """Take no more calls, and end those under way after `grace_s` seconds at the latest."""
        await self._server.stop(grace_s)


def build_server(
    gate: Gate, *, run_rooms: RunRooms, recovery_rooms: RecoveryRooms, limits: ServerLimits
) -> GrpcServer:
    """Return the server with every service on it; it listens nowhere yet."""
    server = grpc.aio.server(options=_options(limits))
    guard = Guard(gate, max_calls=limits.max_concurrent_calls)
    server.add_generic_rpc_handlers(
        (
            handlers(RUN_SERVICE, RunService(run_rooms, gate), guard),
            handlers(RECOVERY_SERVICE, RecoveryService(recovery_rooms, gate), guard),
        )
    )
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(gate), server)
    health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    services = (RUN_SERVICE.full_name, RECOVERY_SERVICE.full_name, health)
    server.add_generic_rpc_handlers(reflection_handlers(ReflectionServicer(services, gate)))
    return GrpcServer(server)


def handlers(service: ServiceDescriptor, servicer: object, guard: Guard) -> grpc.GenericRpcHandler:
    """Return the guarded methods of a service of ours.

    The servicer has a method of each name in the contract, in snake case; a missing one fails
    here, at the start.
    """
    return grpc.method_handlers_generic_handler(
        service.full_name,
        {
            described.name: _handler(described, getattr(servicer, _snake(described.name)), guard)
            for described in service.methods
        },
    )


def reflection_handlers(
    servicer: ReflectionServicer,
) -> tuple[grpc.GenericRpcHandler, ...]:
    """Return the one servicer under the names of both versions."""
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    return tuple(
        grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": handler})
        for name in (V1, V1ALPHA)
    )


def _handler(
    described: MethodDescriptor, answer: Callable[..., Any], guard: Guard
) -> grpc.RpcMethodHandler[bytes, bytes]:
    method = Method(
        name=described.full_name,
        access=access_of(described),
        request=message_factory.GetMessageClass(described.input_type),
    )
    # No (de)serializers: the guard has them, so that their errors are ours as well.
    if described.server_streaming:
        return grpc.unary_stream_rpc_method_handler(guard.stream(method, answer))
    return grpc.unary_unary_rpc_method_handler(guard.unary(method, answer))


def access_of(described: MethodDescriptor) -> Access:
    """Return when a method may be called; what reads is what the contract marks so."""
    if described.name in ALWAYS_OPEN:
        return Access.ALWAYS
    if described.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS:
        return Access.READ
    return Access.MUTATION


def _snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def _options(limits: ServerLimits) -> tuple[tuple[str, int], ...]:
    return (
        # By default a second server shares a taken port silently.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
        # A larger request gets RESOURCE_EXHAUSTED from gRPC itself, without details.
        ("grpc.max_receive_message_length", limits.max_request_bytes),
    )
