"""Typed client of runrecovery, for threads and for asyncio.

Quick start:

    from runrecovery import RunRecoveryClient

    with RunRecoveryClient("127.0.0.1:50051") as client:
        client.wait_until_ready(timeout_s=30)
        run = client.runs.create(engine="demo", input={"task": "hello"})
        print(client.wait_for_run(run.run_id, timeout_s=60).status)

`AsyncRunRecoveryClient` has the same methods for asyncio. Results are the generated messages of
`runrecovery.v1`; failed calls raise the classes of `runrecovery.errors`.
"""

from __future__ import annotations

from runrecovery._channel import Tls, channel_options
from runrecovery._requests import Plan, ServingStatus
from runrecovery._values import JsonValue
from runrecovery._waiting import TERMINAL_STATUSES
from runrecovery.aio import AsyncHealth, AsyncRecovery, AsyncRunRecoveryClient, AsyncRuns
from runrecovery.client import Health, Recovery, RunRecoveryClient, Runs
from runrecovery.errors import (
    DeadlineExceeded,
    ErrorDetails,
    EtagMismatch,
    FieldViolation,
    InteractionSuperseded,
    InternalError,
    InvalidRequest,
    NotFound,
    OutputOutOfRange,
    OutputRemoved,
    Overloaded,
    PageTokenInvalid,
    PermissionDenied,
    ReconciliationNotFound,
    RecoveryInProgress,
    RequestIdReused,
    ResourceExhausted,
    RunAlreadyExists,
    RunAlreadyTerminal,
    RunNotFound,
    RunNotReopenable,
    RunNotWaiting,
    RunOfAnotherInstance,
    RunQuarantined,
    RunRecoveryClientError,
    SafeMode,
    SessionNotResumable,
    ShuttingDown,
    SlowReader,
    StorageFull,
    TokenUnusable,
    Unauthenticated,
    Unavailable,
    UnknownEngine,
    UnrecognizedError,
    WatchCursorInvalid,
    WatchGap,
    WatchHistoryPruned,
    WatchSequenceUnknown,
)
from runrecovery.v1.recovery_pb2 import Reconciliation, ReconciliationState, ServiceState
from runrecovery.v1.recovery_service_pb2 import (
    ExplainRecoveryResponse,
    PlannedDecision,
    RecoveryExplanation,
    RecoveryPlan,
    WatchRecoveredResponse,
)
from runrecovery.v1.run_pb2 import (
    Interaction,
    InteractionKind,
    InteractiveProfileKind,
    RecoveryInfo,
    RecoveryState,
    RestartPolicy,
    Run,
    RunEvent,
    RunEventKind,
    RunStatus,
    RunView,
)
from runrecovery.v1.run_service_pb2 import OutputChannel, StreamOutputResponse, WatchRunResponse

__all__ = [
    # clients
    "RunRecoveryClient",
    "AsyncRunRecoveryClient",
    "Runs",
    "AsyncRuns",
    "Recovery",
    "AsyncRecovery",
    "Health",
    "AsyncHealth",
    "channel_options",
    "Tls",
    # values
    "JsonValue",
    "Plan",
    "ServingStatus",
    "TERMINAL_STATUSES",
    # messages and enums of runrecovery.v1
    "Run",
    "RunStatus",
    "RunView",
    "RunEvent",
    "RunEventKind",
    "WatchRunResponse",
    "RestartPolicy",
    "InteractiveProfileKind",
    "Interaction",
    "InteractionKind",
    "OutputChannel",
    "StreamOutputResponse",
    "RecoveryInfo",
    "RecoveryState",
    "WatchRecoveredResponse",
    "ExplainRecoveryResponse",
    "RecoveryExplanation",
    "RecoveryPlan",
    "PlannedDecision",
    "Reconciliation",
    "ReconciliationState",
    "ServiceState",
    # errors
    "RunRecoveryClientError",
    "ErrorDetails",
    "FieldViolation",
    "NotFound",
    "RunNotFound",
    "ReconciliationNotFound",
    "InvalidRequest",
    "UnknownEngine",
    "PageTokenInvalid",
    "WatchCursorInvalid",
    "RunAlreadyExists",
    "RequestIdReused",
    "RunNotWaiting",
    "RunOfAnotherInstance",
    "InteractionSuperseded",
    "RunAlreadyTerminal",
    "RunQuarantined",
    "RunNotReopenable",
    "SessionNotResumable",
    "EtagMismatch",
    "OutputOutOfRange",
    "OutputRemoved",
    "WatchHistoryPruned",
    "WatchSequenceUnknown",
    "WatchGap",
    "Unavailable",
    "RecoveryInProgress",
    "ShuttingDown",
    "SafeMode",
    "ResourceExhausted",
    "Overloaded",
    "StorageFull",
    "SlowReader",
    "Unauthenticated",
    "TokenUnusable",
    "PermissionDenied",
    "DeadlineExceeded",
    "InternalError",
    "UnrecognizedError",
]
