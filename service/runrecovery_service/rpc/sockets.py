"""The sockets of our gRPC server: gRPC opens them in this process and hands none of them out.

They are found among the process's descriptors by their local address. Only gRPC's own end of a
connection could end it for callers too, and that end answers what arrives in the meantime with
CANCELLED. A connection that the system closes fails every call on it as UNAVAILABLE instead, as
after a crash, and that is what clients retry.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

CLOSED_WITHIN_S: Final = 1.0
"""For gRPC to close connections that have been shut down."""
LOOK_S: Final = 0.005


class ServerSockets:
    """The listening sockets and the connections of one address.

    Args:
        listen: `host:port`, with the port that was bound, or a Unix socket as gRPC names it.
    """

    def __init__(self, listen: str) -> None:
        self._family, self._local = _local_address(listen)

    def stop_listening(self) -> None:
        """Refuse new connections, and those that nobody has accepted yet."""
        for one in self._sockets():
            if _listens(one):
                _shut_down(one)

    async def close_connections(self) -> None:
        """End every connection; return once gRPC has noticed, or after `CLOSED_WITHIN_S`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSED_WITHIN_S):
                while self._shut_down_connections():  # noqa: ASYNC110 - gRPC announces nothing
                    await asyncio.sleep(LOOK_S)

    def _shut_down_connections(self) -> int:
        found = 0
        for one in self._sockets():
            if _is_connected(one):
                found += 1
                _shut_down(one)
        return found

    def _sockets(self) -> Iterator[socket.socket]:
        """Yield a duplicate of each; it is closed when the next one is asked for."""
        for one in _stream_sockets():
            with closing(one):
                if self._is_ours(one):
                    yield one

    def _is_ours(self, one: socket.socket) -> bool:
        local = one.getsockname()
        if self._family == socket.AF_UNIX:
            return one.family == socket.AF_UNIX and local == self._local
        return one.family in {socket.AF_INET, socket.AF_INET6} and local[1] == self._local


def _local_address(listen: str) -> tuple[int, str | bytes | int]:
    """Return the family, and what `getsockname` says that is the same for all of its sockets."""
    if listen.startswith("unix-abstract:"):
        return socket.AF_UNIX, b"\0" + listen.removeprefix("unix-abstract:").encode()
    if listen.startswith("unix:"):
        path = listen.removeprefix("unix:")
        return socket.AF_UNIX, path.removeprefix("//") if path.startswith("///") else path
    return socket.AF_INET, int(listen.rpartition(":")[2])


def _stream_sockets() -> Iterator[socket.socket]:
    for link in Path("/proc/self/fd").iterdir():
        try:
            # A duplicate: another thread may close the descriptor and open something else by it.
            descriptor = os.dup(int(link.name))
        except OSError:  # closed meanwhile
            continue
        try:
            one = socket.socket(fileno=descriptor)
        except OSError:  # no socket
            os.close(descriptor)
            continue
        if one.type == socket.SOCK_STREAM:
            yield one
        else:
            one.close()


def _listens(one: socket.socket) -> bool:
    return one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


def _is_connected(one: socket.socket) -> bool:
    try:
        one.getpeername()
    except OSError:  # it listens or listened, or its connection is over
        return False
    return True


def _shut_down(one: socket.socket) -> None:
    with suppress(OSError):  # the peer or gRPC was faster
        one.shutdown(socket.SHUT_RDWR)
