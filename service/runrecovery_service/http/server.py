"""The HTTP server: listens, accepts connections, and stops."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from uvicorn.config import Config

from runrecovery_service.http.asgi import Application
from runrecovery_service.http.connections import Connection, ConnectionTable
from runrecovery_service.http.tls import HttpTls
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc.listen_address import bind_sockets

KEEP_ALIVE_S: Final = 60
"""How many seconds a connection can stay open without a request."""
HANDSHAKE_S: Final = 20.0
MAX_HEAD_BYTES: Final = 32_768
"""The largest head of a request. The head of a GET contains its message."""
ACCEPT_PAUSE_S: Final = 0.1
"""Pause in seconds before the next accept after an accept has failed."""
ABORT_S: Final = 1.0
"""How many seconds requests have to end after their connections were closed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """Limits of the HTTP server.

    Attributes:
        max_connections: concurrent connections.
        stall_s: a client that reads nothing for this many seconds loses its stream.
    """

    max_connections: int
    stall_s: float


class HttpServer:
    """The HTTP server of one start. Use it on the event loop.

    Of uvicorn only the protocol is used. Its class `Server` would replace the handlers of signals,
    and would end the process when it cannot bind.
    """

    def __init__(self, app: Application, limits: HttpLimits, tls: HttpTls | None = None) -> None:
        """Make the server; it does not listen yet.

        Args:
            tls: the certificate of the server; None: connections are not encrypted.
        """
        # Warnings of uvicorn are not logged, because anybody who connects can cause them.
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
        self._config = Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            h11_max_incomplete_event_size=MAX_HEAD_BYTES,
        )
        self._config.load()
        self._limits, self._tls = limits, tls
        self._table = ConnectionTable(limits.max_connections)
        self._listeners: list[socket.socket] = []
        self._acceptors: list[asyncio.Task[None]] = []
        self._connecting: set[asyncio.Task[None]] = set()

    async def bind(
        self, listen: str, *, keeper_ended: Callable[[asyncio.Task[None]], None] | None = None
    ) -> int:
        """Listen on the address and answer from now on; return the port.

        Args:
            keeper_ended: called when a task that accepts connections has ended.

        Raises:
            ListenFailed: the address does not exist, is taken, or is not permitted.
        """
        self._listeners = bind_sockets(listen)
        for listener in self._listeners:
            acceptor = asyncio.create_task(self._accept(listener))
            if keeper_ended is not None:
                acceptor.add_done_callback(keeper_ended)
            self._acceptors.append(acceptor)
        port: int = self._listeners[0].getsockname()[1]
        return port

    async def stop(self, *, grace_s: float) -> None:
        """Refuse new connections, wait up to `grace_s` seconds for requests, and close."""
        await self._stop_accepting()
        for connection in list(self._table.live):
            if not connection.transport.is_closing():
                connection.shutdown()  # closes after the response that is under way
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._wait_until_answered()
        for connection in list(self._table.live):
            connection.transport.abort()
        with suppress(TimeoutError):
            async with asyncio.timeout(ABORT_S):
                await self._wait_until_answered()

    async def _stop_accepting(self) -> None:
        tasks = [*self._acceptors, *self._connecting]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for listener in self._listeners:
            listener.close()

    async def _wait_until_answered(self) -> None:
        while self._table.tasks:
            await asyncio.wait(self._table.tasks)
        while self._table.live:  # the last bytes of a response can still be unsent
            await next(iter(self._table.live)).ended.wait()

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(listener)
            except OSError:
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            if not self._table.admit():
                sock.close()
                continue
            connection = Connection(self._config, self._table, stall_s=self._limits.stall_s)
            task = asyncio.create_task(self._connect(sock, connection))
            self._connecting.add(task)
            self._table.wait(task, task.cancel)
            # Not in the task itself: a task that is cancelled before its first step runs no code.
            task.add_done_callback(partial(self._end_connecting, sock, connection))

    async def _connect(self, sock: socket.socket, connection: Connection) -> None:
        """Turn an accepted socket into a connection, which then handles its own events."""
        context = None
        with suppress(OSError):  # the client has gone, or its handshake failed
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                context = await self._tls.context()
            try:
                await asyncio.get_running_loop().connect_accepted_socket(
                    lambda: connection,
                    sock,
                    ssl=context,
                    ssl_handshake_timeout=None if context is None else HANDSHAKE_S,
                )
            except asyncio.CancelledError:
                connection.cut()
                raise

    def _end_connecting(
        self, sock: socket.socket, connection: Connection, task: asyncio.Task[None]
    ) -> None:
        self._connecting.discard(task)
        self._table.work(task)
        if not connection.was_made:
            self._table.leave()
            sock.close()
