from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from runrecovery.v1 import errors_pb2
from runrecovery_service.domain import errors as domain
from runrecovery_service.domain.errors import FieldViolation, RunRecoveryError
from runrecovery_service.rpc import errors

EXAMPLES: tuple[RunRecoveryError, ...] = (
    domain.RunNotFound("r1"),
    domain.RequestedRunRemoved("q1"),
    domain.OutputRemoved("r1"),
    domain.DecisionsPruned(),
    domain.ReconciliationNotFound("c1"),
    domain.InvalidFields((FieldViolation("run_id", "is required"),)),
    domain.UnknownEngine("x", ("demo", "reviewer")),
    domain.PageTokenInvalid(),
    domain.PageTokenMismatch(),
    domain.RunAlreadyExists("r1"),
    domain.RequestIdReused("q1"),
    domain.RunNotWaiting("r1"),
    domain.InteractionSuperseded("r1"),
    domain.RunAlreadyTerminal("r1"),
    domain.RunQuarantined("r1"),
    domain.RunOfAnotherInstance("r1", "b"),
    domain.EtagMismatch("r1", "5-2"),
    domain.ReconciliationInProgress(retry_after_s=2.5),
    domain.ShuttingDown(),
    domain.SafeMode(),
    domain.StorageBusy(),
    domain.StorageUnavailable(),
    domain.Overloaded(),
    domain.StorageFull(),
    domain.SlowReader(),
    domain.RunNotReopenable("r1", "its window is over"),
    domain.SessionNotResumable("r1", "no handle was kept"),
    domain.WatchCursorInvalid(),
    domain.WatchHistoryPruned("r1", 7),
    domain.WatchSequenceUnknown("r1", 3),
    domain.OutputOutOfRange("r1", "too far"),
    domain.CallerUnknown("the call has no token"),
    domain.RoleNotSufficient("ci", role="VIEWER", needed="OPERATOR"),
    domain.EngineNotAllowed("ci", "e1"),
    domain.CallerOverloaded("ci", limit="calls in a second"),
    domain.Fenced("instance 'secret'"),
    domain.ClaimLost("instance 'secret'"),
    domain.CommitsLost("secret"),
    domain.RunGone("run 'secret'"),
)


def leaves(kind: type[RunRecoveryError] = RunRecoveryError) -> Iterator[type[RunRecoveryError]]:
    below = kind.__subclasses__()
    if not below:
        yield kind
    for one in below:
        yield from leaves(one)


def details_of(failure: errors.CallStatus) -> dict[str, Any]:
    packed = dict(failure.trailers)[errors.STATUS_TRAILER]
    assert isinstance(packed, bytes)
    status = status_pb2.Status.FromString(packed)
    assert (status.code, status.message) == (failure.code.value[0], failure.message)
    found = {}
    for detail in status.details:
        name = detail.TypeName().rpartition(".")[2]
        found[name] = getattr(error_details_pb2, name)()
        assert detail.Unpack(found[name])
    return found


def test_every_domain_error_is_in_the_table() -> None:
    assert {*leaves(), domain.Fenced, domain.CommitsLost} == set(errors.TABLE)
    assert {type(example) for example in EXAMPLES} == set(errors.TABLE)


def test_every_reason_of_the_contract_has_a_domain_error() -> None:
    told = {case.reason for case in errors.TABLE.values()}
    elsewhere = {errors_pb2.ERROR_REASON_UNSPECIFIED, errors_pb2.ERROR_REASON_INTERNAL}

    assert told | elsewhere == set(errors_pb2.ErrorReason.values())


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_error_becomes_a_status_with_its_reason(error: RunRecoveryError) -> None:
    case = errors.TABLE[type(error)]

    failure = errors.status_of(error)

    info = details_of(failure)["ErrorInfo"]
    reason = errors_pb2.ErrorReason.Name(case.reason)
    assert (failure.code, f"ERROR_REASON_{info.reason}") == (case.code, reason)
    assert info.domain == "runrecovery"
    assert failure.message


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_an_error_that_can_be_retried_has_a_delay_in_details_and_trailer(
    error: RunRecoveryError,
) -> None:
    failure = errors.status_of(error)

    retriable = failure.code in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert ("RetryInfo" in details_of(failure)) is retriable
    assert (errors.PUSHBACK_TRAILER in dict(failure.trailers)) is retriable


def test_retry_delay_is_the_errors_own() -> None:
    failure = errors.status_of(domain.ReconciliationInProgress(retry_after_s=2.5))

    delay = details_of(failure)["RetryInfo"].retry_delay
    assert (delay.seconds, delay.nanos) == (2, 500_000_000)
    assert dict(failure.trailers)[errors.PUSHBACK_TRAILER] == "2500"


def test_a_retry_delay_is_never_0_which_grpc_takes_for_never() -> None:
    failure = errors.status_of(domain.ReconciliationInProgress(retry_after_s=0.0))

    assert dict(failure.trailers)[errors.PUSHBACK_TRAILER] == "1"


def test_known_engines_and_current_etag_are_metadata() -> None:
    unknown = details_of(errors.status_of(domain.UnknownEngine("x", ("a", "b"))))["ErrorInfo"]
    changed = details_of(errors.status_of(domain.EtagMismatch("r1", "5-2")))["ErrorInfo"]

    assert dict(unknown.metadata) == {"known_engines": "a,b"}
    assert dict(changed.metadata) == {"current_etag": "5-2"}


def test_all_bad_fields_are_reported_at_once() -> None:
    bad = tuple(FieldViolation(f"field{n}", "is bad") for n in range(20))

    told = details_of(errors.status_of(domain.InvalidFields(bad)))["BadRequest"].field_violations

    assert [v.field for v in told] == [v.field for v in bad]


def test_more_than_twenty_bad_fields_are_truncated() -> None:
    bad = tuple(FieldViolation(f"field{n}", "is bad") for n in range(50))

    told = details_of(errors.status_of(domain.InvalidFields(bad)))["BadRequest"].field_violations

    assert len(told) == 21
    assert (told[-1].field, told[-1].description) == ("truncated", "30 more")


@pytest.mark.parametrize("letter", ["x", "é", "\U0001f600"], ids=ascii)
def test_status_stays_below_the_size_that_a_client_accepts(letter: str) -> None:
    # Only ASCII arrives as one byte of a trailer; the message is percent-encoded beside it.
    long = letter * 5000
    bad = tuple(FieldViolation(long, long) for _ in range(500))
    for error in (domain.InvalidFields(bad), domain.UnknownEngine(long, (long,) * 50)):
        failure = errors.status_of(error)

        packed = dict(failure.trailers)[errors.STATUS_TRAILER]
        assert len(packed) * 4 / 3 + len(failure.message.encode()) * 3 < 8000


def test_a_defect_sends_nothing_but_its_id() -> None:
    failure = errors.internal_status("abc")

    assert failure.message == "internal error abc"
    assert dict(details_of(failure)["ErrorInfo"].metadata) == {"error_id": "abc"}


def test_a_fenced_instance_does_not_say_what_it_lost() -> None:
    assert "secret" not in repr(errors.status_of(domain.Fenced("instance 'secret'")))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (domain.Fenced, "this instance was superseded and is stopping"),
        (domain.ClaimLost, "the database lost this instance's claim; the instance is stopping"),
        (domain.CommitsLost, "the database lost commits; this instance is stopping"),
        (domain.RunGone, "the database lost a commit; this instance is stopping"),
    ],
)
def test_only_a_superseded_instance_says_that_it_is(
    kind: type[domain.Fenced], message: str
) -> None:
    assert errors.status_of(kind("x")).message == message


def test_long_text_is_clipped_within_its_limit() -> None:
    assert errors.clip("x" * 300) == "x" * 199 + "…"
    assert len(errors.clip_bytes("é" * 300, 100).encode()) <= 100


ANSWERED_AS = {
    "ClaimLost": ("UNAVAILABLE", "SHUTTING_DOWN", True),
    "CommitsLost": ("UNAVAILABLE", "SHUTTING_DOWN", True),
    "EtagMismatch": ("ABORTED", "ETAG_MISMATCH", False),
    "CallerUnknown": ("UNAUTHENTICATED", "CALLER_UNKNOWN", False),
    "RoleNotSufficient": ("PERMISSION_DENIED", "ROLE_NOT_SUFFICIENT", False),
    "EngineNotAllowed": ("PERMISSION_DENIED", "ENGINE_NOT_ALLOWED", False),
    "CallerOverloaded": ("RESOURCE_EXHAUSTED", "CALLER_OVERLOADED", True),
    "Fenced": ("UNAVAILABLE", "SHUTTING_DOWN", True),
    "InteractionSuperseded": ("FAILED_PRECONDITION", "INTERACTION_SUPERSEDED", False),
    "InvalidFields": ("INVALID_ARGUMENT", "INVALID_FIELD", False),
    "OutputRemoved": ("NOT_FOUND", "OUTPUT_REMOVED", False),
    "RequestedRunRemoved": ("NOT_FOUND", "RUN_NOT_FOUND", False),
    "DecisionsPruned": ("OUT_OF_RANGE", "WATCH_HISTORY_PRUNED", False),
    "OutputOutOfRange": ("OUT_OF_RANGE", "OUTPUT_OUT_OF_RANGE", False),
    "Overloaded": ("RESOURCE_EXHAUSTED", "OVERLOADED", True),
    "PageTokenInvalid": ("INVALID_ARGUMENT", "PAGE_TOKEN_INVALID", False),
    "PageTokenMismatch": ("INVALID_ARGUMENT", "PAGE_TOKEN_MISMATCH", False),
    "ReconciliationInProgress": ("UNAVAILABLE", "RECONCILIATION_IN_PROGRESS", True),
    "ReconciliationNotFound": ("NOT_FOUND", "RECONCILIATION_NOT_FOUND", False),
    "RequestIdReused": ("ALREADY_EXISTS", "REQUEST_ID_REUSED", False),
    "RunAlreadyExists": ("ALREADY_EXISTS", "RUN_ALREADY_EXISTS", False),
    "RunAlreadyTerminal": ("FAILED_PRECONDITION", "RUN_ALREADY_TERMINAL", False),
    "RunGone": ("UNAVAILABLE", "SHUTTING_DOWN", True),
    "RunNotFound": ("NOT_FOUND", "RUN_NOT_FOUND", False),
    "RunNotReopenable": ("FAILED_PRECONDITION", "RUN_NOT_REOPENABLE", False),
    "RunNotWaiting": ("FAILED_PRECONDITION", "RUN_NOT_WAITING", False),
    "RunOfAnotherInstance": ("FAILED_PRECONDITION", "RUN_OF_ANOTHER_INSTANCE", False),
    "RunQuarantined": ("FAILED_PRECONDITION", "RUN_QUARANTINED", False),
    "SafeMode": ("UNAVAILABLE", "SAFE_MODE", True),
    "SessionNotResumable": ("FAILED_PRECONDITION", "SESSION_NOT_RESUMABLE", False),
    "ShuttingDown": ("UNAVAILABLE", "SHUTTING_DOWN", True),
    "SlowReader": ("RESOURCE_EXHAUSTED", "SLOW_READER", True),
    "StorageBusy": ("UNAVAILABLE", "STORAGE_BUSY", True),
    "StorageFull": ("RESOURCE_EXHAUSTED", "STORAGE_FULL", True),
    "StorageUnavailable": ("UNAVAILABLE", "STORAGE_UNAVAILABLE", True),
    "UnknownEngine": ("INVALID_ARGUMENT", "UNKNOWN_ENGINE", False),
    "WatchCursorInvalid": ("INVALID_ARGUMENT", "WATCH_CURSOR_INVALID", False),
    "WatchHistoryPruned": ("OUT_OF_RANGE", "WATCH_HISTORY_PRUNED", False),
    "WatchSequenceUnknown": ("OUT_OF_RANGE", "WATCH_SEQUENCE_UNKNOWN", False),
}
"""By class: the code, the reason, and whether a retry may help. Literal, not from the table."""


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_each_error_has_the_code_and_reason_of_the_contract(error: RunRecoveryError) -> None:
    failure = errors.status_of(error)
    details = details_of(failure)

    assert (failure.code.name, details["ErrorInfo"].reason, "RetryInfo" in details) == ANSWERED_AS[
        type(error).__name__
    ]
    assert len(ANSWERED_AS) == len(EXAMPLES)
