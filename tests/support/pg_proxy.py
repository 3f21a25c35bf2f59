"""A TCP proxy to PostgreSQL that a test can silence or cut, or that loses an answer."""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from enum import Enum, auto
from typing import Final, TypeAlias

from psycopg.conninfo import conninfo_to_dict

CHUNK: Final = 65536


class _Fate(Enum):
    """What happens to the COMMIT of a transaction with the mark, or to its answer."""

    LOSE_COMMIT = auto()
    LOSE_ANSWER = auto()
    STALL_ANSWER = auto()
    HOLD_ANSWER = auto()


class _End:
    """One end of a connection through the proxy."""

    def __init__(self, end: socket.socket, *, is_client: bool) -> None:
        self.socket = end
        self.is_client = is_client
        self.peer: _End
        self.saw_mark = False
        self.is_committing = False
        self.is_stalled = False
        self.held: list[bytes] | None = None


_Key: TypeAlias = "_End | None"


class Proxy:
    """Forwards every connection to the server's socket, in one thread.

    Attributes:
        silent: swallow all bytes and let new connections wait forever, like a network
            that drops packets.
        refusing: close new connections at once.
        refused: how many were closed in that way.
        lost: set when a COMMIT or its answer was lost; see `lose_answer_after`.
        holding: set while bytes are held; see `hold_before` and `hold_answer_after`.
    """

    def __init__(self, url: str) -> None:
        """Listen on loopback for the server of a URL, by a socket directory or an address."""
        named = conninfo_to_dict(url)
        self._server = _address_of(url)
        self._listener = socket.create_server(("127.0.0.1", 0))
        port = self._listener.getsockname()[1]
        self.url = f"postgresql://{named['user']}@127.0.0.1:{port}/{named['dbname']}"
        self.silent = False
        self.refusing = False
        self.refused = 0
        self.lost = threading.Event()
        self._mark: bytes | None = None
        self._fate = _Fate.LOSE_ANSWER
        self._silencing_mark: bytes | None = None
        self._held_mark: bytes | None = None
        self._releasing = False
        self.holding = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._cutting = self._ending = False
        self._selector = selectors.DefaultSelector()
        self._ends: set[_End] = set()
        self._thread = threading.Thread(target=self._work, name="pg-proxy", daemon=True)
        self._thread.start()

    def lose_answer_after(self, mark: str) -> None:
        """Once, end a connection instead of forwarding the answer to a COMMIT.

        The transaction is one in which `mark` was sent. The server has committed it.
        """
        self._arm(mark, _Fate.LOSE_ANSWER)

    def lose_commit_after(self, mark: str) -> None:
        """The same, but end the connection instead of forwarding the COMMIT itself."""
        self._arm(mark, _Fate.LOSE_COMMIT)

    def stall_answer_after(self, mark: str) -> None:
        """The same as `lose_answer_after`, but leave the connection open and silent."""
        self._arm(mark, _Fate.STALL_ANSWER)

    def hold_answer_after(self, mark: str) -> None:
        """The same as `lose_answer_after`, but hold the answer until `release`."""
        self.holding.clear()
        self._arm(mark, _Fate.HOLD_ANSWER)

    def _arm(self, mark: str, fate: _Fate) -> None:
        self.lost.clear()
        self._fate = fate
        self._mark = mark.encode()

    def silence_after(self, mark: str) -> None:
        """Become silent as soon as `mark` is sent, which the server does not get."""
        self._silencing_mark = mark.encode()

    def hold_before(self, mark: str) -> None:
        """Once, hold a client's bytes from those with `mark` on, until `release`."""
        self.holding.clear()
        self._held_mark = mark.encode()

    def release(self) -> None:
        """Forward what is held, and hold nothing more."""
        self._held_mark = None
        if self._fate is _Fate.HOLD_ANSWER:
            self._mark = None
        self._releasing = True
        self._wake.send(b"x")

    def mend(self) -> None:
        """End every fault, and close every connection: some may have lost bytes."""
        self.silent = self.refusing = False
        self._mark = self._silencing_mark = None
        self.release()
        self.cut()

    def stall(self) -> None:
        """Swallow the bytes of existing connections; new ones work."""
        for end in list(self._ends):
            end.is_stalled = True

    def cut(self) -> None:
        """Close every connection."""
        self._cutting = True
        self._wake.send(b"x")

    def direct_to(self, url: str) -> None:
        """Close every connection, and lead new ones to another server."""
        self._server = _address_of(url)
        self.cut()

    def close(self) -> None:
        """End the proxy and every connection."""
        self._ending = True
        with suppress(OSError):  # the thread has seen it already
            self._wake.send(b"x")
        self._thread.join()
        self._wake.close()

    def _work(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        while not self._ending:
            for key, _ in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif key.fileobj is self._woken:
                    self._woken.recv(1)
                    if self._cutting:
                        self._cutting = False
                        self._drop_all()
                    if self._releasing:
                        self._releasing = False
                        self._forward_held()
                elif isinstance(key.data, _End) and key.data in self._ends:
                    self._forward(key.data)
        self._drop_all()
        self._listener.close()
        self._woken.close()
        self._selector.close()

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        if self.refusing:
            client.close()
            self.refused += 1
            return
        try:
            server = self._connect()
        except OSError:  # the server is away
            client.close()
            return
        ends = _End(client, is_client=True), _End(server, is_client=False)
        for end, peer in (ends, ends[::-1]):
            end.peer = peer
            self._ends.add(end)
            self._selector.register(end.socket, selectors.EVENT_READ, end)

    def _connect(self) -> socket.socket:
        if isinstance(self._server, tuple):
            return socket.create_connection(self._server)
        server = socket.socket(socket.AF_UNIX)
        try:
            server.connect(self._server)
        except OSError:
            server.close()
            raise
        return server

    def _forward_held(self) -> None:
        self.holding.clear()
        for end in list(self._ends):
            if self._fate is _Fate.HOLD_ANSWER:
                end.is_committing = False
            held, end.held = end.held or (), None
            with suppress(OSError):
                end.peer.socket.sendall(b"".join(held))

    def _holds(self, end: _End, data: bytes) -> bool:
        if end.held is None and self._begins_hold(end, data):
            end.held = []
            self.holding.set()
        if end.held is None:
            return False
        end.held.append(data)
        return True

    def _begins_hold(self, end: _End, data: bytes) -> bool:
        if end.is_client and self._held_mark is not None and self._held_mark in data:
            self._held_mark = None
            return True
        if not end.is_client and end.peer.is_committing and self._fate is _Fate.HOLD_ANSWER:
            end.peer.is_committing = False
            return True
        return False

    def _forward(self, end: _End) -> None:
        try:
            data = end.socket.recv(CHUNK)
        except OSError:
            data = b""
        if not data:
            self._drop(end)
        elif self.silent or end.is_stalled or self._holds(end, data):
            return
        elif end.is_client and self._silencing_mark is not None and self._silencing_mark in data:
            self.silent, self._silencing_mark = True, None
        elif not end.is_client and end.peer.is_committing:
            self._lose_answer(end)
        elif self._is_commit_lost(end, data):
            self.lost.set()
            self._drop(end)
        else:
            with suppress(OSError):
                end.peer.socket.sendall(data)

    def _lose_answer(self, end: _End) -> None:
        self.lost.set()
        if self._fate is _Fate.STALL_ANSWER:
            end.is_stalled = end.peer.is_stalled = True
        else:
            self._drop(end)

    def _is_commit_lost(self, end: _End, data: bytes) -> bool:
        """Watch for the mark and its COMMIT; return True if the COMMIT is not to be forwarded."""
        if self._mark is None or not end.is_client:
            return False
        if b"BEGIN" in data:
            end.saw_mark = False
        end.saw_mark = end.saw_mark or self._mark in data
        if not end.saw_mark or b"COMMIT" not in data:
            return False
        self._mark = None
        end.is_committing = self._fate is not _Fate.LOSE_COMMIT
        return not end.is_committing

    def _drop(self, end: _End) -> None:
        for each in (end, end.peer):
            if each in self._ends:
                self._ends.remove(each)
                self._selector.unregister(each.socket)
                each.socket.close()

    def _drop_all(self) -> None:
        for end in list(self._ends):
            self._drop(end)


def _address_of(url: str) -> str | tuple[str, int]:
    named = conninfo_to_dict(url)
    host = str(named["host"])
    return f"{host}/.s.PGSQL.5432" if host.startswith("/") else (host, int(str(named["port"])))


@contextmanager
def proxied(url: str) -> Iterator[Proxy]:
    """Yield a proxy to the server of a URL."""
    proxy = Proxy(url)
    try:
        yield proxy
    finally:
        proxy.close()
