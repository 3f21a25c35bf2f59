"""Enum values of the domain as numbers of the contract, and back."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2

from runrecovery_service.domain.plan import Outcome
from runrecovery_service.domain.reconciliation import Cause, ContainmentLevel, ReconciliationState
from runrecovery_service.domain.run import (
    InteractionKind,
    Profile,
    RecoveryState,
    RestartPolicy,
    RunEventKind,
    RunStatus,
    View,
)
from runrecovery_service.rpc.gate import ServiceState

STATUS_TO_PROTO: Final = MappingProxyType[RunStatus | None, run_pb2.RunStatus.ValueType](
    {
        None: run_pb2.RUN_STATUS_UNSPECIFIED,
        RunStatus.QUEUED: run_pb2.RUN_STATUS_QUEUED,
        RunStatus.RUNNING: run_pb2.RUN_STATUS_RUNNING,
        RunStatus.WAITING_USER: run_pb2.RUN_STATUS_WAITING_USER,
        RunStatus.SUCCEEDED: run_pb2.RUN_STATUS_SUCCEEDED,
        RunStatus.FAILED: run_pb2.RUN_STATUS_FAILED,
        RunStatus.CANCELED: run_pb2.RUN_STATUS_CANCELED,
    }
)
"""A quarantined run has no status: None."""

STATUS_FROM_PROTO: Final = MappingProxyType(
    {number: status for status, number in STATUS_TO_PROTO.items() if status is not None}
)

PROFILE_TO_PROTO: Final = MappingProxyType[
    Profile | None, run_pb2.InteractiveProfileKind.ValueType
](
    {
        None: run_pb2.INTERACTIVE_PROFILE_KIND_UNSPECIFIED,
        Profile.RESUMABLE: run_pb2.INTERACTIVE_PROFILE_KIND_RESUMABLE,
        Profile.STICKY_PROCESS: run_pb2.INTERACTIVE_PROFILE_KIND_STICKY_PROCESS,
    }
)

PROFILE_FROM_PROTO: Final = MappingProxyType(
    {number: profile for profile, number in PROFILE_TO_PROTO.items() if profile is not None}
)

RESTART_POLICY_TO_PROTO: Final = MappingProxyType[RestartPolicy, run_pb2.RestartPolicy.ValueType](
    {
        RestartPolicy.FAIL: run_pb2.RESTART_POLICY_FAIL,
        RestartPolicy.REQUEUE: run_pb2.RESTART_POLICY_REQUEUE,
        RestartPolicy.RESUME: run_pb2.RESTART_POLICY_RESUME,
    }
)

RESTART_POLICY_FROM_PROTO: Final = MappingProxyType(
    {number: policy for policy, number in RESTART_POLICY_TO_PROTO.items()}
)

RECOVERY_STATE_TO_PROTO: Final = MappingProxyType[RecoveryState, run_pb2.RecoveryState.ValueType](
    {
        RecoveryState.NONE: run_pb2.RECOVERY_STATE_NONE,
        RecoveryState.RECOVERED_WAITING: run_pb2.RECOVERY_STATE_RECOVERED_WAITING,
        RecoveryState.FAILED_RECONCILED: run_pb2.RECOVERY_STATE_FAILED_RECONCILED,
        RecoveryState.RECOVERED_QUEUED: run_pb2.RECOVERY_STATE_RECOVERED_QUEUED,
        RecoveryState.CANCELED_RECONCILED: run_pb2.RECOVERY_STATE_CANCELED_RECONCILED,
        RecoveryState.QUARANTINED: run_pb2.RECOVERY_STATE_QUARANTINED,
        RecoveryState.REOPENED: run_pb2.RECOVERY_STATE_REOPENED,
        RecoveryState.SUCCEEDED_RECONCILED: run_pb2.RECOVERY_STATE_SUCCEEDED_RECONCILED,
    }
)

RECOVERY_STATE_FROM_PROTO: Final = MappingProxyType(
    {number: state for state, number in RECOVERY_STATE_TO_PROTO.items()}
)

INTERACTION_KIND_TO_PROTO: Final = MappingProxyType[
    InteractionKind | None, run_pb2.InteractionKind.ValueType
](
    {
        None: run_pb2.INTERACTION_KIND_UNSPECIFIED,
        InteractionKind.OPEN_TEXT: run_pb2.INTERACTION_KIND_OPEN_TEXT,
        InteractionKind.CHOOSE_ONE: run_pb2.INTERACTION_KIND_CHOOSE_ONE,
        InteractionKind.CONFIRM: run_pb2.INTERACTION_KIND_CONFIRM,
        InteractionKind.FILL_FIELDS: run_pb2.INTERACTION_KIND_FILL_FIELDS,
        InteractionKind.RISK_ACK: run_pb2.INTERACTION_KIND_RISK_ACK,
    }
)

EVENT_KIND_TO_PROTO: Final = MappingProxyType[RunEventKind | None, run_pb2.RunEventKind.ValueType](
    {None: run_pb2.RUN_EVENT_KIND_UNSPECIFIED}
    | {kind: run_pb2.RunEventKind.Value(f"RUN_EVENT_KIND_{kind}") for kind in RunEventKind}
)

PLANNED_OUTCOME_TO_PROTO: Final = MappingProxyType[
    Outcome, recovery_service_pb2.PlannedOutcome.ValueType
]({one: recovery_service_pb2.PlannedOutcome.Value(f"PLANNED_OUTCOME_{one}") for one in Outcome})

VIEW_FROM_PROTO: Final = MappingProxyType[int, View](
    {
        run_pb2.RUN_VIEW_UNSPECIFIED: View.FULL,
        run_pb2.RUN_VIEW_BASIC: View.BASIC,
        run_pb2.RUN_VIEW_FULL: View.FULL,
    }
)

RECONCILIATION_STATE_TO_PROTO: Final = MappingProxyType[
    ReconciliationState, recovery_pb2.ReconciliationState.ValueType
](
    {
        ReconciliationState.RUNNING: recovery_pb2.RECONCILIATION_STATE_RUNNING,
        ReconciliationState.COMPLETED: recovery_pb2.RECONCILIATION_STATE_COMPLETED,
        ReconciliationState.FAILED: recovery_pb2.RECONCILIATION_STATE_FAILED,
    }
)

TRIGGER_TO_PROTO: Final = MappingProxyType[Cause, recovery_pb2.ReconciliationTrigger.ValueType](
    {
        Cause.STARTUP: recovery_pb2.RECONCILIATION_TRIGGER_STARTUP,
        Cause.SHUTDOWN: recovery_pb2.RECONCILIATION_TRIGGER_SHUTDOWN,
        Cause.TAKEOVER: recovery_pb2.RECONCILIATION_TRIGGER_TAKEOVER,
    }
)

CONTAINMENT_LEVEL_TO_PROTO: Final = MappingProxyType[
    ContainmentLevel, recovery_pb2.ContainmentLevel.ValueType
](
    {
        ContainmentLevel.NONE: recovery_pb2.CONTAINMENT_LEVEL_NONE,
        ContainmentLevel.COOKIE: recovery_pb2.CONTAINMENT_LEVEL_COOKIE,
        ContainmentLevel.WATERMARK: recovery_pb2.CONTAINMENT_LEVEL_WATERMARK,
    }
)

SERVICE_STATE_TO_PROTO: Final = MappingProxyType[ServiceState, recovery_pb2.ServiceState.ValueType](
    {
        ServiceState.RECOVERING: recovery_pb2.SERVICE_STATE_RECOVERING,
        ServiceState.RECOVERY_FAILED: recovery_pb2.SERVICE_STATE_RECOVERY_FAILED,
        ServiceState.SERVING: recovery_pb2.SERVICE_STATE_SERVING,
        ServiceState.DRAINING: recovery_pb2.SERVICE_STATE_DRAINING,
    }
)
