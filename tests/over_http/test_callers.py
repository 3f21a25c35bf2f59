"""Callers over HTTP: tokens, roles and limits are those of gRPC."""

from __future__ import annotations

import json
import signal
import socket
from collections.abc import Iterator

import pytest
from support.api import Api
from support.callers import EXPECTED, ROLES, caller, token_of
from support.http_api import RUNS, TIMEOUT_S, HttpApi, Json, envelope, http_address
from support.service import Home, ServiceProcess
from support.waiting import until

STREAMS = {"WatchRun", "StreamOutput", "WatchRecovered"}
PATHS = [path for path in EXPECTED if path.startswith("runrecovery.")]
GET_RUN = f"{RUNS}/GetRun"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    callers = [
        *(caller(role, role) for role in ROLES),
        caller("only-sticky", "creator", engines=["sticky"]),
        caller("narrow", "viewer", max_calls=1),
        caller("slow", "viewer", max_calls_per_s=1),
    ]
    path = tmp_path_factory.mktemp("http-callers")
    with Home(path, http_listen="127.0.0.1:0", callers=callers, token=token_of("operator")) as home:
        yield home


def as_caller(service: ServiceProcess, name: str) -> HttpApi:
    return HttpApi(http_address(service), token="" if name == "nobody" else token_of(name))


def error_of(http: HttpApi, path: str, message: bytes = b"{}") -> Json:
    """Return the error of a call; empty: it was answered, or its client left a stream."""
    if path.rpartition("/")[2] in STREAMS:
        sent = {"Content-Type": "application/connect+json"}
        with http.opened("POST", f"/{path}", envelope(message), sent) as response:
            is_end = response.read(1)[0] == 2
            size = int.from_bytes(response.read(4))
            found: Json = json.loads(response.read(size)).get("error", {}) if is_end else {}
            return found
    reply = http.post(f"/{path}", message.decode("latin-1"))
    return {} if reply.status == 200 else reply.json


def reason_of(error: Json) -> str:
    return str(error["details"][0]["debug"]["reason"]) if "details" in error else ""


@pytest.mark.parametrize("path", PATHS)
def test_every_role_may_call_what_the_table_says_and_nothing_else(
    service: ServiceProcess, path: str
) -> None:
    names = ("nobody", "stranger", *ROLES)
    seen = {name: error_of(as_caller(service, name), path) for name in names}

    refusals = {
        name: (error["code"], reason_of(error))
        for name, error in seen.items()
        if error.get("code") in {"unauthenticated", "permission_denied"}
    }
    assert refusals == {
        name: ("permission_denied", "ROLE_NOT_SUFFICIENT")
        if name in ROLES
        else ("unauthenticated", "CALLER_UNKNOWN")
        for name in names
        if name not in EXPECTED[path]
    }


@pytest.mark.parametrize("path", PATHS)
def test_a_caller_is_refused_before_the_request_is_looked_at(
    service: ServiceProcess, path: str
) -> None:
    assert reason_of(error_of(as_caller(service, "stranger"), path, b"{")) == "CALLER_UNKNOWN"


def test_a_stranger_gets_the_answer_without_sending_the_body(service: ServiceProcess) -> None:
    http = as_caller(service, "nobody")
    head = f"POST {GET_RUN} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"

    with socket.create_connection((http.host, http.port), TIMEOUT_S) as connection:
        connection.sendall(f"{head}Content-Length: 1000000\r\n\r\n".encode())

        assert connection.recv(65_536).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    ("authorization", "message"),
    [
        ([], "the call has no token, and its caller is not known otherwise"),
        ([f"Bearer {token_of('viewer')}x"], "the token of the call is not valid"),
        ([f"Basic {token_of('viewer')}"], "the token of the call is not valid"),
        ([token_of("viewer")], "the token of the call is not valid"),
        (["Bearer"], "the token of the call is not valid"),
        (["Bearer \xff"], "the token of the call is not valid"),
        ([f"Bearer {token_of('viewer')}"] * 2, "the call has more than one authorization"),
    ],
)
def test_a_call_without_one_valid_token_is_refused(
    service: ServiceProcess, authorization: list[str], message: str
) -> None:
    http = as_caller(service, "nobody")
    lines = [f"POST {GET_RUN} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    lines += [f"Authorization: {value}" for value in authorization]
    lines += ["Connection: close", "Content-Length: 2", "", "{}"]

    found = http.raw("\r\n".join(lines).encode("latin-1"))

    head, _, body = found.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 401 ")
    assert b"\r\nwww-authenticate: Bearer" in head
    assert json.loads(body)["message"] == message


def test_a_token_is_taken_from_its_header_only(service: ServiceProcess) -> None:
    http, token = as_caller(service, "nobody"), token_of("operator")
    query = f"encoding=json&message=%7B%7D&access_token={token}"

    replies = [
        http.request("GET", f"{GET_RUN}?{query}"),
        http.request("GET", f"{GET_RUN}?encoding=json&message=%7B%7D&authorization={token}"),
        http.post(f"{GET_RUN}?token={token}", {}),
        http.post(GET_RUN, {}, Cookie=f"authorization=Bearer {token}; token={token}"),
        http.post(GET_RUN, {}, X_Authorization=f"Bearer {token}"),
    ]

    assert [reply.status for reply in replies] == [401] * 5
    assert token not in service.text


def test_a_token_in_the_url_is_refused_for_a_caller_too(service: ServiceProcess) -> None:
    http, token = as_caller(service, "viewer"), token_of("viewer")

    by_get = http.request("GET", f"{GET_RUN}?encoding=json&message=%7B%7D&access_token={token}")
    by_post = http.post(f"{GET_RUN}?access_token={token}", {"runId": "r"})

    assert [by_get.status, by_post.status] == [400, 400]


def test_probes_need_no_caller(service: ServiceProcess) -> None:
    http = as_caller(service, "nobody")

    assert [http.request("GET", path).status for path in ("/healthz", "/readyz")] == [200, 200]


def test_runs_of_other_engines_do_not_exist_for_a_caller(service: ServiceProcess, api: Api) -> None:
    api.until_ended(api.create("resumable", {"result": {}}, run_id="other").run_id)

    seen = {
        name: as_caller(service, name).post(GET_RUN, {"runId": "other"}).status
        for name in ("only-sticky", "viewer")
    }

    assert seen == {"only-sticky": 404, "viewer": 200}


def test_what_a_caller_changes_names_it(service: ServiceProcess) -> None:
    created = as_caller(service, "creator").post(
        f"{RUNS}/CreateRun", {"engine": "resumable", "runId": "named", "input": {"result": {}}}
    )

    assert created.json["run"]["createdBy"] == "creator"
    (event,) = until(  # a thread writes the log
        lambda: [each for each in service.events("audit.changed") if each["run_id"] == "named"],
        "the change is logged",
    )
    assert event["caller"] == "creator"


def test_limits_of_a_caller_count_its_calls_over_grpc_and_http(
    service: ServiceProcess, api: Api
) -> None:
    api.create("resumable", {"questions": [{"prompt": "x"}]}, run_id="watched")
    narrow = as_caller(service, "narrow")

    with narrow.stream(f"{RUNS}/WatchRun", {"runId": "watched"}) as messages:
        next(messages)
        over_grpc = Api(service.address, token=token_of("narrow"))
        with over_grpc, pytest.raises(Exception, match="narrow"):
            over_grpc.get("watched")
        refused = narrow.post(GET_RUN, {"runId": "watched"})

    assert (refused.status, refused.reason) == (429, "CALLER_OVERLOADED")
    assert refused.headers["retry-after"] == "1"
    until(lambda: narrow.post(GET_RUN, {"runId": "watched"}).status == 200, "there is room again")


def test_a_call_counts_once_for_the_rate_of_its_caller(service: ServiceProcess) -> None:
    slow = as_caller(service, "slow")

    assert slow.post(GET_RUN, {"runId": "never-made"}).status == 404


def test_refused_calls_are_logged_with_the_address_of_the_client(service: ServiceProcess) -> None:
    as_caller(service, "stranger").post(GET_RUN, {})

    service.until_event("rpc.call_refused")

    of_strangers = [one for one in service.events("rpc.call_refused") if not one["caller"]]
    assert of_strangers[0]["peer"].startswith("http:127.0.0.1:")


def test_a_reload_that_removes_a_caller_ends_its_streams(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    kept, removed = caller("operator", "operator"), caller("removed", "viewer")
    with Home(
        tmp_path_factory.mktemp("reloaded"),
        http_listen="127.0.0.1:0",
        callers=[kept, removed],
        token=token_of("operator"),
    ) as home:
        service, api = home.start()
        api.create("resumable", {"questions": [{"prompt": "x"}]}, run_id="watched")
        http = as_caller(service, "removed")
        with http.stream(f"{RUNS}/WatchRun", {"runId": "watched"}) as messages:
            next(messages)
            home.write_config(callers=[kept])
            service.popen.send_signal(signal.SIGHUP)

            *_, end = list(messages)

        assert end["end"]["error"]["code"] == "unauthenticated"
        assert http.post(GET_RUN, {"runId": "watched"}).status == 401
