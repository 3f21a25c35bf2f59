"""Callers of tests: tokens that are long enough, and their tables of the configuration."""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Final

from runrecovery_service.domain.caller import Caller, Credentials
from runrecovery_service.domain.role import Role

ROLES: Final = ("viewer", "replier", "creator", "operator")
RUNS, RECOVERY = "runrecovery.v1.RunService", "runrecovery.v1.RecoveryService"
REFLECTION: Final = (
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
)
EXPECTED: Final = {
    f"{RUNS}/CreateRun": ("creator", "operator"),
    f"{RUNS}/GetRun": ROLES,
    f"{RUNS}/ListRuns": ROLES,
    f"{RUNS}/WatchRun": ROLES,
    f"{RUNS}/SubmitReply": ("replier", "creator", "operator"),
    f"{RUNS}/CancelRun": ("replier", "creator", "operator"),
    f"{RUNS}/ReopenRun": ("creator", "operator"),
    f"{RUNS}/ListInteractions": ROLES,
    f"{RUNS}/StreamOutput": ROLES,
    f"{RECOVERY}/GetRecoveryInfo": ROLES,
    f"{RECOVERY}/ListRecovered": ROLES,
    f"{RECOVERY}/WatchRecovered": ROLES,
    f"{RECOVERY}/ExplainRecovery": ROLES,
    f"{RECOVERY}/PlanRecovery": ("operator",),
    f"{RECOVERY}/GetRecoveryStatus": ROLES,
    f"{RECOVERY}/GetInstances": ("operator",),
    f"{RECOVERY}/ListReconciliations": ("operator",),
    f"{RECOVERY}/GetReconciliation": ("operator",),
    f"{RECOVERY}/Prune": ("operator",),
    f"{RECOVERY}/ListWebhooks": ("operator",),
    f"{RECOVERY}/RetryWebhook": ("operator",),
    f"{REFLECTION[0]}/ServerReflectionInfo": ROLES,
    f"{REFLECTION[1]}/ServerReflectionInfo": ROLES,
    "grpc.health.v1.Health/Check": ("nobody", "stranger", *ROLES),
    "grpc.health.v1.Health/List": ("nobody", "stranger", *ROLES),
    "grpc.health.v1.Health/Watch": ("nobody", "stranger", *ROLES),
}
"""The roles that may call each method."""


def token_of(name: str) -> str:
    """Return the token of a test's caller; each name has its own."""
    return sha256(f"the token of {name}".encode()).hexdigest()


def digest_of(token: str) -> str:
    """Return what the configuration holds of a token."""
    return sha256(token.encode()).hexdigest()


def caller(name: str, role: str, **more: object) -> dict[str, object]:
    """Return one `[[callers]]` table, by default with the caller's token."""
    known = {"token_sha256", "token_file", "certificate_name"} & more.keys()
    token = {} if known else {"token_sha256": digest_of(token_of(name))}
    return {"name": name, "role": role, **token, **more}


def credentials(name: str, **more: Any) -> Credentials:
    """Return a viewer with its token, or with other tokens, a certificate or limits."""
    return Credentials(
        caller=Caller(
            name=name,
            role=Role.VIEWER,
            max_calls=more.pop("max_calls", None),
            max_calls_per_s=more.pop("max_calls_per_s", None),
        ),
        tokens=more.pop("tokens", (sha256(token_of(name).encode()).digest(),)),
        **more,
    )
