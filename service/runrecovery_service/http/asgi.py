"""Reads requests and sends responses of ASGI, the interface to the HTTP server."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from email.utils import formatdate
from types import TracebackType
from typing import Any, Final, Self, TypeAlias

from runrecovery_service.lazy_dataclass import dataclass

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers: TypeAlias = Sequence[tuple[bytes, bytes]]

BODY_S: Final = 20.0
"""The most seconds until the body of a request has arrived. A slower request is refused."""


class ClientGone(Exception):
    """The client closed the connection."""


class BodyTooLarge(Exception):
    """The body of a request is larger than the limit."""


class BodyTooSlow(Exception):
    """The body of a request did not arrive in time."""


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request, and the means to answer it.

    Attributes:
        headers: headers to add to the response, for pages of other origins.
    """

    scope: Scope
    receive: Receive
    send: Send
    headers: Headers = ()

    async def respond(self, response: Response) -> None:
        """Send a whole response."""
        await response.send(self.send, self.headers)

    async def start(self, status: int, headers: Headers) -> None:
        """Send the status and the headers of a response."""
        await start_response(self.send, status, (*headers, *self.headers))


@dataclass(frozen=True, slots=True)
class Response:
    """A whole response. Its headers are sent in addition to those that every response has."""

    status: int
    body: bytes = b""
    content_type: bytes = b"application/json"
    headers: Headers = ()

    async def send(self, send: Send, more: Headers = ()) -> None:
        """Send the response, with additional headers."""
        headers = (
            (b"content-type", self.content_type),
            (b"content-length", b"%d" % len(self.body)),
            *self.headers,
            *more,
        )
        await start_response(send, self.status, headers)
        await send({"type": "http.response.body", "body": self.body})


async def start_response(send: Send, status: int, headers: Headers) -> None:
    """Send the status and the headers of a response."""
    given = [
        (b"date", formatdate(usegmt=True).encode()),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
        *headers,
    ]
    await send({"type": "http.response.start", "status": status, "headers": given})


def header_values(scope: Scope, name: bytes) -> list[str]:
    """Return the values of a header, by its name in lower case."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def one_header(scope: Scope, name: bytes) -> str | None:
    """Return the value of a header. Repeated headers are joined by commas."""
    values = header_values(scope, name)
    return ", ".join(values) if values else None


async def read_body(scope: Scope, receive: Receive, *, limit: int) -> bytes:
    """Return the body of a request.

    Raises:
        BodyTooLarge: the body has more than `limit` bytes.
        BodyTooSlow: the body did not arrive within `BODY_S`.
        ClientGone: the client closed the connection.
    """
    declared = one_header(scope, b"content-length")
    if declared is not None and int(declared) > limit:  # the HTTP server accepts digits only
        raise BodyTooLarge
    try:
        async with asyncio.timeout(BODY_S):
            return await _read_all(receive, limit)
    except TimeoutError:
        raise BodyTooSlow from None


async def _read_all(receive: Receive, limit: int) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        body += message.get("body", b"")
        if len(body) > limit:
            raise BodyTooLarge
        if not message.get("more_body", False):
            return bytes(body)


class UntilGone:
    """Cancels the code in its context when the client closes the connection, or after a time.

    Enter the context after the whole body was read. It raises `ClientGone` or `TimeoutError`.

    Args:
        timeout_s: the seconds until it cancels the code; None: no limit.
    """

    def __init__(self, receive: Receive, timeout_s: float | None = None) -> None:
        self._receive = receive
        self._limit = asyncio.timeout(timeout_s)
        self._is_gone = False

    async def __aenter__(self) -> Self:
        await self._limit.__aenter__()
        self._watcher = asyncio.create_task(self._watch())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watcher.cancel()
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError:
            if self._is_gone:
                raise ClientGone from None
            raise

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._is_gone = True
        if not self._limit.expired():
            self._limit.reschedule(asyncio.get_running_loop().time())
