"""Requests to the HTTP address of a service, as a script sends them, and the responses decoded."""

from __future__ import annotations

import json
import socket
import ssl
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import Any, Final, TypeAlias

Json: TypeAlias = dict[str, Any]

TIMEOUT_S: Final = 30.0
RUNS: Final = "/runrecovery.v1.RunService"
RECOVERY: Final = "/runrecovery.v1.RecoveryService"
END_OF_STREAM: Final = 0b10


@dataclass(frozen=True, slots=True)
class Reply:
    """A response."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Json:
        """The body as JSON."""
        found: Json = json.loads(self.body)
        return found

    @property
    def reason(self) -> str:
        """The reason in the ErrorInfo of an error; empty: it has none."""
        for detail in self.json.get("details", ()):
            if detail["type"] == "google.rpc.ErrorInfo":
                return str(detail["debug"]["reason"])
        return ""


class HttpApi:
    """Sends requests to one service, each on a connection of its own.

    Args:
        address: HOST:PORT, as `service.listening` names it.
        token: the bearer token of the calls; empty: none.
        context: for TLS; None: plaintext.
    """

    def __init__(
        self, address: str, *, token: str = "", context: ssl.SSLContext | None = None
    ) -> None:
        self.address = address
        self.host, _, port = address.rpartition(":")
        self.port = int(port)
        self._token = token
        self._context = context

    def request(
        self,
        verb: str,
        path: str,
        body: bytes | str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """Send a request and return the response."""
        with self.opened(verb, path, body, headers) as response:
            found = {key.lower(): value for key, value in response.getheaders()}
            return Reply(response.status, found, response.read())

    @contextmanager
    def opened(
        self,
        verb: str,
        path: str,
        body: bytes | str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Iterator[HTTPResponse]:
        """Send a request, and return the response while it arrives."""
        sent = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        connection = self._connection()
        try:
            connection.request(verb, path, body, {**sent, **(headers or {})})
            yield connection.getresponse()
        finally:
            connection.close()

    def post(self, method: str, message: Json | str, **headers: str) -> Reply:
        """Call a method, `/runrecovery.v1.RunService/GetRun`, with a message as JSON."""
        body = message if isinstance(message, str) else json.dumps(message)
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.request("POST", method, body, {"Content-Type": "application/json", **given})

    @contextmanager
    def stream(self, method: str, message: Json, **headers: str) -> Iterator[Iterator[Json]]:
        """Call a method with a stream; the context yields its messages, and at last its end."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        body = envelope(json.dumps(message).encode())
        sent = {"Content-Type": "application/connect+json", **given}
        with self.opened("POST", method, body, sent) as response:
            assert response.status == 200, response.read()
            yield envelopes(response)

    def raw(self, data: bytes, *, ends: bool = False) -> bytes:
        """Send bytes on a connection; return what comes back until it is closed.

        Args:
            ends: let the service know that nothing more will be sent.
        """
        with socket.create_connection((self.host, self.port), TIMEOUT_S) as connection:
            connection.sendall(data)
            if ends:
                connection.shutdown(socket.SHUT_WR)
            return read_all(connection)

    def _connection(self) -> HTTPConnection:
        if self._context is None:
            return HTTPConnection(self.host, self.port, timeout=TIMEOUT_S)
        return HTTPSConnection(self.host, self.port, timeout=TIMEOUT_S, context=self._context)


def read_all(connection: socket.socket) -> bytes:
    """Return what a connection gives until its end."""
    found = b""
    while True:
        try:
            data = connection.recv(65_536)
        except ConnectionResetError:
            return found
        if not data:
            return found
        found += data


def envelope(data: bytes, *, flags: int = 0) -> bytes:
    """Return an envelope of the Connect protocol."""
    return struct.pack(">BI", flags, len(data)) + data


def envelopes(response: HTTPResponse) -> Iterator[Json]:
    """Yield the messages of a stream, and at last `{"end": …}`."""
    while head := response.read(5):
        flags, size = struct.unpack(">BI", head)
        message: Json = json.loads(response.read(size))
        if flags & END_OF_STREAM:
            yield {"end": message}
            return
        yield message


def http_address(service: Any) -> str:
    """Return the HTTP address of a `ServiceProcess`."""
    return str(service.until_event("service.listening")["http_address"])
