"""The domain's words in the contract's messages, and JSON both ways. Written for speed: GetRun
spends most of its own time here.

Messages are filled in place and only where something is to be said; a session's handle is never
read, so that it cannot leave the service.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, MutableSequence, Sequence
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import NULL_VALUE, ListValue, Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2

from runrecovery_service.domain.explanation import RecordedDecision, explain_facts, explain_rule
from runrecovery_service.domain.plan import PlannedDecision, RecoveryPlan
from runrecovery_service.domain.reconciliation import (
    Cause,
    Containment,
    ContainmentLevel,
    DecisionCount,
    Reconciliation,
    ReconciliationState,
)
from runrecovery_service.domain.run import (
    Interaction,
    InteractionKind,
    JsonObject,
    JsonValue,
    Option,
    Profile,
    RecoveryInfo,
    RecoveryState,
    RestartPolicy,
    Run,
    RunEvent,
    RunEventKind,
    RunStatus,
    View,
)
from runrecovery_service.rpc.gate import ServiceState
from runrecovery_service.storage.feed import Decided
from runrecovery_service.storage.processes import Unended

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_DAY_S: Final = 86_400
_FIRST_S: Final = int((datetime.min.replace(tzinfo=UTC) - EPOCH).total_seconds())
"""Of year 1."""
_LAST_S: Final = (datetime.max.replace(tzinfo=UTC) - EPOCH) // timedelta(seconds=1)
"""Of year 9999."""
_DURATION_MOST_S: Final = 315_576_000_000
MAX_JSON_DEPTH: Final = 32
"""Deepest nesting of objects and lists in a request's JSON. Protobuf readers give up at 100
messages, and an object inside a Struct takes three: deeper input could be stored, but no caller
could read the run any more."""

# -- words -------------------------------------------------------------------------------------

STATUSES: Final[Mapping[RunStatus | None, run_pb2.RunStatus.ValueType]] = MappingProxyType(
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
PROFILES: Final[Mapping[Profile | None, run_pb2.InteractiveProfileKind.ValueType]] = (
    MappingProxyType(
        {
            None: run_pb2.INTERACTIVE_PROFILE_KIND_UNSPECIFIED,
            Profile.RESUMABLE: run_pb2.INTERACTIVE_PROFILE_KIND_RESUMABLE,
            Profile.STICKY_PROCESS: run_pb2.INTERACTIVE_PROFILE_KIND_STICKY_PROCESS,
        }
    )
)
RESTART_POLICIES: Final[Mapping[RestartPolicy, run_pb2.RestartPolicy.ValueType]] = MappingProxyType(
    {
        RestartPolicy.FAIL: run_pb2.RESTART_POLICY_FAIL,
        RestartPolicy.REQUEUE: run_pb2.RESTART_POLICY_REQUEUE,
    }
)
RECOVERY_STATES: Final[Mapping[RecoveryState, run_pb2.RecoveryState.ValueType]] = MappingProxyType(
    {
        RecoveryState.NONE: run_pb2.RECOVERY_STATE_NONE,
        RecoveryState.RECOVERED_WAITING: run_pb2.RECOVERY_STATE_RECOVERED_WAITING,
        RecoveryState.FAILED_RECONCILED: run_pb2.RECOVERY_STATE_FAILED_RECONCILED,
        RecoveryState.RECOVERED_QUEUED: run_pb2.RECOVERY_STATE_RECOVERED_QUEUED,
        RecoveryState.CANCELED_RECONCILED: run_pb2.RECOVERY_STATE_CANCELED_RECONCILED,
        RecoveryState.QUARANTINED: run_pb2.RECOVERY_STATE_QUARANTINED,
        RecoveryState.REOPENED: run_pb2.RECOVERY_STATE_REOPENED,
    }
)
KINDS: Final[Mapping[InteractionKind | None, run_pb2.InteractionKind.ValueType]] = MappingProxyType(
    {
        None: run_pb2.INTERACTION_KIND_UNSPECIFIED,
        InteractionKind.OPEN_TEXT: run_pb2.INTERACTION_KIND_OPEN_TEXT,
        InteractionKind.CHOOSE_ONE: run_pb2.INTERACTION_KIND_CHOOSE_ONE,
        InteractionKind.CONFIRM: run_pb2.INTERACTION_KIND_CONFIRM,
        InteractionKind.FILL_FIELDS: run_pb2.INTERACTION_KIND_FILL_FIELDS,
        InteractionKind.RISK_ACK: run_pb2.INTERACTION_KIND_RISK_ACK,
    }
)
EVENT_KINDS: Final[Mapping[RunEventKind | None, run_pb2.RunEventKind.ValueType]] = MappingProxyType(
    {None: run_pb2.RUN_EVENT_KIND_UNSPECIFIED}
    | {kind: run_pb2.RunEventKind.Value(f"RUN_EVENT_KIND_{kind}") for kind in RunEventKind}
)
VIEW_OF: Final[Mapping[int, View]] = MappingProxyType(
    {
        run_pb2.RUN_VIEW_UNSPECIFIED: View.FULL,
        run_pb2.RUN_VIEW_BASIC: View.BASIC,
        run_pb2.RUN_VIEW_FULL: View.FULL,
    }
)
RECONCILIATION_STATES: Final[
    Mapping[ReconciliationState, recovery_pb2.ReconciliationState.ValueType]
] = MappingProxyType(
    {
        ReconciliationState.RUNNING: recovery_pb2.RECONCILIATION_STATE_RUNNING,
        ReconciliationState.COMPLETED: recovery_pb2.RECONCILIATION_STATE_COMPLETED,
        ReconciliationState.FAILED: recovery_pb2.RECONCILIATION_STATE_FAILED,
    }
)
TRIGGERS: Final[Mapping[Cause, recovery_pb2.ReconciliationTrigger.ValueType]] = MappingProxyType(
    {
        Cause.STARTUP: recovery_pb2.RECONCILIATION_TRIGGER_STARTUP,
        Cause.SHUTDOWN: recovery_pb2.RECONCILIATION_TRIGGER_SHUTDOWN,
    }
)
CONTAINMENT_LEVELS: Final[Mapping[ContainmentLevel, recovery_pb2.ContainmentLevel.ValueType]] = (
    MappingProxyType(
        {
            ContainmentLevel.NONE: recovery_pb2.CONTAINMENT_LEVEL_NONE,
            ContainmentLevel.COOKIE: recovery_pb2.CONTAINMENT_LEVEL_COOKIE,
            ContainmentLevel.WATERMARK: recovery_pb2.CONTAINMENT_LEVEL_WATERMARK,
        }
    )
)
SERVICE_STATES: Final[Mapping[ServiceState, recovery_pb2.ServiceState.ValueType]] = (
    MappingProxyType(
        {
            ServiceState.RECOVERING: recovery_pb2.SERVICE_STATE_RECOVERING,
            ServiceState.RECOVERY_FAILED: recovery_pb2.SERVICE_STATE_RECOVERY_FAILED,
            ServiceState.SERVING: recovery_pb2.SERVICE_STATE_SERVING,
            ServiceState.DRAINING: recovery_pb2.SERVICE_STATE_DRAINING,
        }
    )
)

STATUS_OF: Final = MappingProxyType({n: s for s, n in STATUSES.items() if s is not None})
PROFILE_OF: Final = MappingProxyType({n: p for p, n in PROFILES.items() if p is not None})
RECOVERY_STATE_OF: Final = MappingProxyType({n: s for s, n in RECOVERY_STATES.items()})
RESTART_POLICY_OF: Final = MappingProxyType(
    {run_pb2.RESTART_POLICY_UNSPECIFIED: RestartPolicy.FAIL}
    | {number: policy for policy, number in RESTART_POLICIES.items()}
)

# -- times -------------------------------------------------------------------------------------


def put_time(target: Timestamp, time: datetime) -> None:
    """Write an aware time into a Timestamp, exact to the microsecond."""
    since = time - EPOCH
    target.seconds = since.days * _DAY_S + since.seconds
    if since.microseconds:
        target.nanos = since.microseconds * 1000
    elif not target.seconds:
        target.SetInParent()


def time_of(stamp: Timestamp) -> datetime:
    """Return the first microsecond that is not before the stamp, as an aware UTC time.

    The bounds of a filter keep their meaning by it: our times are whole microseconds.

    Raises:
        ValueError: no such time: years 1 to 9999, nanoseconds 0 to 999,999,999.
    """
    if not 0 <= stamp.nanos < 1_000_000_000:
        raise ValueError("nanos must be 0 to 999999999")
    if not _FIRST_S <= stamp.seconds <= _LAST_S:
        raise ValueError("must be in the years 1 to 9999")
    microseconds = -(-stamp.nanos // 1000)
    if stamp.seconds == _LAST_S:  # there is no later microsecond than year 9999's last
        microseconds = min(microseconds, 999_999)
    return EPOCH + timedelta(seconds=stamp.seconds, microseconds=microseconds)


def time_or_none(message: Message, field: str) -> datetime | None:
    """Return the time in a field of a message as `time_of` does; None when it is not set."""
    return time_of(getattr(message, field)) if message.HasField(field) else None


def seconds_of(span: Duration) -> float:
    """Return a Duration in seconds.

    Raises:
        ValueError: no such span: at most 10,000 years, both parts of one sign.
    """
    if abs(span.seconds) > _DURATION_MOST_S or abs(span.nanos) > 999_999_999:
        raise ValueError("must be at most 10000 years, nanos at most 999999999")
    if span.seconds * span.nanos < 0:
        raise ValueError("seconds and nanos must have one sign")
    return span.seconds + span.nanos / 1e9


def put_duration(target: Duration, seconds: float) -> None:
    """Write a span into a Duration, rounded to the microsecond."""
    whole, us = divmod(round(seconds * 1_000_000), 1_000_000)
    target.seconds = whole
    target.nanos = us * 1000


# -- JSON --------------------------------------------------------------------------------------


def put_struct(target: Struct, values: JsonObject) -> None:
    """Write a JSON object into a Struct. Four times as fast as json_format."""
    fields = target.fields
    for key, value in values.items():
        put_value(fields[key], value)


def put_value(target: Value, value: JsonValue) -> None:
    """Write any JSON value into a Value."""
    if isinstance(value, str):
        target.string_value = value
    elif isinstance(value, bool):
        target.bool_value = value
    elif value is None:
        target.null_value = NULL_VALUE
    elif isinstance(value, dict):
        target.struct_value.SetInParent()
        put_struct(target.struct_value, value)
    elif isinstance(value, list):
        target.list_value.SetInParent()
        add = target.list_value.values.add
        for item in value:
            put_value(add(), item)
    else:
        target.number_value = value


class BadJson(Exception):
    """A Struct or Value holds something that is not JSON, or that cannot be kept."""


def json_of_struct(struct: Struct, *, depth: int = 1) -> JsonObject:
    """Return a Struct as a JSON object.

    Raises:
        BadJson: NaN, infinity, a NUL character, no kind, or nested deeper than 32.
    """
    if depth > MAX_JSON_DEPTH:
        raise BadJson(f"nested deeper than {MAX_JSON_DEPTH}")
    return {
        _text(key): json_of_value(value, depth=depth + 1) for key, value in struct.fields.items()
    }


def json_of_value(value: Value, *, depth: int = 1) -> JsonValue:
    """Return a Value as JSON; whole numbers that a double holds exactly become integers.

    Raises:
        BadJson: as `json_of_struct`.
    """
    match value.WhichOneof("kind"):
        case "string_value":
            return _text(value.string_value)
        case "number_value":
            return _number(value.number_value)
        case "bool_value":
            return value.bool_value
        case "null_value":
            return None
        case "struct_value":
            return json_of_struct(value.struct_value, depth=depth)
        case "list_value":
            return _list(value.list_value, depth)
        case _:
            raise BadJson("holds a value without a kind")


def _list(values: ListValue, depth: int) -> list[JsonValue]:
    if depth > MAX_JSON_DEPTH:
        raise BadJson(f"nested deeper than {MAX_JSON_DEPTH}")
    return [json_of_value(item, depth=depth + 1) for item in values.values]


def _text(text: str) -> str:
    if "\0" in text:
        raise BadJson("holds a NUL character")
    return text


def _number(number: float) -> int | float:
    if not math.isfinite(number):
        raise BadJson("holds a number that is not finite")
    if number.is_integer() and abs(number) < 2**53:
        return int(number)
    return number


# -- runs --------------------------------------------------------------------------------------


def put_run(to: run_pb2.Run, run: Run) -> None:
    """Fill in a run."""
    to.run_id = run.run_id
    to.engine = run.engine
    to.status = STATUSES[run.status]
    _put_profile(to.interactive_profile, run)
    to.restart_policy = RESTART_POLICIES[run.restart_policy]
    if run.input:
        put_struct(to.input, run.input)
    elif run.input is not None:
        to.input.SetInParent()
    if run.interaction_count:
        to.interaction_count = run.interaction_count
    if run.attempt:
        to.attempt = run.attempt
    to.holds_slot = run.holds_slot
    to.cancel_requested = run.cancel_requested
    to.etag = run.etag
    put_time(to.created_at, run.created_at)
    put_time(to.updated_at, run.updated_at)
    if run.started_at is not None:
        put_time(to.started_at, run.started_at)
    if run.ended_at is not None:
        put_time(to.ended_at, run.ended_at)
    if run.labels:
        to.labels.update(run.labels)
    put_recovery(to.recovery, run.recovery)
    _put_what_it_holds(to, run)


def _put_profile(to: run_pb2.InteractiveProfile, run: Run) -> None:
    to.kind = PROFILES[run.profile]
    to.require_user_reply = run.require_user_reply
    if run.session_timeout_s is not None:
        put_duration(to.session_timeout, run.session_timeout_s)


def _put_what_it_holds(to: run_pb2.Run, run: Run) -> None:
    if run.output is not None:
        to.output.SetInParent()
        put_struct(to.output, run.output)
    if run.error is not None:
        to.error.code = run.error.code
        to.error.message = run.error.message
    if run.pending is not None:
        _put_pending(to.pending_interaction, run.pending)
    if run.session is not None:
        to.session.type = run.session.type
        to.session.has_handle = True
        to.session.turn = run.session.turn
    if run.auto_decided_count:
        to.auto_decided_count = run.auto_decided_count
    if run.run_deadline_at is not None:
        put_time(to.run_deadline_at, run.run_deadline_at)
    if run.reopenable_until is not None:
        put_time(to.reopenable_until, run.reopenable_until)


def _put_pending(to: run_pb2.PendingInteraction, question: Interaction) -> None:
    to.interaction_id = question.interaction_id
    to.kind = KINDS[question.kind]
    to.prompt = question.prompt
    for option in question.options:
        _put_option(to.options.add(), option)
    put_time(to.asked_at, question.asked_at)
    if question.wait_deadline_at is not None:
        put_time(to.wait_deadline_at, question.wait_deadline_at)


def _put_option(to: run_pb2.InteractionOption, option: Option) -> None:
    to.label = option.label
    put_value(to.value, option.value)


def put_interaction(to: run_pb2.Interaction, question: Interaction) -> None:
    """Fill in a question and what became of it."""
    to.interaction_id = question.interaction_id
    to.kind = KINDS[question.kind]
    to.prompt = question.prompt
    for option in question.options:
        _put_option(to.options.add(), option)
    put_time(to.asked_at, question.asked_at)
    if question.replied_at is not None:
        put_time(to.replied_at, question.replied_at)
        put_value(to.response, question.response)
        to.auto_decided = question.auto_decided


def put_event(to: run_pb2.RunEvent, event: RunEvent) -> None:
    """Fill in an event, without the run."""
    to.kind = EVENT_KINDS[event.kind]
    put_time(to.happened_at, event.happened_at)
    to.status = STATUSES[event.status]
    to.attempt = event.attempt
    to.interaction_id = event.interaction_id
    to.error_code = event.error_code or ""
    if event.recovery is not None:
        put_recovery(to.recovery, event.recovery)


# -- recovery ----------------------------------------------------------------------------------


def put_recovery(to: run_pb2.RecoveryInfo, recovery: RecoveryInfo | None) -> None:
    """Fill in a decision; None is state NONE."""
    if recovery is None:
        to.recovery_state = run_pb2.RECOVERY_STATE_NONE
        return
    to.recovery_state = RECOVERY_STATES[recovery.recovery_state]
    put_time(to.recovered_at, recovery.recovered_at)
    to.recovery_reason = recovery.recovery_reason
    to.status_before = STATUSES[recovery.status_before]
    to.status_after = STATUSES[recovery.status_after]
    if recovery.error_code:
        to.error_code = recovery.error_code
    to.reconciliation_id = recovery.reconciliation_id
    to.instance = recovery.instance
    to.epoch = recovery.epoch
    to.recovery_count = recovery.recovery_count
    to.processes_ended = recovery.processes_ended


def put_decided(to: recovery_service_pb2.RecoveredRun, decided: Decided) -> None:
    """Fill in a decision and the run that it is about."""
    to.run_id = decided.run_id
    to.engine = decided.engine
    to.labels.update(decided.labels)
    put_recovery(to.recovery, decided.recovery)


def put_explanation(to: recovery_service_pb2.RecoveryExplanation, seen: RecordedDecision) -> None:
    """Fill in why a decision was made, and what was done."""
    put_recovery(to.decision, seen.info)
    to.because = explain_rule(seen.info.recovery_reason)
    to.profile = PROFILES[seen.profile]
    for fact in explain_facts(seen):
        to.facts.add(name=fact.name, held=fact.held, source=fact.source)
    for launch in seen.launches:
        for orphan in launch.orphans:
            to.processes.add(
                pid=orphan.pid,
                attempt=launch.attempt,
                turn=launch.turn,
                evidence=orphan.evidence,
                signals=orphan.signals,
                ended=orphan.ended,
                ended_by=orphan.by,
            )


def put_planned(to: recovery_service_pb2.PlannedDecision, planned: PlannedDecision) -> None:
    """Fill in what a restart would decide for one run."""
    verdict = planned.decision
    to.run_id = planned.run_id
    to.engine = planned.engine
    to.status_before = STATUSES[planned.status]
    to.status_after = STATUSES[verdict.becomes]
    to.recovery_reason = verdict.rule
    to.recovery_state = RECOVERY_STATES[verdict.state]
    to.error_code = verdict.error or ""
    to.unchanged = verdict.unchanged


def put_plan(to: recovery_service_pb2.RecoveryPlan, plan: RecoveryPlan) -> None:
    """Fill in what a restart would come to."""
    _put_decision_counts(to.decisions, plan.decisions)
    to.runs_total = plan.runs_total
    to.runs_unchanged = plan.runs_unchanged
    to.quarantined = plan.quarantined
    to.launches = plan.launches


def _put_decision_counts(
    to: MutableSequence[recovery_pb2.DecisionCount], counts: Sequence[DecisionCount]
) -> None:
    to.extend(
        recovery_pb2.DecisionCount(
            rule=decided.rule,
            recovery_state=RECOVERY_STATES[decided.recovery_state],
            count=decided.count,
        )
        for decided in counts
    )


def put_reconciliation(to: recovery_pb2.Reconciliation, report: Reconciliation) -> None:
    """Fill in a report."""
    to.reconciliation_id = report.reconciliation_id
    to.instance = report.instance
    to.epoch = report.epoch
    to.trigger = TRIGGERS[report.cause]
    to.state = RECONCILIATION_STATES[report.state]
    put_time(to.started_at, report.started_at)
    if report.finished_at is not None:
        put_time(to.finished_at, report.finished_at)
    for phase in report.phases:
        put_duration(to.phases.add(name=phase.name).duration, phase.duration_s)
    _put_decision_counts(to.decisions, report.decisions)
    to.quarantined = report.quarantined
    to.warnings.extend(report.warnings)
    to.runs_scanned = report.runs_scanned
    to.runs_total = report.runs_total
    to.runs_unchanged = report.runs_unchanged
    to.safe_mode = report.safe_mode
    to.error = report.error or ""
    if report.containment is not None:
        put_containment(to.containment, report.containment)
    _put_counts(to, report)
    to.trust_removals.extend(
        recovery_pb2.TrustRemoval(
            run_id=one.run_id, file=one.file, folder=one.folder, outcome=one.outcome
        )
        for one in report.trust_removals
    )


def put_containment(to: recovery_pb2.Containment, proved: Containment) -> None:
    """Fill in what the probe proved."""
    to.level = CONTAINMENT_LEVELS[proved.level]
    to.detail = proved.detail


def _put_counts(to: recovery_pb2.Reconciliation, report: Reconciliation) -> None:
    orphans, bindings = report.orphans, report.bindings
    to.orphans.SetInParent()
    to.orphans.found = orphans.found
    to.orphans.ended = orphans.ended
    to.orphans.already_gone = orphans.already_gone
    to.orphans.refused = orphans.refused
    to.bindings.SetInParent()
    to.bindings.sessions = bindings.sessions
    to.bindings.pending_interactions = bindings.pending_interactions
    to.bindings.slots = bindings.slots
    to.bindings.trust_entries = bindings.trust_entries


def put_status(
    to: recovery_service_pb2.GetRecoveryStatusResponse,
    *,
    state: ServiceState,
    report: Reconciliation | None,
    containment: Containment | None,
    unended: Sequence[Unended],
) -> None:
    """Fill in what the service is doing, the report of this start and what its probe proved if
    they are there yet, and what could not be ended."""
    to.state = SERVICE_STATES[state]
    if report is not None:
        put_reconciliation(to.reconciliation, report)
    if containment is not None:
        put_containment(to.containment, containment)
    for launch in unended:
        left = to.unended_launches.add(run_id=launch.run_id, attempt=launch.attempt)
        put_time(left.launched_at, launch.launched_at)
