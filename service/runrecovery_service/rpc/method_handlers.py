"""The methods of every service that the server answers, as gRPC's handlers."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Final

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from runrecovery.v1 import recovery_service_pb2, run_service_pb2

from runrecovery_service.rpc import standard_handlers
from runrecovery_service.rpc.callers import CallerGuard
from runrecovery_service.rpc.gate import Access
from runrecovery_service.rpc.health import HealthServicer
from runrecovery_service.rpc.method_wrapper import Method, MethodWrapper
from runrecovery_service.rpc.open_calls import OpenCalls
from runrecovery_service.rpc.reflection import V1, V1ALPHA, ReflectionServicer
from runrecovery_service.rpc.roles import role_of
from runrecovery_service.rpc.trace_context import TRACED, with_trace

RUN_SERVICE: Final = run_service_pb2.DESCRIPTOR.services_by_name["RunService"]
RECOVERY_SERVICE: Final = recovery_service_pb2.DESCRIPTOR.services_by_name["RecoveryService"]
HEALTH: Final = health_pb2.DESCRIPTOR.services_by_name["Health"]
ALWAYS_OPEN: Final = frozenset(
    {"GetRecoveryStatus", "GetInstances", "ListReconciliations", "GetReconciliation"}
)
"""Methods of RecoveryService that answer in every state of the service."""


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
    """Return the access of a method; READ for methods that the contract marks as such."""
    if described.name in ALWAYS_OPEN:
        return Access.ALWAYS
    if described.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS:
        return Access.READ
    return Access.MUTATION


def _to_snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
