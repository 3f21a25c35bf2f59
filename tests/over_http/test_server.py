"""The HTTP server alone: limits on connections and on time, and how it stops."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import cast

import pytest
from runrecovery_service.http import connections
from runrecovery_service.http.asgi import ClientGone, Receive, Response, Scope, Send, UntilGone
from runrecovery_service.http.server import HttpLimits, HttpServer
from runrecovery_service.http.tls import HttpTls
from support.waiting import patience_s, until_async

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"


class App:
    """Answers `/` at once, and any other path when `may_answer` is set or its client has gone."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.begun = 0
        self.left = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.begun += 1
        if scope["path"] != "/":
            await receive()
            try:
                async with UntilGone(receive):
                    await self.may_answer.wait()
            except ClientGone:
                self.left += 1
                return
        await Response(200, b"ok").send(send)


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head may take longer than any test."""
    monkeypatch.setattr(connections, "HEAD_S", 1000.0)


class FailedHandshakes:
    """In place of `HttpTls`: the first handshakes fail, and later connections are plaintext."""

    def __init__(self, failures: int) -> None:
        self.failures = failures

    async def context(self) -> None:
        if self.failures:
            self.failures -= 1
            raise OSError


@asynccontextmanager
async def serving(
    app: App, max_connections: int = 100, tls: FailedHandshakes | None = None
) -> AsyncIterator[tuple[HttpServer, int]]:
    limits = HttpLimits(max_connections=max_connections, stall_s=60.0)
    server = HttpServer(app, limits, cast("HttpTls | None", tls))
    port = await server.bind("127.0.0.1:0")
    try:
        yield server, port
    finally:
        await server.stop(grace_s=0.0)


@asynccontextmanager
async def connected(
    port: int,
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def ended(reader: asyncio.StreamReader) -> bytes:
    """Return what a connection gives until it is closed."""
    async with asyncio.timeout(30):
        try:
            return await reader.read()
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize("sent", [b"", b"G", GET, GET + b"X: "])
async def test_a_head_that_does_not_arrive_in_time_ends_its_connection(
    app: App, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.1)

    async with serving(app) as (_, port), connected(port) as (reader, writer):
        writer.write(sent)

        assert await ended(reader) == b""


async def test_a_head_that_arrives_byte_by_byte_ends_its_connection(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.2)

    async with serving(app) as (_, port), connected(port) as (reader, writer):
        writer.write(GET)
        closed = asyncio.create_task(ended(reader))
        while not closed.done():
            writer.write(b"X: a\r\n")
            await asyncio.wait({closed}, timeout=0.01)

        assert await closed == b""
        assert app.begun == 0


async def test_the_second_head_of_a_connection_has_a_limit_as_well(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.2)

    async with serving(app) as (_, port), connected(port) as (reader, writer):
        writer.write(GET + b"\r\n" + GET)

        assert (await ended(reader)).count(b"HTTP/1.1 200") == 1


async def test_an_answer_may_take_longer_than_the_head(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "HEAD_S", 0.1)

    async with serving(app) as (_, port), connected(port) as (reader, writer):
        writer.write(GET.replace(b"/ ", b"/wait ") + b"\r\n")
        asyncio.get_running_loop().call_later(0.4, app.may_answer.set)

        assert (await reader.readline()).startswith(b"HTTP/1.1 200")


@pytest.mark.usefixtures("patient")
async def test_a_silent_connection_gives_way_to_a_new_one(app: App) -> None:
    async with (
        serving(app, max_connections=2) as (_, port),
        connected(port) as (oldest, _),
        connected(port) as (_, kept),
    ):
        kept.write(GET + b"\r\n")
        await until_async(lambda: answered(app, 1), "it is answered")
        async with connected(port) as (reader, writer):
            writer.write(GET + b"\r\n")

            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
            assert await ended(oldest) == b""


async def answered(app: App, count: int) -> bool:
    return app.begun >= count


@pytest.mark.usefixtures("patient")
async def test_a_connection_with_a_request_gives_way_to_nobody(app: App) -> None:
    async with (
        serving(app, max_connections=1) as (_, port),
        connected(port) as (first, writer),
    ):
        writer.write(GET.replace(b"/ ", b"/wait ") + b"\r\n")
        await until_async(lambda: answered(app, 1), "it is begun")
        async with connected(port) as (second, _):
            assert await ended(second) == b""
        app.may_answer.set()

        assert (await first.readline()).startswith(b"HTTP/1.1 200")


async def test_places_of_closed_connections_are_free_again(app: App) -> None:
    async with serving(app, max_connections=3) as (_, port):
        for _ in range(20):
            async with connected(port) as (reader, writer):
                writer.write(GET + b"Connection: close\r\n\r\n")
                assert (await ended(reader)).startswith(b"HTTP/1.1 200")


async def test_places_of_failed_handshakes_are_free_again(app: App) -> None:
    async with serving(app, max_connections=1, tls=FailedHandshakes(3)) as (_, port):
        for _ in range(3):
            async with connected(port) as (refused, _):
                assert await ended(refused) == b""

        async with connected(port) as (reader, writer):
            writer.write(GET + b"\r\n")

            assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def test_a_stop_waits_for_requests_and_closes_silent_connections(app: App) -> None:
    async with (
        serving(app) as (server, port),
        connected(port) as (silent, _),
        connected(port) as (reader, writer),
    ):
        writer.write(GET.replace(b"/ ", b"/wait ") + b"\r\n")
        await until_async(lambda: answered(app, 1), "it is begun")
        stopping = asyncio.create_task(server.stop(grace_s=60.0))

        assert await ended(silent) == b""
        assert not stopping.done()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        app.may_answer.set()
        assert (await ended(reader)).endswith(b"ok")
        await stopping
        assert app.left == 0


async def test_a_stop_ends_requests_that_take_longer_than_its_grace(app: App) -> None:
    async with serving(app) as (server, port), connected(port) as (reader, writer):
        writer.write(GET.replace(b"/ ", b"/wait ") + b"\r\n")
        await until_async(lambda: answered(app, 1), "it is begun")

        await server.stop(grace_s=0.05)

        assert await ended(reader) == b""
        assert app.left == 1


# The loop loses a socket that it accepts in the turn in which the accepting task is cancelled. The
# garbage collector closes it, and warns.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("turns", [5, 20, 40])
async def test_a_stop_waits_for_no_connection_that_is_just_being_made(app: App, turns: int) -> None:
    async with serving(app) as (server, port):
        with ExitStack() as clients:
            for _ in range(60):  # one is accepted in each turn of the event loop
                client = socket.create_connection(("127.0.0.1", port))
                clients.enter_context(client).sendall(GET + b"\r\n")
            for _ in range(turns):
                await asyncio.sleep(0)

            async with asyncio.timeout(patience_s()):
                await server.stop(grace_s=1000.0)
