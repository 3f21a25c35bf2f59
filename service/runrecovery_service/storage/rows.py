"""Converts between columns and domain values.

Decoding is lenient on purpose. An unreadable column becomes empty or None, so that one damaged row
does not fail a whole response. Recovery finds damaged rows and quarantines them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any, Final, TypeVar

import peewee as pw

from runrecovery_service.domain.interruption import InterruptionCause
from runrecovery_service.domain.recovery_matrix import BECAUSE
from runrecovery_service.domain.run import (
    Interaction,
    InteractionKind,
    InteractionState,
    JsonObject,
    JsonValue,
    Option,
    Profile,
    RecoveryInfo,
    RecoveryState,
    RestartPolicy,
    Run,
    RunError,
    RunEventKind,
    RunStatus,
    Session,
    ToolCall,
)
from runrecovery_service.domain.session_check import SessionFinding, SessionReason, SessionVerdict
from runrecovery_service.domain.usage import Budget, SessionUsage, Usage
from runrecovery_service.storage import tables
from runrecovery_service.storage.database import Row

EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)

E = TypeVar("E", bound=StrEnum)


def to_us(time: datetime) -> int:
    """Return an aware time as microseconds since 1970 UTC."""
    return (time - EPOCH) // _MICROSECOND


def from_us(us: int) -> datetime:
    """Return microseconds since 1970 as an aware UTC time."""
    try:
        # Positional arguments are twice as fast, and a run has up to ten timestamps.
        return EPOCH + timedelta(0, 0, us)
    except OverflowError:  # a damaged time must not fail the response
        return EPOCH


def from_us_or_none(us: int | None) -> datetime | None:
    """Return `from_us(us)`; None for None."""
    return None if us is None else from_us(us)


def to_json(value: JsonValue) -> str:
    """Return compact JSON."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def json_object(text: str | None) -> JsonObject:
    """Parse a stored JSON object; an unreadable text gives an empty one."""
    value = json_value(text)
    return value if isinstance(value, dict) else {}


def json_value(text: str | None) -> JsonValue:
    """Parse a stored JSON value; an unreadable text gives None."""
    if text is None:
        return None
    try:
        value: JsonValue = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value


_WORDS: Final[dict[type[StrEnum], dict[str, Any]]] = {
    kind: {member.value: member for member in kind}
    for kind in (
        RunStatus,
        Profile,
        RestartPolicy,
        RecoveryState,
        InteractionKind,
        InteractionState,
        RunEventKind,
        SessionVerdict,
        SessionReason,
        InterruptionCause,
    )
}


def enum_from_text(kind: type[E], text: str | None) -> E | None:
    """Return the enum member of a stored word; None for a missing or unknown word."""
    member: E | None = _WORDS[kind].get(text or "")
    return member


def finding_from(verdict: str | None, reason: str | None) -> SessionFinding | None:
    """Return the finding of a session check from its columns; None without a known verdict."""
    known = enum_from_text(SessionVerdict, verdict)
    return None if known is None else SessionFinding(known, enum_from_text(SessionReason, reason))


# -- runs --------------------------------------------------------------------------------------

_R, _I, _E, _C = (
    tables.Run,
    tables.Interaction,
    tables.RecoveryEvent,
    tables.Reconciliation,
)

RUN_COLUMNS: Final[tuple[pw.Field, ...]] = (
    _R.id, _R.run_id, _R.engine, _R.labels, _R.status, _R.profile, _R.restart_policy,
    _R.max_attempts, _R.input, _R.output, _R.error_code, _R.error_message,
    _R.session_type, _R.session_value, _R.session_turn, _R.interaction_count, _R.attempt,
    _R.turn, _R.cancel_requested_at, _R.owner, _R.owner_epoch, _R.version, _R.created_at,
    _R.started_at, _R.updated_at, _R.ended_at, _R.recovery_state, _R.recovery_count,
    _R.event_count, _R.session_timeout_us, _R.require_user_reply, _R.max_run_us,
    _R.auto_decided_count, _R.run_deadline_at, _R.reopenable_until, _R.max_resumes,
    _R.resume_count, _R.resume_at, _R.created_by, _R.canceled_by, _R.traceparent, _R.input_tokens,
    _R.cached_input_tokens, _R.cache_write_input_tokens, _R.output_tokens,
    _R.reasoning_output_tokens, _R.cost_nanos, _R.model, _R.max_tokens, _R.max_cost_nanos,
)  # fmt: skip
INTERACTION_COLUMNS: Final[tuple[pw.Field, ...]] = (
    _I.no, _I.kind, _I.prompt, _I.options, _I.state, _I.asked_at, _I.replied_at, _I.response,
    _I.wait_deadline_at, _I.auto_decided, _I.tool_call, _I.replied_by,
)  # fmt: skip
RECOVERY_COLUMNS: Final = (
    _E.recovery_state, _E.recovered_at, _E.rule, _E.status_before, _E.status_after,
    _E.error_code, _E.no, _E.processes_ended, _C.reconciliation_id, _C.instance, _C.epoch,
)  # fmt: skip

_INTERACTION_AT: Final = len(RUN_COLUMNS)
_RECOVERY_AT: Final = _INTERACTION_AT + len(INTERACTION_COLUMNS)
_RULE_AT: Final = _RECOVERY_AT + 2

LARGE_COLUMNS: Final = tuple(
    at
    for at, column in enumerate((*RUN_COLUMNS, *INTERACTION_COLUMNS))
    if column.name
    in {"input", "output", "labels", "error_message", "prompt", "options", "tool_call"}
)
"""The positions of those columns of `runs.select()` that can have long texts."""


def run_from_row(row: Row) -> Run:
    """Return the run in a row of `runs.select()`, with its open question and latest decision."""
    (
        key, run_id, engine, labels, status, profile, restart_policy,
        max_attempts, input_, output, error_code, error_message,
        session_type, session_value, session_turn, interaction_count, attempt,
        turn, cancel_requested_at, owner, owner_epoch, version, created_at,
        started_at, updated_at, ended_at, recovery_state, recovery_count,
        event_count, session_timeout_us, require_user_reply, max_run_us,
        auto_decided_count, run_deadline_at, reopenable_until, max_resumes,
        resume_count, resume_at, created_by, canceled_by, traceparent, *usage, max_tokens,
        max_cost_nanos,
    ) = row[:_INTERACTION_AT]  # fmt: skip
    quarantined = recovery_state == RecoveryState.QUARANTINED
    waiting = status == RunStatus.WAITING_USER and row[_INTERACTION_AT] is not None
    return Run(
        key=key,
        run_id=run_id,
        engine=engine,
        labels={} if labels == "{}" else {k: str(v) for k, v in json_object(labels).items()},
        # A quarantined run is neither active nor ended, whatever its row says.
        status=None if quarantined else enum_from_text(RunStatus, status),
        profile=enum_from_text(Profile, profile),
        restart_policy=enum_from_text(RestartPolicy, restart_policy) or RestartPolicy.FAIL,
        max_attempts=max_attempts,
        session_timeout_s=seconds_from_us(session_timeout_us),
        require_user_reply=require_user_reply != 0,
        max_run_s=seconds_from_us(max_run_us),
        input=None if input_ is None else json_object(input_),
        output=None if output is None else json_object(output),
        error=None if error_code is None else _error(error_code, error_message, row),
        pending=interaction_from_row(row[_INTERACTION_AT:_RECOVERY_AT]) if waiting else None,
        session=session_from_columns(session_type, session_value, session_turn),
        interaction_count=interaction_count,
        auto_decided_count=auto_decided_count,
        attempt=attempt,
        turn=turn,
        cancel_requested=cancel_requested_at is not None,
        recovery=recovery_from_row(row[_RECOVERY_AT:]) if recovery_count else None,
        owner=owner,
        owner_epoch=owner_epoch,
        version=version,
        event_count=event_count,
        created_at=from_us(created_at),
        started_at=from_us_or_none(started_at),
        updated_at=from_us(updated_at),
        ended_at=from_us_or_none(ended_at),
        run_deadline_at=from_us_or_none(run_deadline_at),
        reopenable_until=from_us_or_none(reopenable_until),
        max_resumes=max_resumes,
        resume_count=resume_count,
        resume_at=from_us_or_none(resume_at),
        usage=usage_from_columns(*usage),
        budget=Budget(max_tokens=max_tokens, max_cost_nanos=max_cost_nanos),
        created_by=created_by,
        canceled_by=canceled_by,
        traceparent=traceparent,
    )


def seconds_from_us(us: int | None) -> float | None:
    """Return microseconds as seconds; None for None."""
    return None if us is None else us / 1e6


def _error(code: str, message: str | None, row: Row) -> RunError:
    """Return the stored error. An error of a recovery takes its message from the rule."""
    return RunError(code=code, message=message or BECAUSE.get(row[_RULE_AT]) or "")


def session_from_columns(kind: str | None, handle: str | None, turn: int | None) -> Session | None:
    """Return the stored session; None if its type or handle is missing."""
    if not kind or not handle:
        return None
    return Session(type=kind, handle=handle, turn=turn or 0)


def usage_from_columns(
    input_tokens: int,
    cached: int,
    cache_write: int,
    output_tokens: int,
    reasoning: int,
    cost_nanos: int | None,
    model: str | None,
) -> Usage | None:
    """Return the usage of a run; None if none was reported yet."""
    if model is None:
        return None
    return Usage(
        input_tokens=input_tokens,
        cached_input_tokens=cached,
        cache_write_input_tokens=cache_write,
        output_tokens=output_tokens,
        reasoning_output_tokens=reasoning,
        cost_nanos=cost_nanos,
        model=model,
    )


def usage_to_json(usage: Usage | SessionUsage | None) -> str | None:
    """Return a usage as text for `usage_from_json` or `session_usage_from_json`; None for None."""
    return None if usage is None else to_json(asdict(usage))


def usage_from_json(text: str | None) -> Usage | None:
    """Parse a stored usage; a missing or unreadable text gives None."""
    return _usage(json_value(text))


def session_usage_from_json(text: str | None) -> SessionUsage | None:
    """Parse the stored usage of a session; a missing or unreadable text gives None."""
    stored = json_value(text)
    if not isinstance(stored, dict):
        return None
    return SessionUsage(**{name: _usage(stored.get(name)) for name in SESSION_FIELDS})


SESSION_FIELDS: Final = tuple(each.name for each in fields(SessionUsage))


def _usage(stored: Any) -> Usage | None:  # Any: each member has its own type
    try:
        return Usage(**stored) if isinstance(stored, dict) else None
    except TypeError:
        return None


def recovery_from_row(row: Row) -> RecoveryInfo | None:
    """Return the decision in a row of RECOVERY_COLUMNS; None if it or its report is missing."""
    state, at, rule, before, after, error_code, count, ended, report, instance, epoch = row
    if state is None or report is None:
        return None
    return RecoveryInfo(
        recovery_state=enum_from_text(RecoveryState, state) or RecoveryState.NONE,
        recovered_at=from_us(at),
        recovery_reason=rule,
        status_before=enum_from_text(RunStatus, before),
        status_after=enum_from_text(RunStatus, after),
        error_code=error_code,
        reconciliation_id=report,
        instance=instance,
        epoch=epoch,
        recovery_count=count,
        processes_ended=ended,
    )


# -- interactions ------------------------------------------------------------------------------


def interaction_from_row(row: Row) -> Interaction:
    """Return the question in a row of INTERACTION_COLUMNS."""
    (
        no, kind, prompt, options, state, asked_at, replied_at, response,
        wait_deadline_at, auto_decided, tool_call, replied_by,
    ) = row  # fmt: skip
    return Interaction(
        interaction_id=no,
        kind=enum_from_text(InteractionKind, kind),
        prompt=prompt,
        options=options_from_json(options),
        state=enum_from_text(InteractionState, state) or InteractionState.CLOSED,
        asked_at=from_us(asked_at),
        replied_at=from_us_or_none(replied_at),
        response=json_value(response),
        wait_deadline_at=from_us_or_none(wait_deadline_at),
        auto_decided=bool(auto_decided),
        tool_call=None if tool_call is None else tool_call_from_json(tool_call),
        replied_by=replied_by,
    )


def tool_call_to_json(call: ToolCall | None) -> str | None:
    """Return a permission question's tool call as text for the store; None for other questions."""
    if call is None:
        return None
    return to_json(
        {
            "id": call.id,
            "tool": call.tool,
            "input": call.input,
            "workspace": call.workspace,
            "pattern": call.pattern,
            "is_last": call.is_last,
        }
    )


def tool_call_from_json(text: str) -> ToolCall | None:
    """Parse a stored tool call; an unreadable text gives None."""
    match json_value(text):
        case {
            "id": str(key),
            "tool": str(tool),
            "input": dict(given),
            "workspace": str(workspace),
            "pattern": str(pattern),
            "is_last": bool(is_last),
        }:
            return ToolCall(
                id=key,
                tool=tool,
                input=given,
                workspace=workspace,
                pattern=pattern,
                is_last=is_last,
            )
    return None


def options_to_json(options: tuple[Option, ...]) -> str:
    """Return the options as text for the store."""
    return to_json([{"label": option.label, "value": option.value} for option in options])


def options_from_json(text: str) -> tuple[Option, ...]:
    """Parse the stored options of a question, and leave out unreadable ones."""
    stored = json_value(text)
    if not isinstance(stored, list):
        return ()
    return tuple(
        Option(label=str(item.get("label", "")), value=item.get("value"))
        for item in stored
        if isinstance(item, dict)
    )
