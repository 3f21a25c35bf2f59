"""Calls of the contract with one response over HTTP, by the Connect protocol."""

from __future__ import annotations

import base64
import json
import socket
from urllib.parse import quote, urlencode

import pytest
from google.rpc import error_details_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api
from support.http_api import RECOVERY, RUNS, TIMEOUT_S, HttpApi

GET_RUN = f"{RUNS}/GetRun"


@pytest.fixture(scope="module", autouse=True)
def waits(api: Api) -> str:
    """A run that waits for its user."""
    api.create("resumable", {"questions": [{"prompt": "Grüße?"}]}, run_id="waits")
    api.until_status("waits", "WAITING_USER")
    return "waits"


def by_get(http: HttpApi, **parameters: str) -> tuple[int, bytes]:
    reply = http.request("GET", f"{GET_RUN}?{urlencode(parameters)}")
    return reply.status, reply.body


def test_a_run_is_created_read_and_answered_as_json(http: HttpApi, api: Api) -> None:
    given = {"engine": "resumable", "runId": "asks", "input": {"questions": [{"prompt": "Why?"}]}}

    created = http.post(f"{RUNS}/CreateRun", given)
    api.until_status("asks", "WAITING_USER")
    read = http.post(GET_RUN, {"run_id": "asks"})
    reply = {"runId": "asks", "interactionId": 1, "response": "Because."}
    answered = http.post(f"{RUNS}/SubmitReply", reply)

    assert (created.status, created.json["run"]["status"]) == (200, "RUN_STATUS_QUEUED")
    assert read.headers["content-type"] == "application/json"
    assert read.json["run"]["pendingInteraction"]["prompt"] == "Why?"
    assert (answered.status, answered.json["run"]["runId"]) == (200, "asks")
    assert api.until_ended("asks").run_id == "asks"


def test_json_is_ascii_and_its_texts_are_those_of_the_store(http: HttpApi) -> None:
    reply = http.post(GET_RUN, {"runId": "waits"})

    assert reply.json["run"]["pendingInteraction"]["prompt"] == "Grüße?"
    assert reply.body.isascii()


def test_protobuf_is_answered_with_protobuf(http: HttpApi, api: Api) -> None:
    request = pb.GetRunRequest(run_id="waits").SerializeToString()

    reply = http.request("POST", GET_RUN, request, {"Content-Type": "application/proto"})

    assert (reply.status, reply.headers["content-type"]) == (200, "application/proto")
    assert pb.GetRunResponse.FromString(reply.body).run == api.get("waits")


def test_no_response_may_be_stored_or_taken_for_another_type(http: HttpApi) -> None:
    replies = [http.post(GET_RUN, {"runId": "waits"}), http.post(GET_RUN, {})]

    assert [reply.headers["cache-control"] for reply in replies] == ["no-store"] * 2
    assert [reply.headers["x-content-type-options"] for reply in replies] == ["nosniff"] * 2
    assert all(reply.headers["date"].endswith("GMT") for reply in replies)


# -- reads by GET ------------------------------------------------------------------------------


def test_a_read_is_answered_by_get_with_its_message_in_the_query(http: HttpApi) -> None:
    message = json.dumps({"runId": "waits"})
    in_base64 = base64.urlsafe_b64encode(message.encode()).decode().rstrip("=")
    as_proto = base64.urlsafe_b64encode(
        pb.GetRunRequest(run_id="waits").SerializeToString()
    ).decode()
    by_post = (200, http.post(GET_RUN, message).body)

    assert by_get(http, encoding="json", message=message) == by_post
    assert by_get(http, connect="v1", encoding="json", message=in_base64, base64="1") == by_post
    status, body = by_get(http, encoding="proto", message=as_proto, base64="1")
    assert (status, pb.GetRunResponse.FromString(body).run.run_id) == (200, "waits")


def test_get_never_changes_anything(http: HttpApi) -> None:
    message = quote('{"engine":"resumable","runId":"by-get"}')

    reply = http.request("GET", f"{RUNS}/CreateRun?encoding=json&message={message}")

    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert http.post(GET_RUN, {"runId": "by-get"}).status == 404


@pytest.mark.parametrize(
    "query",
    [
        "",
        "encoding=json",
        "message=%7B%7D",
        "encoding=xml&message=%7B%7D",
        "encoding=json&message=%7B%7D&message=%7B%7D",
        "encoding=json&message=%7B%7D&access_token=x",
        "encoding=json&message=%7B%7D&connect=v2",
        "encoding=json&message=%7B%7D&base64=2",
        "encoding=json&message=!&base64=1",
        "encoding=json&message=%ff",
        "&".join(f"a{number}=" for number in range(1000)),
    ],
)
def test_a_query_that_is_no_request_is_an_invalid_argument(http: HttpApi, query: str) -> None:
    reply = http.request("GET", f"{GET_RUN}?{query}")

    assert (reply.status, reply.json["code"]) == (400, "invalid_argument")


# -- errors ------------------------------------------------------------------------------------


def test_a_refused_call_has_the_reason_and_details_of_grpc(http: HttpApi) -> None:
    refused = http.post(GET_RUN, {"runId": "nobody"})

    assert (refused.status, refused.json["code"], refused.reason) == (
        404,
        "not_found",
        "RUN_NOT_FOUND",
    )
    info, resource = refused.json["details"]
    assert [info["type"], resource["type"]] == ["google.rpc.ErrorInfo", "google.rpc.ResourceInfo"]
    packed = error_details_pb2.ResourceInfo.FromString(base64.b64decode(resource["value"] + "=="))
    assert packed.resource_name == "nobody"


@pytest.mark.parametrize(
    ("method", "message", "status", "code", "reason"),
    [
        (f"{RUNS}/CreateRun", {"engine": "none"}, 400, "invalid_argument", "UNKNOWN_ENGINE"),
        (f"{RUNS}/GetRun", {}, 400, "invalid_argument", "INVALID_FIELD"),
        (
            f"{RUNS}/CreateRun",
            {"engine": "resumable", "runId": "waits"},
            409,
            "already_exists",
            "RUN_ALREADY_EXISTS",
        ),
        (
            f"{RUNS}/SubmitReply",
            {"runId": "waits", "interactionId": 7, "response": "x"},
            400,
            "failed_precondition",
            "INTERACTION_SUPERSEDED",
        ),
        (f"{RUNS}/CancelRun", {"runId": "waits", "etag": "0-0"}, 409, "aborted", "ETAG_MISMATCH"),
        (f"{RECOVERY}/GetReconciliation", {}, 400, "invalid_argument", "INVALID_FIELD"),
    ],
)
def test_an_error_has_the_http_status_of_its_code(
    http: HttpApi, method: str, message: dict[str, object], status: int, code: str, reason: str
) -> None:
    refused = http.post(method, message)

    assert (refused.status, refused.json["code"], refused.reason) == (status, code, reason)


@pytest.mark.parametrize(
    "body",
    [
        "{",
        "[]",
        "null",
        "7",
        "null x",
        '"waits"',
        '{"runId": 7}',
        '{"runId": "\\ud800"}',
        '{"runId": {"a": 1}}',
        '{"runId": "waits", "runId": "waits"}',
        "[" * 100_000,
        '{"a":' * 5_000,
        "\0",
        "1" * 10_000,
        "\ufeff{}",
    ],
)
def test_a_body_that_is_not_the_message_is_an_invalid_argument(http: HttpApi, body: str) -> None:
    refused = http.request("POST", GET_RUN, body.encode(), {"Content-Type": "application/json"})

    assert (refused.status, refused.json["code"]) == (400, "invalid_argument")
    assert refused.json["message"] == "not a valid GetRunRequest as json"


def test_bytes_that_are_no_utf8_or_no_protobuf_are_an_invalid_argument(http: HttpApi) -> None:
    for content_type in ("application/json", "application/proto"):
        refused = http.request("POST", GET_RUN, b"\xff\xff", {"Content-Type": content_type})

        assert (refused.status, refused.json["code"]) == (400, "invalid_argument")


def test_unknown_fields_are_ignored_as_connect_demands(http: HttpApi) -> None:
    reply = http.post(GET_RUN, {"runId": "waits", "ofANewerCaller": {"deep": [1]}})

    assert (reply.status, reply.json["run"]["runId"]) == (200, "waits")


def test_no_body_is_the_empty_message(http: HttpApi) -> None:
    assert http.post(f"{RECOVERY}/GetRecoveryStatus", "").status == 200


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_over_the_limit_is_refused(http: HttpApi, chunked: bool) -> None:  # noqa: FBT001
    body = b"x" * (5 * 1024**2)
    size = b"Transfer-Encoding: chunked" if chunked else b"Content-Length: %d" % len(body)
    sent = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body) if chunked else body
    head = (
        f"POST {GET_RUN} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n".encode()
    )

    with socket.create_connection((http.host, http.port), TIMEOUT_S) as connection:
        connection.sendall(head + size + b"\r\n\r\n" + sent)
        found = connection.recv(65_536)
        while b"1048576 bytes" not in found:
            found += connection.recv(65_536)

    assert found.startswith(b"HTTP/1.1 429 ")
    assert b'"code": "resource_exhausted"' in found


# -- headers of the protocol -------------------------------------------------------------------


@pytest.mark.parametrize(
    "content_type",
    [
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/json; charset=latin-1",
        "application/connect+json",
        "application/grpc",
        "application/grpc-web",
        "",
    ],
)
def test_a_post_without_a_type_of_the_protocol_does_nothing(
    http: HttpApi, content_type: str
) -> None:
    body = json.dumps({"engine": "resumable", "runId": "by-form"})

    reply = http.request("POST", f"{RUNS}/CreateRun", body, {"Content-Type": content_type})

    assert reply.status == 415
    assert reply.headers["accept-post"] == "application/json, application/proto"
    assert http.post(GET_RUN, {"runId": "by-form"}).status == 404


@pytest.mark.parametrize("content_type", ["application/json; charset=UTF-8", "Application/JSON"])
def test_a_content_type_in_other_words_is_accepted(http: HttpApi, content_type: str) -> None:
    body = json.dumps({"runId": "waits"})

    assert http.request("POST", GET_RUN, body, {"Content-Type": content_type}).status == 200


@pytest.mark.parametrize(
    ("headers", "status", "code"),
    [
        ({"Connect_Protocol_Version": "2"}, 400, "invalid_argument"),
        ({"Connect_Timeout_Ms": "soon"}, 400, "invalid_argument"),
        ({"Connect_Timeout_Ms": "-1"}, 400, "invalid_argument"),
        ({"Connect_Timeout_Ms": "12345678901"}, 400, "invalid_argument"),
        ({"Content_Encoding": "gzip"}, 501, "unimplemented"),
    ],
)
def test_headers_of_the_protocol_are_checked(
    http: HttpApi, headers: dict[str, str], status: int, code: str
) -> None:
    reply = http.post(GET_RUN, {"runId": "waits"}, **headers)

    assert (reply.status, reply.json["code"]) == (status, code)


def test_a_call_ends_when_its_timeout_is_over(http: HttpApi) -> None:
    # A list is read on a thread, so its call cannot end before a timeout of 0.
    reply = http.post(f"{RUNS}/ListRuns", {}, Connect_Timeout_Ms="0")

    assert (reply.status, reply.json["code"]) == (504, "deadline_exceeded")


def test_headers_of_a_connect_client_are_accepted(http: HttpApi) -> None:
    headers = {
        "Connect_Protocol_Version": "1",
        "Connect_Timeout_Ms": "9999999999",
        "Content_Encoding": "identity",
        "Accept_Encoding": "gzip, br",
    }

    assert http.post(GET_RUN, {"runId": "waits"}, **headers).status == 200


@pytest.mark.parametrize("verb", ["PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "MADE-UP"])
def test_other_verbs_are_refused_with_those_that_are_allowed(http: HttpApi, verb: str) -> None:
    reply = http.request(verb, GET_RUN)

    assert (reply.status, reply.headers["allow"]) == (405, "GET, POST")


@pytest.mark.parametrize(
    "path",
    [
        "/runrecovery.v1.RunService/Nothing",
        "/runrecovery.v1.RunService/getrun",
        "/runrecovery.v1.RunService/GetRun/",
        "/runrecovery.v1.RunService/GetRun%00",
        "/runrecovery.v1.RunService/../RunService/GetRun",
        "/runrecovery.v1.RunService",
        "/grpc.health.v1.Health/Check",
        "/",
        "/%ff",
    ],
)
def test_unknown_paths_do_not_exist(http: HttpApi, path: str) -> None:
    assert http.post(path, {"runId": "waits"}).status == 404


# -- probes ------------------------------------------------------------------------------------


def test_probes_answer_while_the_service_serves(http: HttpApi) -> None:
    seen = [
        (http.request(verb, path).status, http.request(verb, path).body)
        for path in ("/healthz", "/readyz")
        for verb in ("GET", "HEAD")
    ]

    assert seen == [(200, b"ok\n"), (200, b"")] * 2
    assert http.request("POST", "/readyz").status == 405
