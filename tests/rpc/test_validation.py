from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, cast
from uuid import UUID

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as run_pb
from runrecovery_service.domain.errors import FieldViolation, InvalidFields
from runrecovery_service.domain.run import Profile
from runrecovery_service.domain.usage import Budget
from runrecovery_service.engines.catalog import Engine
from runrecovery_service.engines.codex import CODEX
from runrecovery_service.rpc import times, validation
from runrecovery_service.rpc.run_service import make_receipt
from runrecovery_service.rpc.uuid7 import uuid7

REQUEST_ID = "0192f0c1-aaaa-4bbb-8ccc-0123456789ab"
UNKNOWN: Any = 99
STICKY = run_pb2.INTERACTIVE_PROFILE_KIND_STICKY_PROCESS


def fields(violations: Iterable[FieldViolation]) -> list[str]:
    return [violation.field for violation in violations]


def bad_create() -> run_pb.CreateRunRequest:
    request = run_pb.CreateRunRequest(
        run_id="Not/an/id",
        labels={"Key": "x", "long": "x" * 257, "nul": "\0"},
        restart_policy=UNKNOWN,
        interactive_profile=run_pb2.InteractiveProfile(kind=UNKNOWN),
        request_id="17",
    )
    request.input.fields["n"].number_value = math.nan
    return request


def test_all_problems_of_a_request_are_reported_at_once() -> None:
    assert fields(validation.create_run(bad_create())) == [
        "run_id",
        "engine",
        "labels['Key']",
        "labels['long']",
        "labels['nul']",
        "input",
        "restart_policy",
        "interactive_profile.kind",
        "request_id",
    ]


def test_bad_fields_are_raised_together() -> None:
    with pytest.raises(InvalidFields) as caught:
        validation.require_valid(validation.create_run(bad_create()))

    assert len(caught.value.violations) == 9


@pytest.mark.parametrize(
    ("request_", "check"),
    [
        (run_pb.CreateRunRequest(engine="demo"), validation.create_run),
        (
            run_pb.CreateRunRequest(
                engine="demo",
                run_id="a" * 64,
                labels={f"k{n}": "é" * 256 for n in range(32)},
                restart_policy=run_pb2.RESTART_POLICY_REQUEUE,
                interactive_profile=run_pb2.InteractiveProfile(kind=STICKY),
                request_id=REQUEST_ID.upper(),
            ),
            validation.create_run,
        ),
        (run_pb.ListRunsRequest(page_size=5000), validation.list_runs),
        (
            run_pb.ListRunsRequest(
                filter=run_pb.RunFilter(
                    statuses=[run_pb2.RUN_STATUS_UNSPECIFIED, run_pb2.RUN_STATUS_QUEUED],
                    created_after=Timestamp(seconds=253_402_300_799, nanos=999_999_998),
                    created_before=Timestamp(seconds=253_402_300_799, nanos=999_999_999),
                )
            ),
            validation.list_runs,
        ),
        (
            run_pb.ListRunsRequest(
                filter=run_pb.RunFilter(
                    created_after=Timestamp(nanos=1), created_before=Timestamp(nanos=2)
                )
            ),
            validation.list_runs,
        ),
        (recovery_pb.ListRecoveredRequest(), validation.list_recovered),
        (
            recovery_pb.ListRecoveredRequest(
                filter=recovery_pb.RecoveredFilter(
                    recovery_states=[
                        run_pb2.RECOVERY_STATE_UNSPECIFIED,
                        run_pb2.RECOVERY_STATE_QUARANTINED,
                    ],
                    recovered_after=Timestamp(seconds=1),
                    recovered_before=Timestamp(seconds=2),
                    reconciliation_id=REQUEST_ID,
                )
            ),
            validation.list_recovered,
        ),
        (recovery_pb.ListReconciliationsRequest(), validation.list_reconciliations),
        (run_pb.CancelRunRequest(run_id="r1", request_id=REQUEST_ID), validation.cancel_run),
        (run_pb.ListInteractionsRequest(run_id="r1"), validation.list_interactions),
        (
            run_pb.StreamOutputRequest(run_id="r1", attempt=2, channel=2, offset=7),  # type: ignore[arg-type]
            validation.stream_output,
        ),
    ],
)
def test_good_request_has_no_violations(request_: Message, check: Any) -> None:
    assert list(check(request_)) == []


@pytest.mark.parametrize(
    ("request_", "check", "bad"),
    [
        (run_pb.CreateRunRequest(engine="x" * 201), validation.create_run, ["engine"]),
        (run_pb.CreateRunRequest(engine="a\0b"), validation.create_run, ["engine"]),
        (
            run_pb.CreateRunRequest(engine="demo", labels={f"k{n}": "" for n in range(33)}),
            validation.create_run,
            ["labels"],
        ),
        (
            run_pb.ListRunsRequest(
                page_size=-1,
                filter=run_pb.RunFilter(
                    statuses=[run_pb2.RUN_STATUS_QUEUED, run_pb2.RUN_STATUS_UNSPECIFIED, UNKNOWN]
                ),
            ),
            validation.list_runs,
            ["filter.statuses[2]", "page_size"],
        ),
        (
            run_pb.SubmitReplyRequest(request_id="x", etag="\0"),
            validation.submit_reply,
            ["run_id", "interaction_id", "response", "request_id", "etag"],
        ),
        (run_pb.CancelRunRequest(run_id="-a"), validation.cancel_run, ["run_id"]),
        (run_pb.CancelRunRequest(run_id="a\n"), validation.cancel_run, ["run_id"]),
        (
            run_pb.ListInteractionsRequest(run_id="a" * 65, page_size=-5),
            validation.list_interactions,
            ["run_id", "page_size"],
        ),
        (
            run_pb.StreamOutputRequest(run_id="r1", attempt=-1, channel=UNKNOWN, offset=-1),
            validation.stream_output,
            ["attempt", "channel", "offset"],
        ),
        (
            recovery_pb.ListRecoveredRequest(
                filter=recovery_pb.RecoveredFilter(
                    recovery_states=[run_pb2.RECOVERY_STATE_NONE, UNKNOWN],
                    recovery_reason="\0",
                    recovered_after=Timestamp(seconds=2),
                    recovered_before=Timestamp(seconds=2),
                    reconciliation_id="17",
                ),
                page_size=-1,
            ),
            validation.list_recovered,
            [
                "filter.recovery_states[0]",
                "filter.recovery_states[1]",
                "filter.recovery_reason",
                "filter.recovered_after",
                "filter.reconciliation_id",
                "page_size",
            ],
        ),
        (
            recovery_pb.ListRecoveredRequest(
                filter=recovery_pb.RecoveredFilter(
                    recovered_after=Timestamp(nanos=-1), recovered_before=Timestamp(seconds=2**60)
                )
            ),
            validation.list_recovered,
            ["filter.recovered_after", "filter.recovered_before"],
        ),
        (
            recovery_pb.ListReconciliationsRequest(page_size=-1),
            validation.list_reconciliations,
            ["page_size"],
        ),
    ],
)
def test_bad_field_is_named_by_its_path(request_: Message, check: Any, bad: list[str]) -> None:
    assert fields(check(request_)) == bad


def test_reply_of_null_is_an_answer() -> None:
    request = run_pb.SubmitReplyRequest(run_id="r1", interaction_id=1)
    request.response.null_value = 0  # type: ignore[assignment]

    assert list(validation.submit_reply(request)) == []


@pytest.mark.parametrize("report", ["", "x", REQUEST_ID + "0", "{" + REQUEST_ID + "}"])
def test_report_id_must_be_a_uuid(report: str) -> None:
    assert fields(validation.reconciliation_id_violations(report)) == ["reconciliation_id"]


@pytest.mark.parametrize("run_id", ["", "A", "_a", "a b", "a\n", "a" * 65, "ä", "a/b", "a\0"])
def test_quick_check_refuses_a_bad_run_id(run_id: str) -> None:
    with pytest.raises(InvalidFields):
        validation.require_run_id(run_id)


def test_profile_may_be_unset_or_the_engines_own() -> None:
    unset = run_pb.CreateRunRequest(engine="e")
    wish = run_pb.CreateRunRequest(engine="e")
    wish.interactive_profile.kind = STICKY

    assert not list(validation.fits_engine(unset, engine(Profile.RESUMABLE)))
    assert not list(validation.fits_engine(wish, engine(Profile.STICKY_PROCESS)))
    assert fields(validation.fits_engine(wish, engine(Profile.RESUMABLE))) == [
        "interactive_profile.kind"
    ]


@pytest.mark.parametrize(
    ("seconds", "refused"), [(0.1, False), (60, False), (60.001, True), (0, True), (-1, True)]
)
def test_a_wait_may_be_as_long_as_the_engines_own(*, seconds: float, refused: bool) -> None:
    request = run_pb.CreateRunRequest(engine="e")
    times.write_duration(request.interactive_profile.session_timeout, seconds)

    found = [
        *validation.create_run(request),
        *validation.fits_engine(request, engine(Profile.RESUMABLE)),
    ]

    assert fields(found) == ["interactive_profile.session_timeout"] * refused


@pytest.mark.parametrize(
    ("wanted", "bad"),
    [
        ({}, []),
        ({"max_tokens": 100, "max_cost_usd": 2.0}, []),
        ({"max_tokens": 1, "max_cost_usd": 1e-6}, []),
        ({"max_tokens": 101, "max_cost_usd": 2.01}, ["max_tokens", "max_cost_usd"]),
        ({"max_tokens": 0, "max_cost_usd": 0}, ["max_tokens", "max_cost_usd"]),
        ({"max_tokens": -1, "max_cost_usd": float("nan")}, ["max_tokens", "max_cost_usd"]),
    ],
)
def test_a_budget_may_be_as_large_as_the_engines_own(
    wanted: dict[str, Any], bad: list[str]
) -> None:
    request = run_pb.CreateRunRequest(engine="e", **wanted)
    own = replace(
        engine(Profile.RESUMABLE), budget=Budget(max_tokens=100, max_cost_nanos=2_000_000_000)
    )

    found = [*validation.create_run(request), *validation.fits_engine(request, own)]

    assert fields(found) == bad


def test_a_cost_is_no_budget_for_an_engine_that_reports_none() -> None:
    request = run_pb.CreateRunRequest(engine="e", max_cost_usd=1)
    codex = replace(engine(Profile.RESUMABLE), dialect=CODEX)

    assert fields(validation.fits_engine(request, codex)) == ["max_cost_usd"]


@pytest.mark.parametrize("too_many", [0, 1])
def test_the_limits_of_a_request_are_the_documented_ones(too_many: int) -> None:
    labels = {f"k{number}": "" for number in range(32 + too_many)}
    create = [
        run_pb.CreateRunRequest(engine="e", labels=labels),
        run_pb.CreateRunRequest(engine="e", labels={"k": "v" * (256 + too_many)}),
        run_pb.CreateRunRequest(engine="e", labels={"k" * (63 + too_many): "v"}),
        run_pb.CreateRunRequest(engine="e" * (200 + too_many)),
        run_pb.CreateRunRequest(engine="e", run_id="r" * (64 + too_many)),
    ]
    few = {f"k{number}": "" for number in range(8 + too_many)}
    listed = run_pb.ListRunsRequest(filter=run_pb.RunFilter(labels=few))
    reopen = run_pb.ReopenRunRequest(run_id="r", session_handle="h" * (4096 + too_many))

    found = [
        *(len(fields(validation.create_run(request))) for request in create),
        len(fields(validation.list_runs(listed))),
        len(fields(validation.reopen_run(reopen))),
    ]

    assert found == [too_many] * 7


@pytest.mark.parametrize(
    "span",
    [
        {"seconds": 2**63 - 1}, {"seconds": -(2**63)}, {"nanos": 2**31 - 1},
        {"seconds": 1, "nanos": -1}, {"seconds": 315_576_000_001},
    ],
)  # fmt: skip
def test_an_invalid_duration_is_refused(span: dict[str, int]) -> None:
    request = run_pb.CreateRunRequest(engine="e")
    request.interactive_profile.session_timeout.CopyFrom(Duration(**span))

    assert fields(validation.create_run(request)) == ["interactive_profile.session_timeout"]


def engine(profile: Profile) -> Engine:
    return Engine(
        name="e",
        command=("e",),
        profile=profile,
        env_allow=(),
        max_concurrent=None,
        session_file=None,
        session_timeout_s=60.0,
    )


def test_a_filter_has_at_most_8_valid_labels_and_an_ordered_time_range() -> None:
    request = run_pb.ListRunsRequest(view=cast("run_pb2.RunView.ValueType", 9))
    request.filter.labels.update({f"k{number}": "v" for number in range(9)})
    request.filter.labels["UPPER"] = "v"
    request.filter.created_after.seconds = 2
    request.filter.created_before.seconds = 1

    assert fields(validation.list_runs(request)) == [
        "filter.labels", "filter.labels['UPPER']", "filter.created_after", "view"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (run_pb.ReopenRunRequest(run_id="r"), "session"),
        (run_pb.ReopenRunRequest(run_id="r", keep_session=False), "keep_session"),
        (run_pb.ReopenRunRequest(run_id="r", session_handle=""), "session_handle"),
        (run_pb.ReopenRunRequest(run_id="r", session_handle="a\0"), "session_handle"),
        (run_pb.ReopenRunRequest(run_id="r", session_handle="a" * 4097), "session_handle"),
        (run_pb.ReopenRunRequest(run_id="", keep_session=True), "run_id"),
    ],
)
def test_a_reopening_must_say_which_session_it_uses(
    request_: run_pb.ReopenRunRequest, field: str
) -> None:
    assert fields(validation.reopen_run(request_)) == [field]


def test_a_watch_from_a_negative_sequence_is_refused() -> None:
    request = run_pb.WatchRunRequest(run_id="r", after_sequence=-1)

    assert fields(validation.watch_run(request)) == ["after_sequence"]


def test_a_receipt_covers_the_payload_without_the_request_id() -> None:
    first = run_pb.CancelRunRequest(run_id="r1", request_id=REQUEST_ID)
    same = run_pb.CancelRunRequest(run_id="r1", request_id=REQUEST_ID.upper())
    other = run_pb.CancelRunRequest(run_id="r2", request_id=REQUEST_ID)

    made = make_receipt(first)
    assert made is not None
    assert (made.request_id, made.method, len(made.fingerprint)) == (REQUEST_ID, "CancelRun", 32)
    assert made == make_receipt(same)
    assert made != make_receipt(other)
    assert make_receipt(run_pb.CancelRunRequest(run_id="r1")) is None
    assert first.request_id == REQUEST_ID


def test_receipt_does_not_depend_on_the_order_of_labels() -> None:
    there = {f"k{n}": "v" for n in range(20)}
    back = dict(reversed(there.items()))

    assert make_receipt(
        run_pb.CreateRunRequest(engine="demo", labels=there, request_id=REQUEST_ID)
    ) == make_receipt(run_pb.CreateRunRequest(engine="demo", labels=back, request_id=REQUEST_ID))


@pytest.mark.parametrize("random", [b"\0" * 10, b"\xff" * 10])
def test_uuid7_holds_the_time_and_its_version(random: bytes) -> None:
    made = uuid7(datetime(2026, 11, 24, 0, 0, 0, 5999, tzinfo=UTC), random)

    assert isinstance(made, UUID)
    assert (made.version, made.variant) == (7, "specified in RFC 4122")
    assert made.int >> 80 == 1_795_478_400_005
    assert validation.RUN_ID.fullmatch(str(made))


def test_uuid7_sorts_by_time() -> None:
    earlier = uuid7(datetime(2026, 11, 24, tzinfo=UTC), b"\xff" * 10)
    later = uuid7(datetime(2026, 11, 24, 0, 0, 0, 1000, tzinfo=UTC), b"\0" * 10)

    assert str(earlier) < str(later)
