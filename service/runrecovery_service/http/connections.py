"""Limits the number of connections of the HTTP server, and how long each can be silent.

uvicorn implements HTTP. This module adds three limits. The number of connections is limited, and
then a new connection replaces an idle one. The head of a request must arrive in time. A client that
reads nothing for too long loses its connection.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Final

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from runrecovery_service.http.app import CERTIFICATE

HEAD_S: Final = 10.0
"""The most time from the start of a request or connection to the end of the head."""
PIECE_BYTES: Final = 16_384
STALL_MARGIN_S: Final = 5.0
"""The seconds between the status that ends a stream and the close of its connection."""


class ConnectionTable(ServerState):
    """All connections of the HTTP server, and those that wait for a request, oldest first.

    Args:
        max_connections: the most connections. A further one replaces the oldest that waits for a
            request. If none waits, the further one is closed at once.

    Attributes:
        live: the connections that have finished their handshake.
    """

    def __init__(self, max_connections: int) -> None:
        super().__init__()
        self._max_connections = max_connections
        self.live: set[Connection] = set()
        self._admitted = 0
        self._waiting: dict[object, Callable[[], object]] = {}

    def admit(self) -> bool:
        """Count a new connection. Return False if there is no room for it."""
        if self._admitted >= self._max_connections:
            if not self._waiting:
                return False
            oldest = next(iter(self._waiting))
            self._waiting.pop(oldest)()
        self._admitted += 1
        return True

    def leave(self) -> None:
        """Record that an admitted connection has ended."""
        self._admitted -= 1

    def wait(self, connection: object, close: Callable[[], object]) -> None:
        """Record that the connection waits for a request, so that `close` can close it."""
        self._waiting[connection] = close

    def work(self, connection: object) -> None:
        """Record that the connection has a request, or has ended."""
        self._waiting.pop(connection, None)


class Connection(H11Protocol):
    """One connection. uvicorn implements the protocol.

    Args:
        stall_s: a client that reads nothing for this time loses its connection.
    """

    def __init__(self, config: Config, table: ConnectionTable, *, stall_s: float) -> None:
        super().__init__(config, table, app_state={})
        self._table = table
        self._stall_s = stall_s + STALL_MARGIN_S
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None
        self.was_made = False
        self.ended = asyncio.Event()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn
        """Begin to wait for a request."""
        self.was_made = True
        self._table.live.add(self)
        super().connection_made(transport)
        self.app_state[CERTIFICATE] = _certificate_names(transport.get_extra_info("peercert"))
        self._table.wait(self, transport.abort)
        self._watch_head(has_begun=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Record that the connection has ended."""
        self._cancel_timers()
        self._table.work(self)
        self._table.live.discard(self)
        self._table.leave()
        super().connection_lost(exc)
        self.ended.set()

    def cut(self) -> None:
        """Record that the event loop has closed the socket, if the connection was made.

        If `connect_accepted_socket` is cancelled, the event loop does not call `connection_lost`.
        Without this method, a stop would wait for the connection, which would still be counted.
        """
        if self.was_made and not self.ended.is_set():
            self.connection_lost(None)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        # In pieces, because parsing a long head takes long: its limit is checked between pieces.
        for at in range(0, len(data), PIECE_BYTES):
            super().data_received(data[at : at + PIECE_BYTES])
            if self.transport.is_closing():
                break
        self._watch_head(has_begun=True)

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        super().on_response_complete()
        self._watch_head(has_begun=bool(self.conn.trailing_data[0]))

    def pause_writing(self) -> None:
        """Record that the client reads nothing."""
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self._stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """Record that the client reads again."""
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not HTTP, or just close if a response is under way."""
        if self._is_answering or self.conn.our_state not in {h11.IDLE, h11.SEND_RESPONSE}:
            self.transport.abort()
        else:
            super().send_400_response(msg)

    @property
    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _watch_head(self, *, has_begun: bool) -> None:
        if self.transport.is_closing():
            return
        if self._is_answering:
            self._table.work(self)
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None
            return
        self._table.wait(self, self.transport.abort)
        if has_begun and self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_S, self.transport.abort)

    def _cancel_timers(self) -> None:
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()


def _certificate_names(certificate: dict[str, Any] | None) -> dict[str, tuple[bytes, ...]]:
    """Return the names in the certificate of a client under gRPC's keys."""
    if not certificate:
        return {}
    others = certificate.get("subjectAltName", ())
    subject = [pair for part in certificate.get("subject", ()) for pair in part]
    return {
        "peer_uri": _values(others, "URI"),
        "peer_dns": _values(others, "DNS"),
        "x509_common_name": _values(subject, "commonName"),
    }


def _values(pairs: Any, kind: str) -> tuple[bytes, ...]:
    return tuple(value.encode() for key, value in pairs if key == kind)
