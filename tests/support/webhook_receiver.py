"""A receiver of webhooks on raw sockets, which answers well or in whatever way a test wants."""

from __future__ import annotations

import json
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

SECRET: Final = "whsec_" + "c2VjcmV0" * 4
OTHER_SECRET: Final = "whsec_" + "b3RoZXJz" * 4
OK: Final = b"HTTP/1.1 204 No Content\r\n\r\n"


@dataclass(frozen=True)
class Received:
    """One request. The names of headers are in lower case."""

    target: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def id(self) -> str:
        """The id of the event."""
        return self.headers["webhook-id"]

    @property
    def facts(self) -> dict[str, Any]:
        """The body."""
        facts: dict[str, Any] = json.loads(self.body)
        return facts


Behave = Callable[[socket.socket, Received], object]
"""Answers one request on its connection, which is closed afterwards."""


def answer(data: bytes) -> Behave:
    """Return a behaviour that sends these bytes."""
    return lambda connection, _: connection.sendall(data)


def status(code: int, *headers: str) -> Behave:
    """Return a behaviour that answers with a status."""
    return answer("\r\n".join([f"HTTP/1.1 {code} So", *headers, "", ""]).encode())


class Receiver:
    """Accepts connections on 127.0.0.1 and keeps what it has received.

    Attributes:
        behave: answers the next requests.
        received: every complete request, in order.
    """

    def __init__(self, behave: Behave | None = None, *, tls: ssl.SSLContext | None = None) -> None:
        self.behave = behave or answer(OK)
        self.received: list[Received] = []
        self._tls = tls
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    @property
    def url(self) -> str:
        """Its URL."""
        return f"http{'s' if self._tls else ''}://127.0.0.1:{self.port}/hook?key=hidden"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close every connection, and wait for the threads."""
        with suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._threads[0].join()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads[1:]:
            thread.join()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            self._open.add(connection)
            thread = threading.Thread(target=self._serve, args=(connection,))
            self._threads.append(thread)
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        plain = connection
        with suppress(OSError), plain:
            if self._tls is not None:
                connection = self._tls.wrap_socket(plain, server_side=True)
                self._open.add(connection)
            request = _read(connection)
            if request is not None:
                self.received.append(request)
                self.behave(connection, request)
        with suppress(OSError):
            connection.close()
        self._open -= {plain, connection}


def _read(connection: socket.socket) -> Received | None:
    """Return a whole request; None if the connection ends before."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = connection.recv(65_536)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    while len(body) < int(headers["content-length"]):
        body += connection.recv(65_536)
    return Received(target=first.split(" ")[1], headers=headers, body=body)
