"""A scripted server, and one way to call the synchronous and the asynchronous client."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from operator import attrgetter
from typing import Any, TypeAlias

import pytest
from runrecovery import AsyncRunRecoveryClient, RunRecoveryClient
from runrecovery._streams import Broken, Reconnection
from support.scripted_server import ScriptedServer


class Caller:
    """Calls the methods of either client by name."""

    def __init__(
        self, client: RunRecoveryClient | AsyncRunRecoveryClient, *, target: str = ""
    ) -> None:
        self.client = client
        self.target = target

    async def call(self, name: str, *args: Any, **kwargs: Any) -> Any:
        method = attrgetter(name)(self.client)
        if isinstance(self.client, RunRecoveryClient):
            return await asyncio.to_thread(method, *args, **kwargs)
        return await method(*args, **kwargs)

    async def collect(
        self, name: str, *args: Any, limit: int | None = None, **kwargs: Any
    ) -> list[Any]:
        """Return the first `limit` rows of a method that returns an iterator."""
        method = attrgetter(name)(self.client)
        return await self.rows(method(*args, **kwargs), limit=limit)

    async def rows(self, iterator: Any, *, limit: int | None = None) -> list[Any]:
        """Return the first `limit` rows of an iterator of this client."""
        if isinstance(self.client, RunRecoveryClient):
            return await asyncio.to_thread(lambda: list(itertools.islice(iterator, limit)))
        rows: list[Any] = []
        async for row in iterator:
            rows.append(row)
            if len(rows) == limit:
                break
        return rows


Connect: TypeAlias = Callable[..., Caller]


@pytest.fixture
def server() -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    yield scripted
    scripted.stop()


@pytest.fixture(params=["sync", "aio"])
def flavour(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
async def connect(flavour: str) -> AsyncIterator[Connect]:
    """Make clients of the flavour. At the end of the test, close them."""
    open_clients: list[RunRecoveryClient | AsyncRunRecoveryClient] = []

    def make(target: str, **kwargs: Any) -> Caller:
        kind = RunRecoveryClient if flavour == "sync" else AsyncRunRecoveryClient
        client = kind(target, **kwargs)
        open_clients.append(client)
        return Caller(client, target=target)

    yield make
    for client in open_clients:
        if isinstance(client, RunRecoveryClient):
            client.close()
        else:
            await client.close()


@pytest.fixture
async def caller(server: ScriptedServer, connect: Connect) -> Caller:
    """A client of a scripted server that runs."""
    return connect(server.start())


@pytest.fixture
def reserved() -> Iterator[str]:
    """An address without a listener, which only this test can listen on."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}"


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Replace each pause before a reconnection by none; return the pauses so far."""
    asked: list[float] = []
    pause_s = Reconnection.pause_s

    def no_pause_s(self: Reconnection, failure: Broken) -> float:
        asked.append(pause_s(self, failure))
        return 0.0

    monkeypatch.setattr(Reconnection, "pause_s", no_pause_s)
    return asked
