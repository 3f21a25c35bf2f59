"""The one table of methods and the role that each needs. `domain/role.py` defines the roles.

The guard reads it, and `docs/generate.py` writes the table of docs/security.md from it. The server
does not start if a method has no row.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from runrecovery_service.domain.role import Role

_RUNS: Final = "runrecovery.v1.RunService"
_RECOVERY: Final = "runrecovery.v1.RecoveryService"

ROLES: Final[Mapping[str, Role | None]] = MappingProxyType(
    {
        f"{_RUNS}.CreateRun": Role.CREATOR,
        f"{_RUNS}.GetRun": Role.VIEWER,
        f"{_RUNS}.ListRuns": Role.VIEWER,
        f"{_RUNS}.WatchRun": Role.VIEWER,
        f"{_RUNS}.SubmitReply": Role.REPLIER,
        f"{_RUNS}.CancelRun": Role.REPLIER,
        f"{_RUNS}.ReopenRun": Role.CREATOR,
        f"{_RUNS}.ListInteractions": Role.VIEWER,
        f"{_RUNS}.StreamOutput": Role.VIEWER,
        f"{_RECOVERY}.GetRecoveryInfo": Role.VIEWER,
        f"{_RECOVERY}.ListRecovered": Role.VIEWER,
        f"{_RECOVERY}.WatchRecovered": Role.VIEWER,
        f"{_RECOVERY}.ExplainRecovery": Role.VIEWER,
        f"{_RECOVERY}.PlanRecovery": Role.OPERATOR,
        f"{_RECOVERY}.GetRecoveryStatus": Role.VIEWER,
        f"{_RECOVERY}.GetInstances": Role.OPERATOR,
        f"{_RECOVERY}.ListReconciliations": Role.OPERATOR,
        f"{_RECOVERY}.GetReconciliation": Role.OPERATOR,
        f"{_RECOVERY}.Prune": Role.OPERATOR,
        f"{_RECOVERY}.ListWebhooks": Role.OPERATOR,
        f"{_RECOVERY}.RetryWebhook": Role.OPERATOR,
        "grpc.reflection.v1.ServerReflection.ServerReflectionInfo": Role.VIEWER,
        "grpc.reflection.v1alpha.ServerReflection.ServerReflectionInfo": Role.VIEWER,
        "grpc.health.v1.Health.Check": None,
        "grpc.health.v1.Health.List": None,
        "grpc.health.v1.Health.Watch": None,
    }
)
"""The least role by full method name; None: the method needs no caller."""


def role_of(method: str) -> Role | None:
    """Return the least role that a method needs; None for a method that needs no caller.

    Raises:
        LookupError: the method has no row.
    """
    if method not in ROLES:
        raise LookupError(f"{method} has no row in rpc/method_roles.py")
    return ROLES[method]
