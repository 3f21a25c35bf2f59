"""Streams of the contract over HTTP: enveloped messages, and how a stream ends."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from support.api import Api
from support.http_api import (
    RECOVERY,
    RUNS,
    HttpApi,
    envelope,
    http_address,
)
from support.scraping import scrape, value
from support.service import Home, ServiceProcess
from support.waiting import until

WATCH = f"{RUNS}/WatchRun"
STREAM_TYPE = {"Content-Type": "application/connect+json"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with Home(
        tmp_path_factory.mktemp("http-streams"),
        http_listen="127.0.0.1:0",
        metrics_listen="127.0.0.1:0",
    ) as home:
        yield home


def waiting(api: Api, run_id: str, prompt: str = "Which?") -> str:
    api.create("resumable", {"questions": [{"prompt": prompt}]}, run_id=run_id)
    api.until_status(run_id, "WAITING_USER")
    return run_id


def ends(http: HttpApi, method: str, body: bytes, **headers: str) -> Any:
    """Return how a stream ended that sent nothing else."""
    sent = {**STREAM_TYPE, **{name.replace("_", "-"): value for name, value in headers.items()}}
    reply = http.request("POST", method, body, sent)
    assert (reply.status, reply.body[0]) == (200, 2)
    return json.loads(reply.body[5:])


def open_watches(service: ServiceProcess) -> float:
    method = "runrecovery.v1.RunService.WatchRun"
    return value(scrape(service), "runrecovery_streams_open", method=method) or 0


def test_a_proxy_is_told_to_hold_back_no_message_of_a_stream(http: HttpApi) -> None:
    reply = http.request("POST", WATCH, envelope(b"{}"), STREAM_TYPE)

    assert reply.headers["x-accel-buffering"] == "no"
    assert reply.headers["cache-control"] == "no-store"


def test_a_watch_sends_a_snapshot_then_each_event_and_ends_with_the_run(
    http: HttpApi, api: Api
) -> None:
    waiting(api, "watched")

    with http.stream(WATCH, {"runId": "watched"}) as messages:
        snapshot = next(messages)
        api.reply("watched", 1, "this")
        *events, end = list(messages)

    assert snapshot["snapshot"]["status"] == "RUN_STATUS_WAITING_USER"
    assert [event["event"]["kind"].removeprefix("RUN_EVENT_KIND_") for event in events] == [
        "ANSWERED",
        "STARTED",
        "SUCCEEDED",
    ]
    assert end == {"end": {}}


def test_a_watch_resumes_after_a_sequence(http: HttpApi, api: Api) -> None:
    waiting(api, "resumed")
    api.cancel("resumed")
    api.until_ended("resumed")

    with http.stream(WATCH, {"runId": "resumed", "afterSequence": "0"}) as messages:
        *events, _ = list(messages)

    assert [int(event["sequence"]) for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["event"]["kind"] == "RUN_EVENT_KIND_CANCELED"


def test_output_is_streamed_as_base64(http: HttpApi, api: Api) -> None:
    waiting(api, "prints", "a prompt of its own")

    with http.stream(f"{RUNS}/StreamOutput", {"runId": "prints"}) as messages:
        *pieces, end = list(messages)

    output = b"".join(base64.b64decode(piece["data"]) for piece in pieces)
    assert b"a prompt of its own" in output
    assert end == {"end": {}}


def test_decisions_are_watched_from_the_present_on(http: HttpApi) -> None:
    with http.stream(f"{RECOVERY}/WatchRecovered", {}) as messages:
        assert next(messages).keys() == {"cursor", "bookmark"}


def test_a_refused_stream_ends_with_the_error_of_grpc(http: HttpApi) -> None:
    end = ends(http, WATCH, envelope(b'{"runId":"nobody"}'))

    assert end["error"]["code"] == "not_found"
    assert end["error"]["details"][0]["debug"]["reason"] == "RUN_NOT_FOUND"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_argument"),
        (b'\0"runId":"x"}', "invalid_argument"),
        (envelope(b"{}")[:-1], "invalid_argument"),
        (envelope(b"{}") * 2, "invalid_argument"),
        (envelope(b"{}", flags=2), "invalid_argument"),
        (envelope(b"{}", flags=128), "invalid_argument"),
        (envelope(b"{}", flags=1), "unimplemented"),
        (envelope(b"{"), "invalid_argument"),
        (envelope(b"x" * 2_000_000), "resource_exhausted"),
        (b"\0\xff\xff\xff\xff", "invalid_argument"),
    ],
)
def test_a_body_that_is_not_one_envelope_ends_the_stream(
    http: HttpApi, body: bytes, code: str
) -> None:
    assert ends(http, WATCH, body)["error"]["code"] == code


def test_headers_of_the_protocol_are_checked(http: HttpApi) -> None:
    body = envelope(b'{"runId":"nobody"}')

    assert [
        ends(http, WATCH, body, Connect_Content_Encoding="gzip")["error"]["code"],
        ends(http, WATCH, body, Connect_Protocol_Version="2")["error"]["code"],
        ends(http, WATCH, body, Connect_Timeout_Ms="x")["error"]["code"],
    ] == ["unimplemented", "invalid_argument", "invalid_argument"]


@pytest.mark.parametrize("verb", ["GET", "HEAD", "PUT"])
def test_a_stream_is_opened_by_post_only(http: HttpApi, verb: str) -> None:
    reply = http.request(verb, f"{WATCH}?encoding=json&message=%7B%7D")

    assert (reply.status, reply.headers["allow"]) == (405, "POST")


def test_a_stream_ends_when_the_time_of_its_caller_is_over(http: HttpApi, api: Api) -> None:
    waiting(api, "timed")

    with http.stream(WATCH, {"runId": "timed"}, Connect_Timeout_Ms="200") as messages:
        *_, end = list(messages)

    assert end["end"]["error"]["code"] == "deadline_exceeded"


def test_a_stream_whose_client_leaves_is_closed(
    http: HttpApi, api: Api, service: ServiceProcess
) -> None:
    waiting(api, "left")
    with http.stream(WATCH, {"runId": "left"}) as messages:
        next(messages)
        until(lambda: open_watches(service) == 1, "the watch is open")

    until(lambda: open_watches(service) == 0, "the watch is closed")


def test_a_stop_ends_streams_with_unavailable_and_answers_unary_calls(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with Home(tmp_path_factory.mktemp("stop"), http_listen="127.0.0.1:0") as home:
        service, api = home.start()
        http = HttpApi(http_address(service))
        waiting(api, "watched")
        with http.stream(WATCH, {"runId": "watched"}) as messages:
            next(messages)
            service.terminate()
            *_, end = list(messages)

        assert end["end"]["error"]["code"] == "unavailable"
        assert end["end"]["error"]["details"][0]["debug"]["reason"] == "SHUTTING_DOWN"
        assert service.exit_code() == 0
        assert not service.events("service.stop_step_failed")
