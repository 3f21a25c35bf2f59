"""Bytes on the HTTP port that are no clear request, and clients that are slow or silent."""

from __future__ import annotations

import socket
import struct

import pytest
from support.api import Api
from support.http_api import TIMEOUT_S, HttpApi
from support.service import ServiceProcess
from support.waiting import until

HOST = b"Host: localhost\r\n"
TYPE = b"Content-Type: application/json\r\n"
POST = b"POST /runrecovery.v1.RunService/GetRun HTTP/1.1\r\n" + HOST + TYPE
BODY = b'{"runId":"r"}'
PROBE = b"GET /healthz HTTP/1.1\r\n" + HOST

REFUSED = {
    "two lengths": (POST + b"Content-Length: 13\r\nContent-Length: 12\r\n\r\n" + BODY, 400),
    "a length with a sign": (POST + b"Content-Length: +13\r\n\r\n" + BODY, 400),
    "a negative length": (POST + b"Content-Length: -1\r\n\r\n", 400),
    "a length of 23 digits": (POST + b"Content-Length: " + b"9" * 23 + b"\r\n\r\n", 400),
    "length and chunks": (
        POST + b"Content-Length: 13\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "a transfer encoding": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    "chunks twice": (POST + b"Transfer-Encoding: chunked\r\n" * 2 + b"\r\n0\r\n\r\n", 400),
    "no host": (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
    "two hosts": (PROBE + HOST + b"\r\n", 400),
    "HTTP/1.0 without a host": (b"GET /healthz HTTP/1.0\r\n\r\n", 421),
    "HTTP/2.0": (b"GET /healthz HTTP/2.0\r\n" + HOST + b"\r\n", 505),
    "the preface of HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "TLS": (bytes.fromhex("1603010200010001fc0303") + bytes(100), 400),
    "NUL in the path": (b"GET /\0 HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "NUL in a header": (PROBE + b"X: a\0b\r\n\r\n", 400),
    "a large head": (PROBE + b"X: " + b"a" * 60_000 + b"\r\n\r\n", 400),
    "a large target": (b"GET /" + b"a" * 60_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", 400),
    "many headers": (PROBE + b"X: a\r\n" * 20_000 + b"\r\n", 400),
    "nothing but nonsense": (b"hello\r\n\r\n", 400),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_unclear_request_is_refused_and_its_connection_closed(http: HttpApi, name: str) -> None:
    data, status = REFUSED[name]

    assert http.raw(data).startswith(b"HTTP/1.1 %d " % status)


def test_a_chunk_that_is_none_ends_the_connection(http: HttpApi) -> None:
    assert http.raw(POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n") == b""


def test_pipelined_requests_are_answered_in_their_order(http: HttpApi) -> None:
    unknown = PROBE.replace(b"healthz", b"unknown")

    found = http.raw(PROBE + b"\r\n" + unknown + b"\r\n" + PROBE + b"Connection: close\r\n\r\n")

    assert [line[9:12] for line in found.splitlines() if line.startswith(b"HTTP/1.1 ")] == [
        b"200",
        b"404",
        b"200",
    ]


def test_http_1_0_is_answered_and_its_connection_closed(http: HttpApi) -> None:
    found = http.raw(PROBE.replace(b"1.1", b"1.0") + b"\r\n")

    assert found.endswith(b"\r\n\r\nok\n")


def test_a_request_to_change_the_protocol_is_answered_without_a_change(http: HttpApi) -> None:
    upgrade = b"Connection: upgrade\r\nUpgrade: websocket\r\n\r\n"

    assert http.raw(PROBE + upgrade, ends=True).startswith(b"HTTP/1.1 200 ")


def test_a_client_that_resets_its_connection_leaves_the_service_as_it_was(
    http: HttpApi, service: ServiceProcess, api: Api
) -> None:
    linger = struct.pack("ii", 1, 0)
    for sent in (b"", PROBE, PROBE + b"\r\n", POST + b"Content-Length: 99\r\n\r\n" + BODY):
        with socket.create_connection((http.host, http.port), TIMEOUT_S) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            connection.sendall(sent)

    assert http.request("GET", "/readyz").status == 200
    assert api.health_of() == "SERVING"
    until(lambda: not connections_of(service.pid, http.port), "the connections are closed")


def connections_of(pid: int, port: int) -> list[str]:
    """Return the established connections of this network to a port of 127.0.0.1."""
    with open(f"/proc/{pid}/net/tcp", encoding="ascii") as table:  # noqa: PTH123
        rows = [line.split() for line in table][1:]
    return [row[2] for row in rows if row[1] == f"0100007F:{port:04X}" and row[3] == "01"]


def test_nobody_can_fill_the_log_by_bad_requests(http: HttpApi, service: ServiceProcess) -> None:
    before = len(service.text.splitlines())

    for data, _ in REFUSED.values():
        http.raw(data)

    assert service.text.splitlines()[before:] == []
