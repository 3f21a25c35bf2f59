"""Checks requests. Every function yields all violations of its request, not only the first."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final

from google.protobuf.duration_pb2 import Duration
from google.protobuf.struct_pb2 import Struct, Value
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as run_pb

from runrecovery_service.domain.errors import FieldViolation, InvalidFields
from runrecovery_service.domain.usage import MAX_BUDGET_TOKENS, MAX_BUDGET_USD
from runrecovery_service.engines.catalog import Engine
from runrecovery_service.engines.message_limits import MAX_SESSION_CHARS
from runrecovery_service.rpc import enums, json_values, times
from runrecovery_service.rpc.errors import clip

RUN_ID: Final = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
LABEL_KEY: Final = re.compile(r"[a-z0-9][a-z0-9_.-]{0,62}")
UUID: Final = re.compile(r"[0-9a-f]{8}-(?:[0-9a-f]{4}-){3}[0-9a-f]{12}", re.IGNORECASE)
MAX_LABELS: Final = 32
MAX_LABELS_FILTERED: Final = 8
MIN_SESSION_TIMEOUT_S: Final = 0.1
_SESSION_TIMEOUT: Final = "interactive_profile.session_timeout"
MAX_LABEL_CHARS: Final = 256
MAX_NAME_CHARS: Final = 200
"""The longest name of an engine or a rule, and the longest etag. No real one is as long."""

Violations = Iterator[FieldViolation]


def require_valid(violations: Iterable[FieldViolation]) -> None:
    """Raise InvalidFields with all violations, if there are any."""
    found = tuple(violations)
    if found:
        raise InvalidFields(found)


def require_run_id(run_id: str) -> None:
    """Raise InvalidFields unless `run_id` is well-formed. This is all that GetRun checks."""
    if not RUN_ID.fullmatch(run_id):
        raise InvalidFields(tuple(run_id_violations(run_id)))


# -- requests ----------------------------------------------------------------------------------


def create_run(request: run_pb.CreateRunRequest) -> Violations:
    """Check a new run, as far as possible without its engine."""
    if request.run_id:
        yield from run_id_violations(request.run_id)
    yield from _required_name("engine", request.engine)
    yield from _labels(request.labels)
    yield from _json("input", request.input)
    policy = request.restart_policy
    if policy and policy not in enums.RESTART_POLICY_FROM_PROTO:
        yield _unknown("restart_policy", request.restart_policy)
    kind = request.interactive_profile.kind
    if kind and kind not in enums.PROFILE_FROM_PROTO:
        yield _unknown("interactive_profile.kind", kind)
    if request.interactive_profile.HasField("session_timeout"):
        yield from _session_timeout(request.interactive_profile.session_timeout)
    yield from _budget(request)
    yield from _request_id(request.request_id)


def _budget(request: run_pb.CreateRunRequest) -> Violations:
    if request.HasField("max_tokens") and not 1 <= request.max_tokens <= MAX_BUDGET_TOKENS:
        yield FieldViolation("max_tokens", f"must be from 1 to {MAX_BUDGET_TOKENS}")
    if request.HasField("max_cost_usd") and not 0 < request.max_cost_usd <= MAX_BUDGET_USD:
        yield FieldViolation("max_cost_usd", f"must be above 0 and at most {MAX_BUDGET_USD:.0f}")


def _session_timeout(span: Duration) -> Violations:
    try:
        if times.read_duration_s(span) < MIN_SESSION_TIMEOUT_S:
            yield FieldViolation(_SESSION_TIMEOUT, f"must be at least {MIN_SESSION_TIMEOUT_S} s")
    except ValueError as error:
        yield FieldViolation(_SESSION_TIMEOUT, str(error))


def fits_engine(request: run_pb.CreateRunRequest, engine: Engine) -> Violations:
    """Check that the engine supports the options of the request."""
    yield from _fits_profile(request.interactive_profile, engine)
    if request.restart_policy == run_pb2.RESTART_POLICY_RESUME and not engine.max_resumes:
        yield FieldViolation(
            "restart_policy",
            f"engine {clip(engine.name)!r} cannot resume an interrupted turn"
            " (resumes_interrupted is not set in its configuration)",
        )
    yield from _fits_budget(request, engine)


def _fits_budget(request: run_pb.CreateRunRequest, engine: Engine) -> Violations:
    named, most = clip(engine.name), engine.budget
    if most.max_tokens is not None and request.max_tokens > most.max_tokens:
        yield FieldViolation(
            "max_tokens", f"must be at most {most.max_tokens}, the max_tokens of engine {named!r}"
        )
    if most.max_cost_usd is not None and request.max_cost_usd > most.max_cost_usd:
        yield FieldViolation(
            "max_cost_usd",
            f"must be at most {most.max_cost_usd:g}, the max_cost_usd of engine {named!r}",
        )
    if request.HasField("max_cost_usd") and not engine.dialect.reports_cost:
        yield FieldViolation(
            "max_cost_usd", f"engine {named!r} reports no cost; use max_tokens instead"
        )


def _fits_profile(requested: run_pb2.InteractiveProfile, engine: Engine) -> Violations:
    named = clip(engine.name)
    if requested.kind and enums.PROFILE_FROM_PROTO[requested.kind] is not engine.profile:
        yield FieldViolation(
            "interactive_profile.kind",
            f"engine {named!r} is {engine.profile.value}; leave this field unset",
        )
    most_s = engine.session_timeout_s
    if (
        requested.HasField("session_timeout")
        and times.read_duration_s(requested.session_timeout) > most_s
    ):
        yield FieldViolation(
            _SESSION_TIMEOUT,
            f"must be at most {most_s:g} s, the session_timeout of engine {named!r}",
        )


def list_runs(request: run_pb.ListRunsRequest) -> Violations:
    """Check a request for a page of runs."""
    for at, status in enumerate(request.filter.statuses):
        if status and status not in enums.STATUS_FROM_PROTO:
            yield _unknown(f"filter.statuses[{at}]", status)
    yield from _name("filter.engine", request.filter.engine)
    yield from _label_filter(request.filter.labels)
    yield from _time_range(request.filter, "created_after", "created_before")
    yield from _view(request.view)
    yield from _page_size(request.page_size)


def watch_run(request: run_pb.WatchRunRequest) -> Violations:
    """Check a request to watch a run."""
    yield from run_id_violations(request.run_id)
    if request.after_sequence < 0:
        yield FieldViolation("after_sequence", "must not be negative")


def reopen_run(request: run_pb.ReopenRunRequest) -> Violations:
    """Check a request to reopen a failed run."""
    yield from run_id_violations(request.run_id)
    match request.WhichOneof("session"):
        case "keep_session":
            if not request.keep_session:
                yield FieldViolation("keep_session", "must be true if it is set")
        case "session_handle":
            yield from _session_handle(request.session_handle)
        case _:
            yield FieldViolation("session", "keep_session or session_handle is required")
    yield from _request_id(request.request_id)
    yield from _name("etag", request.etag)


def _session_handle(handle: str) -> Violations:
    if not handle:
        yield FieldViolation("session_handle", "must not be empty")
    if len(handle) > MAX_SESSION_CHARS:
        yield FieldViolation("session_handle", f"must be at most {MAX_SESSION_CHARS} characters")
    if "\0" in handle:
        yield FieldViolation("session_handle", "must not contain a NUL character")


def submit_reply(request: run_pb.SubmitReplyRequest) -> Violations:
    """Check a reply."""
    yield from run_id_violations(request.run_id)
    if request.interaction_id < 1:
        yield FieldViolation("interaction_id", "must be 1 or more")
    if request.response.WhichOneof("kind") is None:
        yield FieldViolation("response", "is required")
    else:
        yield from _json("response", request.response)
    yield from _request_id(request.request_id)
    yield from _name("etag", request.etag)


def cancel_run(request: run_pb.CancelRunRequest) -> Violations:
    """Check a cancel."""
    yield from run_id_violations(request.run_id)
    yield from _request_id(request.request_id)
    yield from _name("etag", request.etag)


def list_interactions(request: run_pb.ListInteractionsRequest) -> Violations:
    """Check a request for a page of questions."""
    yield from run_id_violations(request.run_id)
    yield from _page_size(request.page_size)


def stream_output(request: run_pb.StreamOutputRequest) -> Violations:
    """Check a request for output of a run."""
    yield from run_id_violations(request.run_id)
    if request.attempt < 0:
        yield FieldViolation("attempt", "must not be negative")
    if request.channel not in run_pb.OutputChannel.values():
        yield _unknown("channel", request.channel)
    if request.offset < 0:
        yield FieldViolation("offset", "must not be negative")


def list_recovered(request: recovery_pb.ListRecoveredRequest) -> Violations:
    """Check a request for a page of recovered runs."""
    yield from recovered_filter(request.filter)
    yield from _view(request.view)
    yield from _page_size(request.page_size)


def plan_recovery(request: recovery_pb.PlanRecoveryRequest) -> Violations:
    """Check a request for a page of the plan."""
    yield from _page_size(request.page_size)


def recovered_filter(wanted: recovery_pb.RecoveredFilter) -> Violations:
    """Check a filter of decisions."""
    for at, state in enumerate(wanted.recovery_states):
        if state == run_pb2.RECOVERY_STATE_NONE:
            yield FieldViolation(
                f"filter.recovery_states[{at}]",
                "must not be NONE, the state of runs without a decision",
            )
        elif state and state not in enums.RECOVERY_STATE_FROM_PROTO:
            yield _unknown(f"filter.recovery_states[{at}]", state)
    yield from _name("filter.recovery_reason", wanted.recovery_reason)
    yield from _name("filter.engine", wanted.engine)
    yield from _label_filter(wanted.labels)
    yield from _time_range(wanted, "recovered_after", "recovered_before")
    if wanted.reconciliation_id:
        yield from reconciliation_id_violations(
            wanted.reconciliation_id, field="filter.reconciliation_id"
        )


def list_reconciliations(request: recovery_pb.ListReconciliationsRequest) -> Violations:
    """Check a request for a page of reports."""
    yield from _page_size(request.page_size)


# -- fields ------------------------------------------------------------------------------------


def run_id_violations(run_id: str) -> Violations:
    """Check a run's id."""
    if not run_id:
        yield FieldViolation("run_id", "is required")
    elif not RUN_ID.fullmatch(run_id):
        yield FieldViolation("run_id", f"must match {RUN_ID.pattern}")


def reconciliation_id_violations(
    reconciliation_id: str, *, field: str = "reconciliation_id"
) -> Violations:
    """Check a report's id."""
    if not reconciliation_id:
        yield FieldViolation(field, "is required")
    elif not UUID.fullmatch(reconciliation_id):
        yield FieldViolation(field, "must be a UUID")


def _required_name(field: str, text: str) -> Violations:
    if not text:
        yield FieldViolation(field, "is required")
    yield from _name(field, text)


def _name(field: str, text: str) -> Violations:
    if len(text) > MAX_NAME_CHARS:
        yield FieldViolation(field, f"must be at most {MAX_NAME_CHARS} characters")
    if "\0" in text:
        yield FieldViolation(field, "must not contain a NUL character")


def _label_filter(labels: Mapping[str, str]) -> Violations:
    yield from _labels(labels, name="filter.labels", most=MAX_LABELS_FILTERED)


def _labels(
    labels: Mapping[str, str], *, name: str = "labels", most: int = MAX_LABELS
) -> Violations:
    if len(labels) > most:
        yield FieldViolation(name, f"must be at most {most}")
    for key, value in sorted(labels.items()):
        field = f"{name}[{clip(key, 70)!r}]"
        if not LABEL_KEY.fullmatch(key):
            yield FieldViolation(field, f"the key must match {LABEL_KEY.pattern}")
        if len(value) > MAX_LABEL_CHARS:
            yield FieldViolation(field, f"must be at most {MAX_LABEL_CHARS} characters")
        if "\0" in value:
            yield FieldViolation(field, "must not contain a NUL character")


def _json(field: str, value: Struct | Value) -> Violations:
    try:
        if isinstance(value, Struct):
            json_values.read_struct(value)
        else:
            json_values.read_value(value)
    except json_values.InvalidJson as bad:
        yield FieldViolation(field, str(bad))


def _request_id(request_id: str) -> Violations:
    if request_id and not UUID.fullmatch(request_id):
        yield FieldViolation("request_id", "must be a UUID")


def _page_size(size: int) -> Violations:
    if size < 0:
        yield FieldViolation("page_size", "must not be negative")


def _view(view: int) -> Violations:
    if view not in enums.VIEW_FROM_PROTO:
        yield _unknown("view", view)


def _time_range(
    wanted: run_pb.RunFilter | recovery_pb.RecoveredFilter, after: str, before: str
) -> Violations:
    bounds = []
    for name in (after, before):
        try:
            if times.read_optional_time(wanted, name) is not None:
                # Compared exactly: the rounded times of two different bounds may be equal.
                stamp = getattr(wanted, name)
                bounds.append((stamp.seconds, stamp.nanos))
        except ValueError as error:
            yield FieldViolation(f"filter.{name}", str(error))
    if len(bounds) == 2 and bounds[0] >= bounds[1]:
        yield FieldViolation(f"filter.{after}", f"must be before {before}")


def _unknown(field: str, number: int) -> FieldViolation:
    return FieldViolation(field, f"{number} is not a known value")
