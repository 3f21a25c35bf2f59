"""grpc.health.v1, computed from the gate at every look: there is no second copy to go stale.

| name | SERVING |
|---|---|
| `""`, `runrecovery.v1.RunService` | recovered, database answers, address is ours, not draining |
| `runrecovery.v1.RecoveryService` | the same, but also during a recovery |
| `liveness` | always: that an answer comes is what it says |
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import grpc
from grpc_health.v1 import health_pb2 as pb

from runrecovery_service.rpc.gate import Gate, ServiceState

# The package ships no types that mypy may see.
Status: TypeAlias = Any
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_SERVING: Final = pb.HealthCheckResponse.SERVING
_NOT_SERVING: Final = pb.HealthCheckResponse.NOT_SERVING
_UNKNOWN: Final = pb.HealthCheckResponse.SERVICE_UNKNOWN


def _serves_runs(gate: Gate) -> bool:
    return gate.state is ServiceState.SERVING and gate.storage_answers and gate.listens


def _tells_of_recovery(gate: Gate) -> bool:
    return not gate.draining and gate.storage_answers and gate.listens


NAMES: Final[Mapping[str, Callable[[Gate], bool]]] = MappingProxyType(
    {
        "": _serves_runs,
        "runrecovery.v1.RunService": _serves_runs,
        "runrecovery.v1.RecoveryService": _tells_of_recovery,
        "liveness": lambda _: True,
    }
)
"""Every name that health knows, and when it is SERVING."""


class HealthServicer:
    """The methods of grpc.health.v1.Health."""

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    async def Check(self, request: Any, context: Context) -> Any:  # noqa: N802 - gRPC's name
        """Return the status of one name; NOT_FOUND for a name that there is not."""
        status = self._status(request.service)
        if status == _UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND, "health does not know this name")
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
        """Yield the status now and after each change; ends once the service drains.

        An unknown name is SERVICE_UNKNOWN and the stream stays open, as the protocol has it.
        """
        told: Status = None
        while True:
            change = self._gate.change
            draining = self._gate.draining
            status = self._status(request.service)
            if status != told:
                yield pb.HealthCheckResponse(status=status)
                told = status
            if draining:
                return
            await change.wait()

    def _status(self, name: str) -> Status:
        serving = NAMES.get(name)
        if serving is None:
            return _UNKNOWN
        return _SERVING if serving(self._gate) else _NOT_SERVING
