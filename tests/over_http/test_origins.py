"""Requests that a browser sends for a page that must not reach the service."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from runrecovery_service.http.origins import OriginPolicy
from support.http_api import RUNS, HttpApi
from support.service import Home

APP = "https://app.example"
GET_RUN = f"{RUNS}/GetRun"
CREATE = f"{RUNS}/CreateRun"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with Home(
        tmp_path_factory.mktemp("origins"),
        http_listen="127.0.0.1:0",
        http_origins=[APP, "http://localhost:3000"],
        http_hosts=["runs.example"],
    ) as home:
        yield home


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8080",
        "localhost.",
        "127.0.0.1",
        "127.0.0.1:8080",
        "[::1]:8080",
        "10.1.2.3:8080",
        "runs.example",
        "runs.example:443",
    ],
)
def test_names_of_the_service_and_addresses_are_its_hosts(http: HttpApi, host: str) -> None:
    assert http.request("GET", "/healthz", headers={"Host": host}).status == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "evil.localhost",
        "runs.example.evil.example",
        "127.0.0.1.evil.example",
        "127.0.0.1.nip.io",
        "2130706433x",
        "user@localhost",
        "localhost:8080:8080",
        "[evil.example]",
        "localhost/",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/healthz", GET_RUN, "/"])
def test_a_host_of_another_name_is_refused_for_every_path(
    http: HttpApi, host: str, path: str
) -> None:
    assert http.request("GET", path, headers={"Host": host}).status == 421


@pytest.mark.parametrize(
    "origin",
    [
        "https://evil.example",
        "null",
        "",
        "http://app.example",
        f"{APP}:444",
        f"{APP}.evil.example",
        f"{APP}/",
        "https://APP.example",
        f"{APP}, {APP}",
        "*",
        "https://localhost",
    ],
)
def test_pages_of_another_origin_can_neither_act_nor_read(http: HttpApi, origin: str) -> None:
    body = json.dumps({"engine": "resumable", "runId": "evil"})
    headers = {"Origin": origin, "Content-Type": "application/json"}

    replies = [
        http.request("POST", CREATE, body, headers),
        http.request("GET", f"{GET_RUN}?encoding=json&message=%7B%7D", headers=headers),
        http.request(
            "OPTIONS", CREATE, headers={**headers, "Access-Control-Request-Method": "POST"}
        ),
    ]

    assert [reply.status for reply in replies] == [403] * 3
    assert not any("access-control-allow-origin" in reply.headers for reply in replies)
    assert http.post(GET_RUN, {"runId": "evil"}).status == 404


@pytest.mark.parametrize("origin", [APP, "http://localhost:3000"])
def test_pages_of_a_named_origin_may_call_and_read_errors_too(http: HttpApi, origin: str) -> None:
    preflight = http.request(
        "OPTIONS",
        GET_RUN,
        headers={"Origin": origin, "Access-Control-Request-Method": "POST"},
    )
    refused = http.post(GET_RUN, {"runId": "nobody"}, Origin=origin)

    assert (preflight.status, preflight.body) == (200, b"")
    assert preflight.headers["access-control-allow-methods"] == "GET, POST"
    assert {"authorization", "content-type", "connect-protocol-version"} <= set(
        preflight.headers["access-control-allow-headers"].split(", ")
    )
    assert refused.status == 404
    for reply in (preflight, refused):
        assert reply.headers["access-control-allow-origin"] == origin
        assert reply.headers["vary"] == "origin"
        assert "access-control-allow-credentials" not in reply.headers


def test_a_cache_gives_a_response_without_an_origin_to_no_page_of_a_named_origin(
    http: HttpApi,
) -> None:
    reply = http.post(GET_RUN, {"runId": "nobody"})

    assert reply.headers["vary"] == "origin"
    assert "access-control-allow-origin" not in reply.headers


def test_a_stream_may_be_read_by_pages_of_a_named_origin(http: HttpApi) -> None:
    headers = {"Origin": APP, "Content-Type": "application/connect+json"}

    reply = http.request("POST", f"{RUNS}/WatchRun", b"", headers)

    assert reply.headers["access-control-allow-origin"] == APP


def test_pages_of_the_service_itself_may_call(http: HttpApi) -> None:
    for origin, host in (
        ("http://localhost:8080", "localhost:8080"),
        ("https://runs.example", "runs.example"),
        ("https://runs.example", "RUNS.example"),
    ):
        reply = http.post(GET_RUN, {"runId": "nobody"}, Origin=origin, Host=host)

        assert reply.status == 404


def test_the_host_of_the_listen_address_is_known_by_its_name() -> None:
    policy = OriginPolicy.make("Box.internal:8080", ("runs.example",))

    assert policy.hosts == {"localhost", "box.internal", "runs.example"}
