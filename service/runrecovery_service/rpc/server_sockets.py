"""The sockets of our gRPC server: gRPC opens them in this process and hands none of them out.

They are found among the process's descriptors by their local address. Only gRPC's own end of a
connection could end it for callers too, and that end answers what arrives in the meantime with
CANCELLED. A connection that the system closes fails every call on it as UNAVAILABLE instead, as
after a crash, and that is what clients retry.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import sys
import termios
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Final, TypeAlias

Local: TypeAlias = int | str | bytes
"""A TCP port, the path by which a Unix socket was bound, or an abstract name with its NUL."""

CLOSED_WITHIN_S: Final = 1.0
"""For gRPC to close connections that have been shut down."""
LOOK_S: Final = 0.005
SENT_LOOK_S: Final = 0.02
WILDCARDS: Final = frozenset({"::", "0.0.0.0"})  # noqa: S104 - compared, not bound


class ServerSockets:
    """The listening sockets and the connections of one server.

    Args:
        local: what tells them from others of the process, beside the addresses that are listened
            on now: a connection to elsewhere may have the same port at another of them.
    """

    def __init__(self, local: Local) -> None:
        self._local = local
        self._hosts: set[str] = set()
        if isinstance(local, int):
            self._hosts = self.listening_hosts()

    def listening_hosts(self) -> set[str]:
        """Return the IP addresses that are listened on."""
        return {host for one in self._sockets() if _listens(one) for host in _hosts(one)}

    def stop_listening(self) -> None:
        """Refuse new connections, and those that nobody has accepted yet."""
        for one in self._sockets():
            if _listens(one):
                _shut_down(one)

    async def until_sent(self) -> None:
        """Return when the callers' systems have all that was written. One that answers to a closed
        connection meanwhile, were it only a window update, would lose the rest."""
        while sum(_unsent(one) for one in self._sockets() if _is_connected(one)):  # noqa: ASYNC110
            await asyncio.sleep(SENT_LOOK_S)

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
        name = one.getsockname()
        if isinstance(self._local, int):
            if one.family not in {socket.AF_INET, socket.AF_INET6} or name[1] != self._local:
                return False
            return _listens(one) or bool(self._hosts & {*WILDCARDS, plain_host(name[0])})
        return one.family == socket.AF_UNIX and name == self._local


def _stream_sockets() -> Iterator[socket.socket]:
    for link in Path("/proc/self/fd").iterdir():
        try:
            # Closing a duplicate of a file would drop the locks of this process on it: SQLite's.
            if not str(link.readlink()).startswith("socket:"):
                continue
            # A duplicate: another thread may close the descriptor and open something else by it.
            descriptor = os.dup(int(link.name))
        except OSError:  # closed meanwhile
            continue
        try:
            one = socket.socket(fileno=descriptor)
        except OSError:  # a file by now, which is left open for its locks
            continue
        if one.type == socket.SOCK_STREAM:
            yield one
        else:
            one.close()


def _hosts(one: socket.socket) -> set[str]:
    host = str(one.getsockname()[0])
    takes_ipv4 = one.family == socket.AF_INET6 and not one.getsockopt(
        socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
    )
    if host == "::" and takes_ipv4:
        return set(WILDCARDS)
    return {plain_host(host)}


def plain_host(host: str) -> str:
    """Return an IPv4 address that is written as an IPv6 one as what it is; others as they are."""
    return host.removeprefix("::ffff:")


def _listens(one: socket.socket) -> bool:
    return one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


def _is_connected(one: socket.socket) -> bool:
    try:
        one.getpeername()
    except OSError:  # it listens or listened, or its connection is over
        return False
    return True


def _unsent(one: socket.socket) -> int:
    """Return how many bytes of what was written the peer's system has not acknowledged."""
    try:
        return int.from_bytes(fcntl.ioctl(one, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0


def _shut_down(one: socket.socket) -> None:
    with suppress(OSError):  # the peer or gRPC was faster
        one.shutdown(socket.SHUT_RDWR)
