"""The HTTP server answers requests for one page, and bounds the time and number of connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from runrecovery_service.metrics import http_server
from runrecovery_service.metrics.http_server import MetricsServer
from runrecovery_service.rpc.listen_address import ListenFailed
from support.waiting import until_async

LARGE = b"x" * (8 << 20)


class Page:
    """A page whose first readers get other bodies."""

    def __init__(self) -> None:
        self.first: list[bytes] = []
        self.stopped = False
        self.readers = 0
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    async def text(self) -> bytes:
        self.readers += 1
        await self.may_answer.wait()
        return self.first.pop() if self.first else b"a 1\n"

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def page() -> Page:
    return Page()


@pytest.fixture
def server(page: Page) -> MetricsServer:
    return MetricsServer(page, content_type="text/plain", max_connections=3)


@pytest.fixture
async def port(page: Page, server: MetricsServer) -> AsyncIterator[int]:
    yield await server.bind("127.0.0.1:0")
    await server.stop()
    assert page.stopped


async def ask(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    try:
        return await reader.read()
    finally:
        writer.close()


def answer(status: str, *headers: str, length: int = 0) -> bytes:
    lines = [
        f"HTTP/1.1 {status}", *headers, f"Content-Length: {length}", "Connection: close",
        "X-Content-Type-Options: nosniff", "", "",
    ]  # fmt: skip
    return "\r\n".join(lines).encode()


OK = answer("200 OK", "Content-Type: text/plain", length=4)


@pytest.mark.parametrize(
    ("request_line", "answered"),
    [
        (b"GET /metrics HTTP/1.1", OK + b"a 1\n"),
        (b"GET /metrics?name=x HTTP/1.0", OK + b"a 1\n"),
        (b"HEAD /metrics HTTP/1.1", OK),
        (b"POST /metrics HTTP/1.1", answer("405 Method Not Allowed", "Allow: GET, HEAD")),
        (b"GET / HTTP/1.1", answer("404 Not Found")),
        (b"GET /metrics/../etc/passwd HTTP/1.1", answer("404 Not Found")),
        (b"GET /metrics HTTP/2.0", answer("400 Bad Request")),
        (b"nonsense", answer("400 Bad Request")),
        (b"\x16\x03\x01", answer("400 Bad Request")),
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1", answer("431 Request Header Fields Too Large")),
    ],
)
async def test_each_request_gets_its_documented_answer(
    port: int, request_line: bytes, answered: bytes
) -> None:
    assert await ask(port, request_line + b"\r\nHost: x\r\n\r\n") == answered


@pytest.mark.parametrize("sent", [b"", b"GET /metrics HTTP/1.1\r\n"])
async def test_a_client_that_sends_no_whole_request_is_closed(
    port: int, sent: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "REQUEST_S", 0.01)

    assert await ask(port, sent) == b""


async def test_a_client_that_does_not_read_is_closed(
    port: int, page: Page, server: MetricsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_server, "REQUEST_S", 0.05)
    page.first = [LARGE]
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")

    async def its_answer_has_begun() -> bool:
        return not page.first

    async def it_was_cut_off() -> bool:
        return not server._connections

    await until_async(its_answer_has_begun, "the page was read")
    await until_async(it_was_cut_off, "the server cuts off the client that does not read")
    writer.transport.resume_reading()  # type: ignore[attr-defined]
    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await reader.readexactly(len(LARGE))
    writer.close()


async def test_a_connection_above_the_limit_replaces_the_oldest_that_has_sent_no_request(
    port: int,
) -> None:
    oldest, *others = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]

    assert await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n") == OK + b"a 1\n"

    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await oldest[0].readexactly(1)
    for reader, writer in others:
        writer.write(b"GET /metrics HTTP/1.1\r\n\r\n")
        assert await reader.read() == OK + b"a 1\n"
    for _, writer in (oldest, *others):
        writer.close()


async def test_new_idle_connections_all_the_time_do_not_keep_a_scrape_out(port: int) -> None:
    for _ in range(20):
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        assert await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n") == OK + b"a 1\n"
        for _, writer in silent:
            writer.close()


async def test_a_connection_above_the_limit_is_closed_at_once_while_all_others_are_answered(
    port: int, page: Page
) -> None:
    page.may_answer.clear()
    asked = [asyncio.create_task(ask(port, b"GET /metrics HTTP/1.1\r\n\r\n")) for _ in range(3)]

    async def all_are_answered() -> bool:
        return page.readers == 3

    await until_async(all_are_answered, "three requests have come")
    try:
        refused = await ask(port, b"GET /metrics HTTP/1.1\r\n\r\n")
    except ConnectionResetError:
        refused = b""
    page.may_answer.set()

    assert refused == b""
    assert await asyncio.gather(*asked) == [OK + b"a 1\n"] * 3


async def test_a_taken_address_is_refused_by_its_name(port: int, page: Page) -> None:
    other = MetricsServer(page, content_type="text/plain", max_connections=3)

    with pytest.raises(ListenFailed, match=f"cannot listen on 127.0.0.1:{port}"):
        await other.bind(f"127.0.0.1:{port}")


async def test_a_stop_closes_connections_that_are_open(page: Page) -> None:
    server = MetricsServer(page, content_type="text/plain", max_connections=3)
    port = await server.bind("127.0.0.1:0")
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    assert await ask(port, b"HEAD /metrics HTTP/1.1\r\n\r\n") == OK

    await server.stop()

    with pytest.raises((ConnectionResetError, asyncio.IncompleteReadError)):
        await reader.readexactly(1)
    writer.close()
