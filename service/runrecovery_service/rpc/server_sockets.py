"""The sockets of the gRPC server, which gRPC opens in this process and does not expose.

They are found among the descriptors of the process by their local address. A stop closes them here,
not through gRPC. gRPC would answer late calls with CANCELLED, which clients do not retry. A
connection that the operating system closes fails its calls with UNAVAILABLE, which clients retry.
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
from typing import Final, TypeAlias

Local: TypeAlias = int | str | bytes
"""A TCP port, the path by which a Unix socket was bound, or an abstract name with its NUL."""

CLOSE_TIMEOUT_S: Final = 1.0
"""Time for gRPC to close connections that have been shut down."""
CLOSE_POLL_S: Final = 0.005
SENT_POLL_S: Final = 0.02
WILDCARDS: Final = frozenset({"::", "0.0.0.0"})  # noqa: S104 - compared, not bound


class ServerSockets:
    """The listening sockets and the connections of one server.

    Args:
        local: the local port or path of the server's sockets. Of the connections with a port, only
            those count whose local address the server listens on now: an outgoing connection may
            have the same port at another address.
    """

    def __init__(self, local: Local) -> None:
        self._local = local
        self._hosts: set[str] = set()
        if isinstance(local, int):
            self._hosts = self.listening_hosts()

    def listening_hosts(self) -> set[str]:
        """Return the IP addresses on which the server listens."""
        return {host for one in self._sockets() if _listens(one) for host in _hosts(one)}

    def stop_listening(self) -> None:
        """Refuse new connections, and those that gRPC has not accepted yet."""
        for one in self._sockets():
            if _listens(one):
                _shut_down(one)

    async def wait_until_sent(self) -> None:
        """Wait until the peers have acknowledged everything that was written.

        A peer that sends anything to a closed connection, even a window update, loses the rest.
        """
        while sum(_unsent(one) for one in self._sockets() if _is_connected(one)):  # noqa: ASYNC110
            await asyncio.sleep(SENT_POLL_S)

    async def close_connections(self) -> None:
        """Shut down every connection and wait until gRPC closes it, up to `CLOSE_TIMEOUT_S`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                while self._shut_down_connections():  # noqa: ASYNC110 - gRPC has no event for it
                    await asyncio.sleep(CLOSE_POLL_S)

    def _shut_down_connections(self) -> int:
        found = 0
        for one in self._sockets():
            if _is_connected(one):
                found += 1
                _shut_down(one)
        return found

    def _sockets(self) -> Iterator[socket.socket]:
        """Yield a duplicate of each socket of the server, and close it afterwards."""
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
    # Without pathlib, which takes most of the time: a start and a stop list some ten times.
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208
        try:
            # Closing a duplicate of a file would drop this process's locks on it, such as SQLite's.
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):  # noqa: PTH115
                continue
            # Duplicated, because another thread may close the descriptor and reuse its number.
            descriptor = os.dup(int(name))
        except OSError:  # the descriptor was closed meanwhile
            continue
        try:
            one = socket.socket(fileno=descriptor)
        except OSError:  # now a file has this number; it stays open, to keep its locks
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
    """Return an IPv4-mapped IPv6 address as IPv4, any other address unchanged."""
    return host.removeprefix("::ffff:")


def _listens(one: socket.socket) -> bool:
    return one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) == 1


def _is_connected(one: socket.socket) -> bool:
    try:
        one.getpeername()
    except OSError:  # a listening socket, or a connection that has ended
        return False
    return True


def _unsent(one: socket.socket) -> int:
    """Return how many written bytes the peer has not acknowledged."""
    try:
        return int.from_bytes(fcntl.ioctl(one, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0


def _shut_down(one: socket.socket) -> None:
    with suppress(OSError):  # the peer or gRPC has closed it already
        one.shutdown(socket.SHUT_RDWR)
