"""grpc.health.v1, computed at each request from the state of the service (`gate.py`).

`storage_health.py` decides when the database counts as answering, and `rpc/server.py` when the
address counts as the service's.

| name | SERVING when |
|---|---|
| `""`, `runrecovery.v1.RunService` | state SERVING, the database answers, the address is ours |
| `runrecovery.v1.RecoveryService` | not draining, the database answers, the address is ours |
| `liveness` | always: the process answers |
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import grpc
from grpc_health.v1 import health_pb2 as pb

from runrecovery_service.rpc.gate import Gate, ServiceState

# The package ships no types for mypy.
Status: TypeAlias = Any
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_SERVING: Final = pb.HealthCheckResponse.SERVING
_NOT_SERVING: Final = pb.HealthCheckResponse.NOT_SERVING
_UNKNOWN: Final = pb.HealthCheckResponse.SERVICE_UNKNOWN


def _run_service_serves(gate: Gate) -> bool:
    return gate.state is ServiceState.SERVING and gate.storage_answers and gate.listens


def _recovery_service_serves(gate: Gate) -> bool:
    return not gate.draining and gate.storage_answers and gate.listens


NAMES: Final[Mapping[str, Callable[[Gate], bool]]] = MappingProxyType(
    {
        "": _run_service_serves,
        "runrecovery.v1.RunService": _run_service_serves,
        "runrecovery.v1.RecoveryService": _recovery_service_serves,
        "liveness": lambda _: True,
    }
)
"""Every health name, and when it is SERVING."""


class HealthServicer:
    """The methods of grpc.health.v1.Health."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802 - gRPC's name
        """Return the status of one name; abort with NOT_FOUND for an unknown name."""
        status = self._status(request.service)
        if status == _UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown health name")
        return pb.HealthCheckResponse(status=status)

    async def List(self, _request: Any, _context: Context) -> Any:  # noqa: N802 - gRPC's name
        """Return every name with its status."""
        response = pb.HealthListResponse()
        for name in NAMES:
            response.statuses[name].status = self._status(name)
        return response

    async def Watch(  # noqa: N802 - gRPC's name
        self, request: Any, _context: Context
    ) -> AsyncIterator[Any]:
        """Yield the status now and after each change; end once the service drains.

        The status of an unknown name is SERVICE_UNKNOWN, and the stream stays open, as the health
        protocol says.
        """
        sent: Status = None
        while True:
            change = self._gate.change
            draining = self._gate.draining
            status = self._status(request.service)
            if status != sent:
                yield pb.HealthCheckResponse(status=status)
                sent = status
            if draining:
                return
            await change.wait()

    def _status(self, name: str) -> Status:
        serving = NAMES.get(name)
        if serving is None:
            return _UNKNOWN
        return _SERVING if serving(self._gate) else _NOT_SERVING
