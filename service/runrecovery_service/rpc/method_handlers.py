"""The methods of every service that the server answers, wrapped, and as gRPC's handlers."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, Final

import grpc
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor, ServiceDescriptor
from google.protobuf.descriptor_pb2 import MethodOptions
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from runrecovery.v1 import recovery_service_pb2, run_service_pb2

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc import standard_handlers
from runrecovery_service.rpc.callers import CallerGuard
from runrecovery_service.rpc.gate import Access
from runrecovery_service.rpc.health import HealthServicer
from runrecovery_service.rpc.method_roles import role_of
from runrecovery_service.rpc.method_wrapper import Context, Method, MethodWrapper
from runrecovery_service.rpc.open_calls import OpenCalls
from runrecovery_service.rpc.reflection import V1, V1ALPHA, ReflectionServicer
from runrecovery_service.rpc.trace_context import TRACED, with_trace

RUN_SERVICE: Final = run_service_pb2.DESCRIPTOR.services_by_name["RunService"]
RECOVERY_SERVICE: Final = recovery_service_pb2.DESCRIPTOR.services_by_name["RecoveryService"]
HEALTH: Final = health_pb2.DESCRIPTOR.services_by_name["Health"]
ALWAYS_OPEN: Final = frozenset(
    {"GetRecoveryStatus", "GetInstances", "ListReconciliations", "GetReconciliation"}
)
"""Methods of RecoveryService that answer in every state of the service."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContractMethod:
    """A method of the contract, wrapped. gRPC and HTTP call the same `handle`.

    Attributes:
        path: the full name, for example `runrecovery.v1.RunService/GetRun`.
        is_read: the contract marks the method as free of side effects.
        is_stream: `handle` writes its responses to the context, and returns None.
        may_call: returns whether `handle` would admit the caller. It needs no request.
    """

    path: str
    request: type[Message]
    response: type[Message]
    is_read: bool
    is_stream: bool
    handle: Callable[[bytes, Context], Awaitable[Any]]
    may_call: Callable[[Context], bool]


def contract_methods(
    service: ServiceDescriptor, servicer: object, wrapper: MethodWrapper
) -> tuple[ContractMethod, ...]:
    """Return the wrapped methods of a service of the contract.

    The servicer needs a method in snake case for each name in the contract. A missing method raises
    AttributeError here, at the start.
    """
    return tuple(
        _contract_method(described, getattr(servicer, _to_snake_case(described.name)), wrapper)
        for described in service.methods
    )


def grpc_handlers(methods: Iterable[ContractMethod]) -> grpc.GenericRpcHandler:
    """Return methods of the contract as gRPC's handlers."""
    # No (de)serializers: the wrapper parses and serializes, so that it also maps their errors.
    found: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        f"/{method.path}": (
            grpc.unary_stream_rpc_method_handler(method.handle)
            if method.is_stream
            else grpc.unary_unary_rpc_method_handler(method.handle)
        )
        for method in methods
    }
    return _Handlers(found)


class _Handlers(grpc.GenericRpcHandler):
    """Finds handlers by the path of a call."""

    def __init__(self, found: Mapping[str, grpc.RpcMethodHandler[bytes, bytes]]) -> None:
        self._found = found

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, bytes] | None:
        """Return the handler of a call; None: another handler may know its method."""
        return self._found.get(handler_call_details.method)


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
    """Return the handlers of reflection v1 and v1alpha, which share one servicer."""

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


def _contract_method(
    described: MethodDescriptor, answer: Callable[..., Any], wrapper: MethodWrapper
) -> ContractMethod:
    role = role_of(described.full_name)
    if role is None:
        raise LookupError(f"{described.full_name} needs a role in rpc/method_roles.py")
    request = message_factory.GetMessageClass(described.input_type)
    method = Method(
        name=described.full_name, role=role, access=access_of(described), request=request
    )
    handle: Callable[[bytes, Context], Awaitable[Any]]
    if described.server_streaming:
        handle = wrapper.stream(method, answer)
    else:
        handle = wrapper.unary(method, answer)
        if described.name in TRACED:
            handle = with_trace(handle)
    return ContractMethod(
        path=f"{described.containing_service.full_name}/{described.name}",
        request=request,
        response=message_factory.GetMessageClass(described.output_type),
        is_read=_is_read(described),
        is_stream=described.server_streaming,
        handle=handle,
        may_call=partial(wrapper.may_call, method),
    )


def access_of(described: MethodDescriptor) -> Access:
    """Return the access of a method; READ for methods that the contract marks as such."""
    if described.name in ALWAYS_OPEN:
        return Access.ALWAYS
    return Access.READ if _is_read(described) else Access.MUTATION


def _is_read(described: MethodDescriptor) -> bool:
    return bool(described.GetOptions().idempotency_level == MethodOptions.NO_SIDE_EFFECTS)


def _to_snake_case(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
