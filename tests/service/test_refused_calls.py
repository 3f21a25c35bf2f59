"""Invalid requests get their documented refusals and change nothing."""

from __future__ import annotations

import base64
import math
import uuid
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import grpc
import pytest
from google.protobuf.struct_pb2 import ListValue, Struct, Value
from google.protobuf.timestamp_pb2 import Timestamp
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, Refusal, refused, status_word, struct, value
from support.service import Home

Code = grpc.StatusCode
QUESTION: Final = {"kind": "open_text", "prompt": "What next?"}
TIMEOUT_S: Final = 10.0


def new_id() -> str:
    return f"r-{uuid.uuid4()}"


def waiting(api: Api, *, questions: int = 1) -> run_pb2.Run:
    """Return a run that waits for the answer to its first question."""
    run = api.create("resumable", {"questions": [QUESTION] * questions}, run_id=new_id())
    return api.until_status(run.run_id, "WAITING_USER")


def succeeded(api: Api) -> run_pb2.Run:
    """Return a run that has SUCCEEDED."""
    return api.until_status(api.create("resumable", {}).run_id, "SUCCEEDED")


def create(api: Api, **fields: Any) -> Callable[[], object]:
    request = pb.CreateRunRequest(**fields)
    return lambda: api.runs.CreateRun(request, timeout=TIMEOUT_S)


def raw_call(api: Api, method: str) -> Callable[[bytes], object]:
    """Return a call of RunService that sends bytes as they are."""
    call: Any = api.channel.unary_unary(f"/runrecovery.v1.RunService/{method}")
    return lambda request: call(request, timeout=TIMEOUT_S)


def assert_refused_as(refusal: Refusal, code: grpc.StatusCode, reason: str) -> None:
    assert (refusal.code, refusal.reason) == (code, reason), refusal
    assert refusal.domain == "runrecovery"
    assert refusal.message


def assert_bad(refusal: Refusal, *fields: str) -> None:
    assert_refused_as(refusal, Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert refusal.fields == fields


# -- unknown objects ----------------------------------------------------------------------------


def test_every_method_answers_not_found_for_an_unknown_run(api: Api) -> None:
    run_id = new_id()
    calls: list[Callable[[], object]] = [
        lambda: api.get(run_id),
        lambda: api.reply(run_id, 1, "yes"),
        lambda: api.cancel(run_id),
        lambda: api.interactions(run_id),
        lambda: api.output(run_id),
        lambda: api.recovery_info(run_id),
    ]

    for call in calls:
        refusal = refused(call)
        assert_refused_as(refusal, Code.NOT_FOUND, "RUN_NOT_FOUND")
        assert refusal.resource == run_id


def test_an_unknown_report_is_not_found(api: Api) -> None:
    wanted = str(uuid.uuid4())
    request = recovery_pb.GetReconciliationRequest(reconciliation_id=wanted)

    refusal = refused(lambda: api.recovery.GetReconciliation(request, timeout=TIMEOUT_S))

    assert_refused_as(refusal, Code.NOT_FOUND, "RECONCILIATION_NOT_FOUND")
    assert refusal.resource == wanted


def test_an_unknown_engine_is_refused_with_the_names_that_are_known(api: Api, home: Home) -> None:
    run_id = new_id()

    refusal = refused(create(api, run_id=run_id, engine="gpt-9"))

    assert_refused_as(refusal, Code.INVALID_ARGUMENT, "UNKNOWN_ENGINE")
    assert refusal.metadata["known_engines"].split(",") == sorted(home.engines)
    assert refused(lambda: api.get(run_id)).reason == "RUN_NOT_FOUND"


def test_an_unknown_method_is_unimplemented(api: Api) -> None:
    call = raw_call(api, "DeleteEverything")

    assert refused(lambda: call(b"")).code is Code.UNIMPLEMENTED


# -- invalid requests ---------------------------------------------------------------------------


def test_all_bad_fields_are_reported_at_once(api: Api) -> None:
    run_id = new_id()
    request = pb.CreateRunRequest(
        run_id="Not An Id",
        engine="",
        labels={"UPPER": "x", "long": "y" * 257},
        input=struct({"a": math.nan}),
        restart_policy=77,  # type: ignore[arg-type] # a newer client's value
        interactive_profile=run_pb2.InteractiveProfile(kind=78),  # type: ignore[arg-type]
        request_id="no-uuid",
    )

    refusal = refused(lambda: api.runs.CreateRun(request, timeout=TIMEOUT_S))

    assert_bad(
        refusal,
        "run_id",
        "engine",
        "labels['UPPER']",
        "labels['long']",
        "input",
        "restart_policy",
        "interactive_profile.kind",
        "request_id",
    )
    assert refused(lambda: api.get(run_id)).reason == "RUN_NOT_FOUND"


def nested(depth: int) -> Struct:
    made = Struct()
    inner = made
    for _ in range(depth - 1):
        inner = inner.fields["in"].struct_value
    inner.fields["at"].string_value = "the bottom"
    return made


def nested_list(depth: int) -> Struct:
    made = Value(string_value="the bottom")
    for _ in range(depth):
        made = Value(list_value=ListValue(values=[made]))
    return Struct(fields={"list": made})


BAD_INPUTS: Final = {
    "NaN": struct({"a": math.nan}),
    "infinity": struct({"a": [1.0, -math.inf]}),
    "NUL in a text": struct({"a": {"b": "x\0y"}}),
    "NUL in a key": struct({"x\0y": 1}),
    "a value without a kind": Struct(fields={"a": Value()}),
    "33 deep": nested(33),
    "lists 33 deep": nested_list(33),
}


@pytest.mark.parametrize("given", BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_an_input_that_cannot_be_kept_is_refused(api: Api, given: Struct) -> None:
    run_id = new_id()

    assert_bad(refused(create(api, run_id=run_id, engine="resumable", input=given)), "input")
    assert refused(lambda: api.get(run_id)).reason == "RUN_NOT_FOUND"


@pytest.mark.parametrize("depth", [90, 100, 1000, 5000])
def test_an_input_of_any_depth_is_refused_and_the_service_lives_on(api: Api, depth: int) -> None:
    # Made by hand: no protobuf library would serialize this.
    bottom = Value(string_value="x").SerializeToString()
    body = bottom
    for _ in range(depth):
        entry = b"\x0a\x01a" + b"\x12" + _sized(body)
        body = b"\x2a" + _sized(b"\x0a" + _sized(entry))
    fields = b"\x0a\x01a\x12" + _sized(body)
    request = b"\x12\x09resumable" + b"\x22" + _sized(b"\x0a" + _sized(fields))
    call = raw_call(api, "CreateRun")

    refusal = refused(lambda: call(request))

    assert_refused_as(refusal, Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert api.health_of() == "SERVING"


def _sized(data: bytes) -> bytes:
    size, prefix = len(data), b""
    while size > 127:
        prefix += bytes([size & 127 | 128])
        size >>= 7
    return prefix + bytes([size]) + data


def test_a_malformed_message_is_refused(api: Api) -> None:
    call = raw_call(api, "GetRun")

    refusal = refused(lambda: call(b"\xff\xff\xff\xff"))

    assert_refused_as(refusal, Code.INVALID_ARGUMENT, "INVALID_FIELD")
    assert refusal.fields == ("GetRunRequest",)


def test_more_labels_than_32_are_refused(api: Api) -> None:
    labels = {f"l{number}": "x" for number in range(33)}

    assert_bad(refused(create(api, engine="resumable", labels=labels)), "labels")


def test_32_labels_are_kept(api: Api) -> None:
    labels = {f"l{number}": "é" * 256 for number in range(32)}

    run = api.create("resumable", labels=labels)

    assert dict(api.get(run.run_id).labels) == labels


def test_nul_in_a_text_is_refused_wherever_it_is(api: Api) -> None:
    run = waiting(api)
    listing = pb.ListRunsRequest(filter=pb.RunFilter(engine="a\0b"))

    assert_bad(refused(create(api, engine="resum\0able")), "engine")
    assert_bad(refused(create(api, engine="resumable", labels={"a": "x\0"})), "labels['a']")
    assert_bad(refused(create(api, engine="resumable", run_id="a\0")), "run_id")
    assert_bad(refused(lambda: api.get("a\0")), "run_id")
    assert_bad(refused(lambda: api.reply(run.run_id, 1, "a\0")), "response")
    assert_bad(refused(lambda: api.runs.ListRuns(listing, timeout=TIMEOUT_S)), "filter.engine")
    assert api.get(run.run_id) == run


def test_the_profile_must_be_the_engines_own(api: Api) -> None:
    profile = run_pb2.InteractiveProfile(kind=run_pb2.INTERACTIVE_PROFILE_KIND_STICKY_PROCESS)

    refusal = refused(create(api, engine="resumable", interactive_profile=profile))

    assert_bad(refusal, "interactive_profile.kind")


def test_a_request_above_the_limit_is_refused_and_one_below_it_is_kept(api: Api) -> None:
    run_id, limit = new_id(), 1 << 20
    large = {"text": "x" * limit}
    small = {"text": "x" * (limit - 1000)}

    refusal = refused(lambda: api.create("resumable", large, run_id=run_id))
    run = api.create("resumable", small)

    assert refusal.code is Code.RESOURCE_EXHAUSTED
    assert refused(lambda: api.get(run_id)).reason == "RUN_NOT_FOUND"
    assert api.get(run.run_id).input["text"] == small["text"]


def test_a_run_id_can_be_used_once(api: Api) -> None:
    run = waiting(api)

    refusal = refused(lambda: api.create("sticky", {}, run_id=run.run_id))

    assert_refused_as(refusal, Code.ALREADY_EXISTS, "RUN_ALREADY_EXISTS")
    assert refusal.resource == run.run_id
    assert api.get(run.run_id) == run


# -- pages ---------------------------------------------------------------------------------------


def page(api: Api, **fields: Any) -> pb.ListRunsResponse:
    return api.runs.ListRuns(pb.ListRunsRequest(**fields), timeout=TIMEOUT_S)


def token_of(api: Api) -> str:
    for _ in range(2):
        api.create("resumable", {})
    token = page(api, page_size=1).next_page_token
    assert token
    return token


def test_a_page_token_is_for_its_own_filter_only(api: Api) -> None:
    token = token_of(api)

    refusal = refused(lambda: page(api, page_token=token, filter=pb.RunFilter(engine="sticky")))

    assert_refused_as(refusal, Code.INVALID_ARGUMENT, "PAGE_TOKEN_MISMATCH")
    assert refusal.fields == ("page_token",)


def test_a_page_token_is_for_its_own_method_only(api: Api) -> None:
    token = token_of(api)
    request = recovery_pb.ListReconciliationsRequest(page_token=token)

    refusal = refused(lambda: api.recovery.ListReconciliations(request, timeout=TIMEOUT_S))

    assert_refused_as(refusal, Code.INVALID_ARGUMENT, "PAGE_TOKEN_MISMATCH")


def test_a_page_token_goes_on_with_another_page_size(api: Api) -> None:
    token = token_of(api)

    assert page(api, page_token=token, page_size=2).runs


def test_every_altered_page_token_is_refused(api: Api) -> None:
    token = token_of(api)
    raw = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
    flipped = [
        base64.urlsafe_b64encode(raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :]).decode()
        for at in range(len(raw))
    ]
    others = [token[:-1], token + "A", token + "=", "A", "é", "\0", "x" * 5000, token.upper()]

    for altered in [text.rstrip("=") for text in flipped] + others:
        refusal = refused(partial(page, api, page_token=altered))
        assert_refused_as(refusal, Code.INVALID_ARGUMENT, "PAGE_TOKEN_INVALID")


def test_a_negative_page_size_is_refused_by_every_listing(api: Api) -> None:
    run = succeeded(api)
    listed = pb.ListInteractionsRequest(run_id=run.run_id, page_size=-1)
    reports = recovery_pb.ListReconciliationsRequest(page_size=-1)
    recovered = recovery_pb.ListRecoveredRequest(page_size=-(2**31))

    assert_bad(refused(lambda: page(api, page_size=-1)), "page_size")
    assert_bad(refused(lambda: api.runs.ListInteractions(listed, timeout=TIMEOUT_S)), "page_size")
    assert_bad(
        refused(lambda: api.recovery.ListReconciliations(reports, timeout=TIMEOUT_S)), "page_size"
    )
    assert_bad(
        refused(lambda: api.recovery.ListRecovered(recovered, timeout=TIMEOUT_S)), "page_size"
    )


def test_a_contradictory_filter_of_recovered_runs_is_refused(api: Api) -> None:
    wanted = recovery_pb.RecoveredFilter(
        recovery_states=[run_pb2.RECOVERY_STATE_NONE, 99],  # type: ignore[list-item]
        recovered_after=Timestamp(seconds=20),
        recovered_before=Timestamp(seconds=10),
        reconciliation_id="latest",
    )
    request = recovery_pb.ListRecoveredRequest(filter=wanted)

    assert_bad(
        refused(lambda: api.recovery.ListRecovered(request, timeout=TIMEOUT_S)),
        "filter.recovery_states[0]",
        "filter.recovery_states[1]",
        "filter.recovered_after",
        "filter.reconciliation_id",
    )


def test_a_filter_by_any_status_and_by_the_last_time_lists_every_run(api: Api) -> None:
    run_id = new_id()
    create(api, run_id=run_id, engine="resumable")()
    last = Timestamp(seconds=253_402_300_799, nanos=999_999_999)
    any_status = [run_pb2.RUN_STATUS_UNSPECIFIED, run_pb2.RUN_STATUS_CANCELED]
    before = pb.RunFilter(statuses=any_status, created_before=last)
    after = pb.RunFilter(statuses=any_status, created_after=last)

    listed = api.runs.ListRuns(pb.ListRunsRequest(filter=before), timeout=TIMEOUT_S)
    none = api.runs.ListRuns(pb.ListRunsRequest(filter=after), timeout=TIMEOUT_S)

    assert listed.runs[0].run_id == run_id
    assert list(none.runs) == []


def test_an_offset_or_attempt_without_output_is_out_of_range(api: Api) -> None:
    run = succeeded(api)

    for wanted in ({"attempt": 2}, {"offset": 10_000_000}, {"offset": 2**63 - 1}):
        refusal = refused(partial(api.output, run.run_id, **wanted))
        assert_refused_as(refusal, Code.OUT_OF_RANGE, "OUTPUT_OUT_OF_RANGE")
    assert_bad(refused(lambda: api.output(run.run_id, attempt=-1, offset=-1)), "attempt", "offset")
    assert_bad(refused(lambda: api.output(run.run_id, channel=9)), "channel")


# -- refusals by the state of the run ------------------------------------------------------------


def test_a_reply_to_a_run_that_does_not_wait_is_refused(api: Api) -> None:
    for run in (succeeded(api), api.create("resumable", {"hold": True})):
        refusal = refused(partial(api.reply, run.run_id, 1, "yes"))
        assert_refused_as(refusal, Code.FAILED_PRECONDITION, "RUN_NOT_WAITING")
        assert "PreconditionFailure" in refusal.details
    api.cancel(run.run_id)


def test_a_reply_to_a_question_that_is_not_open_is_refused(api: Api) -> None:
    run = waiting(api, questions=2)

    future = refused(lambda: api.reply(run.run_id, 2, "early"))
    unchanged = api.get(run.run_id)
    api.reply(run.run_id, 1, "first")
    api.until_status(run.run_id, "WAITING_USER")
    second = api.get(run.run_id)
    old = refused(lambda: api.reply(run.run_id, 1, "changed my mind"))

    assert_refused_as(future, Code.FAILED_PRECONDITION, "INTERACTION_SUPERSEDED")
    assert unchanged == run
    assert_refused_as(old, Code.FAILED_PRECONDITION, "INTERACTION_SUPERSEDED")
    assert second.pending_interaction.interaction_id == 2
    assert api.get(run.run_id) == second


def test_a_reply_without_a_question_or_an_answer_is_refused(api: Api) -> None:
    run = waiting(api)
    empty = pb.SubmitReplyRequest(run_id=run.run_id)

    refusal = refused(lambda: api.runs.SubmitReply(empty, timeout=TIMEOUT_S))

    assert_bad(refusal, "interaction_id", "response")
    assert api.get(run.run_id) == run


@pytest.mark.parametrize(
    "answer", ["yes", None, False, 0, 1e300, [1, "a", None], {"b": 1, "a": {}}]
)
def test_the_same_answer_twice_is_accepted_once(api: Api, answer: object) -> None:
    run = waiting(api)

    api.reply(run.run_id, 1, answer)
    api.reply(run.run_id, 1, answer)
    ended = api.until_status(run.run_id, "SUCCEEDED")
    again = api.reply(run.run_id, 1, answer)
    other = refused(lambda: api.reply(run.run_id, 1, "something else"))

    assert again == ended
    assert ended.output.fields["answers"].list_value.values[0] == value(answer)
    assert_refused_as(other, Code.FAILED_PRECONDITION, "INTERACTION_SUPERSEDED")
    (asked,) = api.interactions(run.run_id)
    assert asked.response == value(answer)


def test_a_run_can_be_canceled_again_and_again(api: Api) -> None:
    run = waiting(api)

    first = api.cancel(run.run_id)
    second = api.cancel(run.run_id)

    assert status_word(first) == "CANCELED"
    assert second == first
    assert not first.HasField("session")
    assert not first.HasField("pending_interaction")
    assert_refused_as(
        refused(lambda: api.reply(run.run_id, 1, "yes")),
        Code.FAILED_PRECONDITION,
        "RUN_NOT_WAITING",
    )


def test_a_run_that_ended_cannot_be_canceled(api: Api) -> None:
    run = succeeded(api)

    refusal = refused(lambda: api.cancel(run.run_id))

    assert_refused_as(refusal, Code.FAILED_PRECONDITION, "RUN_ALREADY_TERMINAL")
    assert api.get(run.run_id) == run


def test_an_old_etag_changes_nothing_and_the_answer_holds_the_new_one(api: Api) -> None:
    run = waiting(api)
    calls = (
        lambda: api.reply(run.run_id, 1, "yes", etag="old"),
        lambda: api.cancel(run.run_id, etag="old"),
    )

    for call in calls:
        refusal = refused(call)
        assert_refused_as(refusal, Code.ABORTED, "ETAG_MISMATCH")
        assert refusal.metadata == {"current_etag": run.etag}
        assert api.get(run.run_id) == run
    api.reply(run.run_id, 1, "yes", etag=run.etag)


# -- repeated requests --------------------------------------------------------------------------


def test_the_same_create_twice_gives_one_run(api: Api) -> None:
    request_id = str(uuid.uuid4())

    first = api.create("resumable", {"a": 1}, labels={"x": "1", "y": "2"}, request_id=request_id)
    second = api.create(
        "resumable", {"a": 1}, labels={"y": "2", "x": "1"}, request_id=request_id.upper()
    )

    assert second.run_id == first.run_id


def test_a_request_id_is_for_one_payload_and_one_method(api: Api) -> None:
    request_id = str(uuid.uuid4())
    run = api.create("resumable", {"a": 1}, request_id=request_id)

    for call in (
        lambda: api.create("resumable", {"a": 2}, request_id=request_id),
        lambda: api.create("resumable", {"a": 1}, run_id=new_id(), request_id=request_id),
        lambda: api.cancel(run.run_id, request_id=request_id),
        lambda: api.reply(run.run_id, 1, "yes", request_id=request_id),
    ):
        assert_refused_as(refused(call), Code.ALREADY_EXISTS, "REQUEST_ID_REUSED")


def test_a_reply_and_a_cancel_can_be_repeated_by_their_request_id(api: Api) -> None:
    run, answered, canceled = waiting(api), str(uuid.uuid4()), str(uuid.uuid4())

    api.reply(run.run_id, 1, "yes", etag=run.etag, request_id=answered)
    api.reply(run.run_id, 1, "yes", etag=run.etag, request_id=answered)
    other = waiting(api)
    api.cancel(other.run_id, etag=other.etag, request_id=canceled)
    again = api.cancel(other.run_id, etag=other.etag, request_id=canceled)

    assert status_word(again) == "CANCELED"
    assert_refused_as(
        refused(lambda: api.reply(run.run_id, 1, "no", request_id=answered)),
        Code.ALREADY_EXISTS,
        "REQUEST_ID_REUSED",
    )


# -- tests with a service of their own ------------------------------------------------------------


def test_a_request_id_is_remembered_after_a_kill(new_home: Callable[..., Home]) -> None:
    home = new_home()
    service, api = home.start()
    request_id = str(uuid.uuid4())
    given = {"questions": [QUESTION]}
    run = api.create("resumable", given, request_id=request_id)
    api.until_status(run.run_id, "WAITING_USER")
    service.kill()
    _, api = home.start()

    again = api.create("resumable", given, request_id=request_id)
    other = refused(lambda: api.create("resumable", {}, request_id=request_id))

    assert again.run_id == run.run_id
    assert_refused_as(other, Code.ALREADY_EXISTS, "REQUEST_ID_REUSED")
    assert len(page(api).runs) == 1


def test_a_page_has_1000_runs_at_most_and_50_by_default(new_home: Callable[..., Home]) -> None:
    home = new_home(max_concurrent=1, engines={"resumable": new_home().engines["resumable"]})
    service, api = home.start()
    api.create("resumable", {})
    assert service.stop() == 0
    with home.store(writable=True) as store:
        columns = [row[1] for row in store.execute("PRAGMA table_info(run)")]
        kept = ", ".join(column for column in columns if column not in {"id", "run_id"})
        store.execute(
            f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 1200)"  # noqa: S608
            f" INSERT INTO run (run_id, {kept}) SELECT 'copy-' || i, {kept} FROM run, n"
        )
    _, api = home.start()

    first = page(api, page_size=5000)
    second = page(api, page_size=1001, page_token=first.next_page_token)

    assert (len(first.runs), len(second.runs)) == (1000, 201)
    assert second.next_page_token == ""
    assert len(page(api).runs) == 50
    assert len({run.run_id for run in (*first.runs, *second.runs)}) == 1201
