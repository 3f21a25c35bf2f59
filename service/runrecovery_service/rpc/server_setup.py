"""Builds the gRPC servers: the one for callers, and the one for probes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

from runrecovery_service.rpc.call_meter import CallMeter
from runrecovery_service.rpc.callers import CallerGuard
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.health import HealthServicer
from runrecovery_service.rpc.method_handlers import (
    HEALTH,
    RECOVERY_SERVICE,
    RUN_SERVICE,
    handlers,
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
from runrecovery_service.rpc.tls import ServerTls

if TYPE_CHECKING:  # not imported where traces are off
    from runrecovery_service.rpc.call_tracer import CallTracer


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
        server = grpc.aio.server(options=server_options(limits))
        server.add_generic_rpc_handlers(all_handlers)
        return server

    return GrpcServer(build, wrapper.calls, gate=gate, tls=tls, guard=guard)


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
