"""Builds the methods of the contract, and the gRPC servers: for callers, and for probes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import grpc

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc.call_meter import CallMeter
from runrecovery_service.rpc.callers import CallerGuard
from runrecovery_service.rpc.certificate_reload import ServerTls
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.health import HealthServicer
from runrecovery_service.rpc.method_handlers import (
    HEALTH,
    RECOVERY_SERVICE,
    RUN_SERVICE,
    ContractMethod,
    contract_methods,
    grpc_handlers,
    health_handlers,
    reflection_handlers,
)
from runrecovery_service.rpc.method_wrapper import MethodWrapper
from runrecovery_service.rpc.open_calls import OpenCalls
from runrecovery_service.rpc.recovery_service import RecoveryDeps, RecoveryService
from runrecovery_service.rpc.reflection import ReflectionServicer
from runrecovery_service.rpc.run_service import RunDeps, RunService
from runrecovery_service.rpc.server import GrpcServer
from runrecovery_service.rpc.server_limits import ServerLimits, probe_limits, server_options

if TYPE_CHECKING:  # not imported where traces are off
    from runrecovery_service.rpc.call_tracer import CallTracer


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """The methods of the contract. All servers share their limits, callers and counts.

    Attributes:
        methods: the methods by path, for example `runrecovery.v1.RunService/GetRun`.
        calls: the calls in progress, of every server.
    """

    methods: Mapping[str, ContractMethod]
    calls: OpenCalls


def build_contract(
    gate: Gate,
    *,
    run_deps: RunDeps,
    recovery_deps: RecoveryDeps,
    limits: ServerLimits,
    guard: CallerGuard | None = None,
    meter: CallMeter | None = None,
    tracer: CallTracer | None = None,
) -> Contract:
    """Return the methods of the contract.

    Args:
        guard: admits callers; None: everyone may call everything.
        meter, tracer: count the calls, and report them as spans; None: metrics or traces are off.
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
    methods = (
        *contract_methods(RUN_SERVICE, RunService(run_deps, gate), wrapper),
        *contract_methods(RECOVERY_SERVICE, RecoveryService(recovery_deps, gate), wrapper),
    )
    return Contract(methods={method.path: method for method in methods}, calls=wrapper.calls)


def build_server(
    gate: Gate,
    contract: Contract,
    *,
    limits: ServerLimits,
    tls: ServerTls | None = None,
    guard: CallerGuard | None = None,
    public_reflection: bool = False,
) -> GrpcServer:
    """Return the server with every service; it does not listen yet.

    Args:
        tls: None: connections are not encrypted.
        guard: admits callers of reflection, and logs what it refused; None: everyone may call.
        public_reflection: reflection needs no caller.
    """
    services = (RUN_SERVICE.full_name, RECOVERY_SERVICE.full_name, HEALTH.full_name)
    all_handlers = (
        grpc_handlers(contract.methods.values()),
        health_handlers(HealthServicer(gate), contract.calls),
        *reflection_handlers(
            ReflectionServicer(services, gate),
            contract.calls,
            guard=None if public_reflection else guard,
        ),
    )

    def build() -> grpc.aio.Server:
        server = grpc.aio.server(options=server_options(limits))
        server.add_generic_rpc_handlers(all_handlers)
        return server

    return GrpcServer(build, contract.calls, gate=gate, tls=tls, guard=guard)


def build_probe_server(gate: Gate, *, max_connections: int) -> GrpcServer:
    """Return a server that answers health checks only, in plaintext; it does not listen yet.

    It has no Watch, and closes each connection after `PROBE_MAX_AGE_S`.
    """
    calls, limits = OpenCalls(), probe_limits(max_connections)

    def build() -> grpc.aio.Server:
        server = grpc.aio.server(options=server_options(limits))
        # A watch stays open, so a few of them would use up the connections that probes need.
        server.add_generic_rpc_handlers(
            (health_handlers(HealthServicer(gate), calls, watch=False),)
        )
        return server

    return GrpcServer(build, calls)
