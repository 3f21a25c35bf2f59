"""Serves the metrics over HTTP, without authentication.

The server of prometheus-client is not used: it starts a thread for each connection, without a
limit, and waits for ever for a client that sends nothing. This server reads one small request
from each connection, answers and closes, within a time limit, and limits the number of connections.
A new connection replaces one that has sent nothing, so that idle ones cannot keep Prometheus out.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final, Protocol

import structlog

from runrecovery_service.rpc.listen_address import ListenFailed

REQUEST_S: Final = 5.0
"""How long a connection may stay open in all."""
MAX_REQUEST_BYTES: Final = 8192
PATH: Final = "/metrics"

log = structlog.get_logger()


class Page(Protocol):
    """A page of the HTTP server."""

    async def text(self) -> bytes:
        """Return the page as it is now."""
        ...

    def stop(self) -> None:
        """Cancel a computation of the page that is under way."""
        ...


class MetricsServer:
    """A server of one page.

    Args:
        content_type: the content type of the page.
        max_connections: the most connections. A further one replaces the oldest connection that
            has sent no request yet. If every connection has sent its request, the further one is
            closed at once.
    """

    def __init__(self, page: Page, *, content_type: str, max_connections: int) -> None:
        self._page = page
        self._content_type = content_type
        self._max_connections = max_connections
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()
        self._silent: dict[asyncio.StreamWriter, None] = {}  # no whole request yet; oldest first

    async def bind(self, listen: str) -> int:
        """Listen on the address and answer from now on; return the port.

        Raises:
            ListenFailed: the address does not exist, is taken, or is not permitted.
        """
        host, _, port = listen.rpartition(":")
        try:
            self._server = await asyncio.start_server(
                self._accept, host.strip("[]"), int(port), limit=MAX_REQUEST_BYTES
            )
        except OSError as error:
            raise ListenFailed(listen, error.strerror or str(error)) from error
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def stop(self) -> None:
        """Close the address and every connection."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self._page.stop()

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= self._max_connections:
            oldest = next(iter(self._silent), writer)
            self._silent.pop(oldest, None)
            oldest.transport.abort()
            if oldest is writer:
                return
        self._silent[writer] = None
        task = asyncio.create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        is_answered = False
        try:
            async with asyncio.timeout(REQUEST_S):
                head = await self._head(reader)
                self._silent.pop(writer, None)
                writer.write(await self._answer(head))
                writer.close()
                await writer.wait_closed()  # until the system has taken everything
                is_answered = True
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            pass  # the client is too slow, or has gone
        except Exception:  # the edge of this task: no other code would report the defect
            log.exception("metrics.defect")
        finally:
            self._silent.pop(writer, None)
            if not is_answered:  # asyncio's own transport cannot be aborted once it has closed
                writer.transport.abort()

    @staticmethod
    async def _head(reader: asyncio.StreamReader) -> bytes | None:
        """Return a request up to its body; None if it is too large."""
        try:
            return await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return None

    async def _answer(self, head: bytes | None) -> bytes:
        if head is None:
            return _response("431 Request Header Fields Too Large")
        method, target, version = _request_line(head)
        if not version.startswith("HTTP/1."):
            return _response("400 Bad Request")
        if target.partition("?")[0] != PATH:
            return _response("404 Not Found")
        if method not in {"GET", "HEAD"}:
            return _response("405 Method Not Allowed", "Allow: GET, HEAD")
        body = await self._page.text()
        response = _response("200 OK", f"Content-Type: {self._content_type}", body=body)
        return response if method == "GET" else response.removesuffix(body)


def _request_line(head: bytes) -> tuple[str, str, str]:
    with suppress(ValueError):
        method, target, version = head.split(b"\r\n", 1)[0].decode("latin-1").split(" ")
        return method, target, version
    return "", "", ""


def _response(status: str, *headers: str, body: bytes = b"") -> bytes:
    lines = (
        f"HTTP/1.1 {status}",
        *headers,
        f"Content-Length: {len(body)}",
        "Connection: close",
        "X-Content-Type-Options: nosniff",
    )
    return "\r\n".join((*lines, "", "")).encode("latin-1") + body
