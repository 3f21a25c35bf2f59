from __future__ import annotations

import math
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import NULL_VALUE, ListValue, Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2, run_service_pb2
from runrecovery_service.domain import run as domain
from runrecovery_service.domain.reconciliation import (
    BindingCounts,
    Cause,
    Containment,
    ContainmentLevel,
    DecisionCount,
    OrphanCounts,
    Phase,
    Reconciliation,
    ReconciliationState,
    TrustRemoval,
)
from runrecovery_service.domain.run import RecoveryState, Run, RunStatus
from runrecovery_service.domain.usage import Budget, Usage
from runrecovery_service.rpc import enums, json_values, recovery_messages, run_messages, times
from runrecovery_service.rpc.gate import ServiceState
from runrecovery_service.storage.launch_records import UnendedLaunch
from runrecovery_service.storage.usage import EngineUsage
from support.domain_runs import AT, QUEUED_RUN

BARE = QUEUED_RUN
USAGE = Usage(
    input_tokens=9,
    cached_input_tokens=4,
    cache_write_input_tokens=3,
    output_tokens=8,
    reasoning_output_tokens=2,
    cost_nanos=250_000_000,
    model="m",
)
QUESTION = domain.Interaction(
    interaction_id=2,
    kind=domain.InteractionKind.CHOOSE_ONE,
    prompt="Which?",
    options=(domain.Option(label="One", value={"n": 1}), domain.Option(label="None", value=None)),
    state=domain.InteractionState.OPEN,
    asked_at=AT,
    replied_at=None,
    response=None,
)
DECISION = domain.RecoveryInfo(
    recovery_state=RecoveryState.FAILED_RECONCILED,
    recovered_at=AT,
    recovery_reason="session_handle_lost",
    status_before=RunStatus.WAITING_USER,
    status_after=RunStatus.FAILED,
    error_code="SESSION_RESUME_FAILED",
    reconciliation_id="c1",
    instance="here",
    epoch=4,
    recovery_count=2,
    processes_ended=3,
)

BARE_REPORT = Reconciliation(
    reconciliation_id="c1",
    instance="here",
    epoch=1,
    cause=Cause.STARTUP,
    state=ReconciliationState.RUNNING,
    started_at=AT,
    finished_at=None,
    phases=(),
    decisions=(),
    orphans=OrphanCounts(),
    bindings=BindingCounts(),
    quarantined=0,
    warnings=(),
    runs_scanned=0,
    runs_total=0,
    runs_unchanged=0,
    safe_mode=False,
    containment=None,
    error=None,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner),
    max_leaves=20,
)


def message(run: Run) -> run_pb2.Run:
    to = run_pb2.Run()
    run_messages.fill_run(to, run)
    return to


def as_json(run: Run) -> dict[str, Any]:
    found: dict[str, Any] = json_format.MessageToDict(
        message(run), preserving_proto_field_name=True
    )
    return found


# -- runs --------------------------------------------------------------------------------------


def test_optional_fields_of_a_new_run_are_absent() -> None:
    assert as_json(BARE) == {
        "run_id": "r1",
        "engine": "demo",
        "status": "RUN_STATUS_QUEUED",
        "interactive_profile": {
            "kind": "INTERACTIVE_PROFILE_KIND_RESUMABLE",
            "require_user_reply": True,
        },
        "restart_policy": "RESTART_POLICY_FAIL",
        "input": {},
        "recovery": {"recovery_state": "RECOVERY_STATE_NONE"},
        "created_at": "2026-11-24T01:02:03.456789Z",
        "updated_at": "2026-11-24T01:02:03.456789Z",
        "etag": "5-2",
    }


def test_every_field_of_a_full_run_is_sent() -> None:
    run = replace(
        BARE,
        labels={"team": "payments"},
        status=RunStatus.WAITING_USER,
        profile=domain.Profile.STICKY_PROCESS,
        input={"a": [1, True, None]},
        output={"done": 0.5},
        error=domain.RunError(code="ENGINE_FAILED", message="no"),
        pending=QUESTION,
        session=domain.Session(type="uuid", handle="the-secret", turn=4),
        interaction_count=2,
        attempt=1,
        cancel_requested=True,
        recovery=DECISION,
        started_at=AT,
        ended_at=AT,
    )

    found = as_json(run)

    assert found["labels"] == {"team": "payments"}
    assert found["input"] == {"a": [1, True, None]}
    assert found["output"] == {"done": 0.5}
    assert found["error"] == {"code": "ENGINE_FAILED", "message": "no"}
    assert found["session"] == {"type": "uuid", "has_handle": True, "turn": 4}
    assert found["holds_slot"] is True
    assert found["cancel_requested"] is True
    assert (found["attempt"], found["interaction_count"]) == (1, 2)
    assert found["started_at"] == found["ended_at"] == "2026-11-24T01:02:03.456789Z"
    assert found["pending_interaction"] == {
        "interaction_id": 2,
        "kind": "INTERACTION_KIND_CHOOSE_ONE",
        "prompt": "Which?",
        "options": [{"label": "One", "value": {"n": 1}}, {"label": "None", "value": None}],
        "asked_at": "2026-11-24T01:02:03.456789Z",
    }
    assert found["recovery"] == {
        "recovery_state": "RECOVERY_STATE_FAILED_RECONCILED",
        "recovered_at": "2026-11-24T01:02:03.456789Z",
        "recovery_reason": "session_handle_lost",
        "status_before": "RUN_STATUS_WAITING_USER",
        "status_after": "RUN_STATUS_FAILED",
        "error_code": "SESSION_RESUME_FAILED",
        "reconciliation_id": "c1",
        "instance": "here",
        "epoch": "4",
        "recovery_count": 2,
        "processes_ended": 3,
    }
    assert b"the-secret" not in message(run).SerializeToString()


def test_a_permission_question_has_its_call_while_it_is_open_and_afterwards() -> None:
    call = domain.ToolCall(
        id="toolu_1", tool="Bash", input={"command": "ls"}, workspace="/w", pattern="Ba*"
    )
    question = replace(QUESTION, kind=domain.InteractionKind.RISK_ACK, tool_call=call)
    kept = run_pb2.Interaction()
    run_messages.fill_interaction(kept, question)

    waiting = as_json(replace(BARE, status=RunStatus.WAITING_USER, pending=question))

    assert waiting["pending_interaction"]["kind"] == "INTERACTION_KIND_RISK_ACK"
    assert waiting["pending_interaction"]["tool_call"] == {
        "call_id": "toolu_1",
        "tool": "Bash",
        "input": {"command": "ls"},
        "workspace": "/w",
        "pattern": "Ba*",
    }
    assert (
        kept.tool_call
        == message(
            replace(BARE, status=RunStatus.WAITING_USER, pending=question)
        ).pending_interaction.tool_call
    )


def test_every_field_of_the_contract_can_be_filled() -> None:
    full = replace(
        BARE,
        labels={"a": "b"},
        status=RunStatus.RUNNING,
        output={},
        error=domain.RunError(code="c", message="m"),
        pending=QUESTION,
        session=domain.Session(type="t", handle="h", turn=1),
        interaction_count=1,
        attempt=1,
        cancel_requested=True,
        recovery=DECISION,
        started_at=AT,
        ended_at=AT,
        auto_decided_count=1,
        run_deadline_at=AT,
        reopenable_until=AT,
        resume_count=1,
        resume_at=AT,
        session_timeout_s=1.5,
        created_by="a",
        canceled_by="b",
        usage=USAGE,
        budget=Budget(max_tokens=7, max_cost_nanos=500_000_000),
    )

    profile = {field.name for field, _ in message(full).interactive_profile.ListFields()}
    assert profile == {field.name for field in run_pb2.InteractiveProfile.DESCRIPTOR.fields}
    assert (message(full).max_tokens, message(full).max_cost_usd) == (7, 0.5)
    filled = {field.name for field, _ in message(full).ListFields()}
    assert filled == {field.name for field in run_pb2.Run.DESCRIPTOR.fields}
    assert json_format.MessageToDict(message(full).usage, preserving_proto_field_name=True) == {
        "input_tokens": "9",
        "cached_input_tokens": "4",
        "cache_write_input_tokens": "3",
        "output_tokens": "8",
        "reasoning_output_tokens": "2",
        "cost_usd": 0.25,
        "model": "m",
    }


def test_a_usage_of_zero_tokens_is_sent_and_an_absent_cost_is_not() -> None:
    used = message(replace(BARE, usage=Usage()))

    assert used.HasField("usage")
    assert not used.usage.HasField("cost_usd")


def test_unknown_stored_values_become_unspecified() -> None:
    found = message(replace(BARE, status=None, profile=None))

    assert found.status == run_pb2.RUN_STATUS_UNSPECIFIED
    assert found.interactive_profile.kind == run_pb2.INTERACTIVE_PROFILE_KIND_UNSPECIFIED


def test_decision_on_an_unreadable_status_leaves_it_unspecified() -> None:
    to = run_pb2.RecoveryInfo()
    recovery_messages.fill_recovery_info(to, replace(DECISION, status_before=None, error_code=None))

    assert (to.status_before, to.error_code) == (run_pb2.RUN_STATUS_UNSPECIFIED, "")


@pytest.mark.parametrize(
    ("words", "kind", "enum"),
    [
        (enums.STATUS_TO_PROTO, RunStatus, run_pb2.RunStatus),
        (enums.PROFILE_TO_PROTO, domain.Profile, run_pb2.InteractiveProfileKind),
        (enums.RESTART_POLICY_TO_PROTO, domain.RestartPolicy, run_pb2.RestartPolicy),
        (enums.RECOVERY_STATE_TO_PROTO, RecoveryState, run_pb2.RecoveryState),
        (enums.INTERACTION_KIND_TO_PROTO, domain.InteractionKind, run_pb2.InteractionKind),
        (
            enums.RECONCILIATION_STATE_TO_PROTO,
            ReconciliationState,
            recovery_pb2.ReconciliationState,
        ),
        (enums.SERVICE_STATE_TO_PROTO, ServiceState, recovery_pb2.ServiceState),
        (enums.TRIGGER_TO_PROTO, Cause, recovery_pb2.ReconciliationTrigger),
        (enums.CONTAINMENT_LEVEL_TO_PROTO, ContainmentLevel, recovery_pb2.ContainmentLevel),
    ],
)
def test_every_enum_value_has_its_number_and_every_number_its_value(
    words: dict[Any, int], kind: Any, enum: Any
) -> None:
    named = {word: enum.Name(number) for word, number in words.items() if word is not None}

    assert set(named) == set(kind)
    assert all(name.endswith(word.name) for word, name in named.items())
    assert {number for word, number in words.items() if word is not None} | {0} == set(
        enum.values()
    )


def test_answered_question_has_its_answer_even_if_that_is_null() -> None:
    to = run_pb2.Interaction()
    run_messages.fill_interaction(to, replace(QUESTION, replied_at=AT, response=None))

    assert to.response.WhichOneof("kind") == "null_value"
    assert to.replied_at.ToDatetime(tzinfo=UTC) == AT


def test_open_question_has_no_answer() -> None:
    to = run_pb2.Interaction()
    run_messages.fill_interaction(to, replace(QUESTION, kind=None))

    assert not to.HasField("response")
    assert not to.HasField("replied_at")
    assert to.kind == run_pb2.INTERACTION_KIND_UNSPECIFIED


def test_every_field_of_a_report_is_sent() -> None:
    report = Reconciliation(
        reconciliation_id="c1",
        instance="here",
        epoch=4,
        cause=Cause.SHUTDOWN,
        state=ReconciliationState.FAILED,
        started_at=AT,
        finished_at=AT,
        phases=(Phase(name="orphans", duration_s=1.25),),
        decisions=(
            DecisionCount(rule="requeued", recovery_state=RecoveryState.RECOVERED_QUEUED, count=6),
        ),
        orphans=OrphanCounts(found=1, ended=2, already_gone=3, refused=4),
        bindings=BindingCounts(sessions=5, pending_interactions=6, slots=7, trust_entries=8),
        quarantined=8,
        warnings=("careful",),
        runs_scanned=9,
        runs_total=10,
        runs_unchanged=11,
        safe_mode=True,
        containment=Containment(level=ContainmentLevel.COOKIE, detail="no watermark here"),
        error="StorageBusy",
        recovered_instance="there",
        trust_removals=(
            TrustRemoval(run_id="r", file="/home/config.toml", folder="/work", outcome="removed"),
        ),
    )
    to = recovery_pb2.Reconciliation()
    recovery_messages.fill_reconciliation(to, report)

    filled = {field.name for field, _ in to.ListFields()}
    assert filled == {field.name for field in recovery_pb2.Reconciliation.DESCRIPTOR.fields}
    assert to.phases[0].duration.ToTimedelta() == timedelta(seconds=1.25)
    assert (to.orphans.found, to.orphans.refused, to.bindings.slots) == (1, 4, 7)
    assert (to.decisions[0].rule, to.decisions[0].count) == ("requeued", 6)
    assert to.bindings.trust_entries == 8
    assert list(to.trust_removals) == [
        recovery_pb2.TrustRemoval(
            run_id="r", file="/home/config.toml", folder="/work", outcome="removed"
        )
    ]
    assert to.trigger == recovery_pb2.RECONCILIATION_TRIGGER_SHUTDOWN
    assert (to.containment.level, to.containment.detail) == (
        recovery_pb2.CONTAINMENT_LEVEL_COOKIE,
        "no watermark here",
    )


def test_an_unfinished_report_has_its_counts_and_no_end() -> None:
    to = recovery_pb2.Reconciliation()
    recovery_messages.fill_reconciliation(to, BARE_REPORT)

    assert to.HasField("orphans")
    assert to.HasField("bindings")
    assert not to.HasField("finished_at")
    assert not to.HasField("containment")
    assert to.trigger == recovery_pb2.RECONCILIATION_TRIGGER_STARTUP


def test_every_field_of_a_status_is_filled() -> None:
    to = recovery_service_pb2.GetRecoveryStatusResponse(instance="here", epoch=4)
    recovery_messages.fill_status(
        to,
        state=ServiceState.SERVING,
        report=BARE_REPORT,
        containment=Containment(level=ContainmentLevel.WATERMARK, detail="found"),
        unended=[UnendedLaunch(run_id="r", attempt=2, launched_at=AT)],
        used=[EngineUsage(engine="e", turns=3, usage=USAGE)],
    )

    filled = {field.name for field, _ in to.ListFields()}
    assert filled == {field.name for field in to.DESCRIPTOR.fields}
    assert (to.containment.level, to.containment.detail) == (
        recovery_pb2.CONTAINMENT_LEVEL_WATERMARK,
        "found",
    )
    (used,) = to.engine_usage
    assert (used.engine, used.turns, used.usage.input_tokens) == ("e", 3, 9)
    (left,) = to.unended_launches
    assert (left.run_id, left.attempt, left.launched_at.ToDatetime(tzinfo=UTC)) == ("r", 2, AT)


def test_status_before_the_report_and_the_probe_has_only_its_state() -> None:
    to = recovery_service_pb2.GetRecoveryStatusResponse()
    recovery_messages.fill_status(
        to, state=ServiceState.RECOVERING, report=None, containment=None, unended=[], used=[]
    )

    assert [field.name for field, _ in to.ListFields()] == ["state"]


@pytest.mark.parametrize("at", [None, AT + timedelta(minutes=20)])
def test_an_open_question_has_its_deadline_if_there_is_one(at: datetime | None) -> None:
    waiting = replace(
        BARE, status=RunStatus.WAITING_USER, pending=replace(QUESTION, wait_deadline_at=at)
    )

    told = message(waiting).pending_interaction

    assert told.HasField("wait_deadline_at") is (at is not None)
    assert at is None or told.wait_deadline_at.ToDatetime(tzinfo=UTC) == at


# -- times -------------------------------------------------------------------------------------


@given(st.datetimes(timezones=st.sampled_from([UTC, timezone(timedelta(hours=5, minutes=30))])))
def test_time_is_exact_both_ways(time: datetime) -> None:
    try:
        time.astimezone(UTC)
    except OverflowError:  # the first and last hours of the calendar have no UTC
        return
    stamp = Timestamp()
    times.write_time(stamp, time)

    assert times.read_time(stamp) == time
    assert stamp.ToJsonString()  # refuses what is no Timestamp


def test_epoch_itself_is_present() -> None:
    run = message(replace(BARE, created_at=times.EPOCH))

    assert run.HasField("created_at")


def test_bound_between_two_microseconds_becomes_the_later() -> None:
    assert times.read_time(Timestamp(seconds=1, nanos=1)) == times.EPOCH + timedelta(
        seconds=1, microseconds=1
    )


@pytest.mark.parametrize("nanos", [999_999_000, 999_999_001, 999_999_999])
def test_the_last_times_of_the_calendar_are_its_last_microsecond(nanos: int) -> None:
    stamp = Timestamp(seconds=253_402_300_799, nanos=nanos)

    assert times.read_time(stamp) == datetime(9999, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)


@pytest.mark.parametrize(
    "stamp",
    [
        Timestamp(nanos=-1),
        Timestamp(nanos=1_000_000_000),
        Timestamp(seconds=-62_135_596_801, nanos=999_999_999),
        Timestamp(seconds=253_402_300_800),
        Timestamp(seconds=-62_135_596_801),
        Timestamp(seconds=2**63 - 1),
    ],
    ids=str,
)
def test_impossible_time_is_refused(stamp: Timestamp) -> None:
    with pytest.raises(ValueError, match="must be"):
        times.read_time(stamp)


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.0, (0, 0)), (1.25, (1, 250_000_000)), (0.9999999, (1, 0))]
)
def test_a_duration_is_rounded_to_the_microsecond(
    seconds: float, expected: tuple[int, int]
) -> None:
    span = Duration()
    times.write_duration(span, seconds)

    assert (span.seconds, span.nanos) == expected


# -- JSON --------------------------------------------------------------------------------------


@given(st.dictionaries(TEXT, JSON, max_size=5))
def test_a_json_object_survives_the_round_trip(values: domain.JsonObject) -> None:
    struct = Struct()
    json_values.write_struct(struct, values)

    back = json_values.read_struct(Struct.FromString(struct.SerializeToString()))

    assert back == values
    assert struct == json_format.ParseDict(values, Struct())


def test_whole_numbers_are_integers_as_far_as_a_double_is_exact() -> None:
    numbers = [1.0, -0.0, 2.0**53 - 1, 2.0**53, 1e300, 0.5]

    back = [json_values.read_value(Value(number_value=number)) for number in numbers]

    assert back == numbers
    assert [type(number) for number in back] == [int, int, int, float, float, float]


def nested(levels: int, *, lists: bool) -> Value:
    value = Value(null_value=NULL_VALUE)
    for _ in range(levels):
        if lists:
            value = Value(list_value=ListValue(values=[value]))
        else:
            value = Value(struct_value=Struct(fields={"a": value}))
    return value


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (Value(number_value=math.nan), "not finite"),
        (Value(number_value=-math.inf), "not finite"),
        (Value(string_value="a\0b"), "NUL"),
        (Value(struct_value=Struct(fields={"a\0": Value(bool_value=True)})), "NUL"),
        (Value(), "without a kind"),
        (nested(33, lists=True), "deeper than 32"),
        (nested(33, lists=False), "deeper than 32"),
    ],
    ids=["nan", "infinity", "nul", "nul-in-key", "no-kind", "deep-lists", "deep-objects"],
)
def test_what_is_not_json_is_refused(value: Value, problem: str) -> None:
    with pytest.raises(json_values.InvalidJson, match=problem):
        json_values.read_value(value)


@pytest.mark.parametrize("lists", [True, False])
def test_the_deepest_accepted_input_can_be_read_back_from_a_page(*, lists: bool) -> None:
    deep = json_values.read_value(nested(json_values.MAX_JSON_DEPTH, lists=lists))
    page = run_service_pb2.ListRunsResponse()
    question = run_service_pb2.ListInteractionsResponse()
    run_messages.fill_run(page.runs.add(), replace(BARE, input=deep if not lists else {"a": deep}))  # type: ignore[arg-type]
    run_messages.fill_interaction(
        question.interactions.add(), replace(QUESTION, replied_at=AT, response=deep)
    )

    assert run_service_pb2.ListRunsResponse.FromString(page.SerializeToString()) == page
    assert (
        run_service_pb2.ListInteractionsResponse.FromString(question.SerializeToString())
        == question
    )
