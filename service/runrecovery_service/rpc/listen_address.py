"""Where the server listens: all of an address, by us, and still ours.

gRPC alone is content with less. It binds `localhost` by one of its addresses if the other is taken,
and it removes whatever socket it finds at a path: when it binds, and again when it ends.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import secrets
import socket
import stat
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from enum import Enum, auto
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import quote, unquote

from runrecovery_service.rpc.server_sockets import WILDCARDS, ServerSockets, plain_host

Bind: TypeAlias = Callable[[str], int]
"""Has gRPC bind an address; returns the port. Raises RuntimeError."""

SocketAddress: TypeAlias = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
"""As `socket` has it; the last one is of a Python without IPv6."""

LOCK_TRIES: Final = 100
LOCK_PAUSE_S: Final = 0.02
MAX_PATH_BYTES: Final = 100
"""Linux takes 107, and the socket is bound by a name that is 7 longer."""
NOT_HERE: Final = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
"""This machine has no such address, so nobody can listen there."""


class ListenFailed(OSError):
    """The address cannot be listened on."""

    def __init__(self, listen: str, why: str = "taken, not permitted, or not an address") -> None:
        super().__init__(f"cannot listen on {listen}: {why}")
        self.listen = listen


class Holder(Enum):
    """Who has an address that we have bound."""

    OURS = auto()
    NOBODY = auto()
    ANOTHER = auto()


class ListenAddress(ABC):
    """An address to listen on."""

    @abstractmethod
    def demand_bindable(self) -> None:
        """Try whether the address can be bound now, and leave nothing behind. The bind itself may
        fail all the same: this is for a start, which must not claim anything before it.

        Raises:
            ListenFailed: it does not exist, somebody else has it, or it is not permitted.
        """

    @abstractmethod
    async def bind(self, bind: Bind) -> tuple[int, ServerSockets]:
        """Have a server bind the whole address; return the port and its sockets. Can be repeated,
        for the successor of a server that ended.

        Raises:
            ListenFailed: somebody else listens there, or nobody may.
        """

    def holder(self) -> Holder:
        """Return who has the address now. Where no other can take it, it is ours."""
        return Holder.OURS

    def release(self) -> None:
        """Remove what the bind has left; a socket without a file leaves nothing."""
        return


def parse_listen_address(listen: str) -> ListenAddress:
    """Return the address of a valid `listen`."""
    if listen.startswith("unix-abstract:"):
        return AbstractSocket(listen)
    if listen.startswith("unix:"):
        return SocketFile(listen)
    return HostAndPort(listen)


# -- TCP -----------------------------------------------------------------------------------------


class HostAndPort(ListenAddress):
    """`host:port`, with every address that the host has; port 0 is chosen at the first bind."""

    def __init__(self, listen: str) -> None:
        self._host, _, port = listen.rpartition(":")
        self._port = int(port)

    def demand_bindable(self) -> None:
        """See `ListenAddress`."""
        name = self._host.strip("[]")
        addresses = _socket_addresses(name, self._port)
        bindable = any(address[0] in WILDCARDS for _, address in addresses)
        for family, address in addresses:
            try:
                with socket.socket(family, socket.SOCK_STREAM) as trial:
                    trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as gRPC does
                    trial.bind(address)
            except OSError as error:
                if error.errno not in NOT_HERE:
                    raise ListenFailed(self._listen, error.strerror or str(error)) from error
            else:
                bindable = True
        if not bindable:
            raise ListenFailed(self._listen, "this machine has no such address")

    @property
    def _listen(self) -> str:
        return f"{self._host}:{self._port}"

    async def bind(self, bind: Bind) -> tuple[int, ServerSockets]:
        """See `ListenAddress`."""
        self._port = _bound(bind, self._listen)
        sockets = ServerSockets(self._port)
        bound = sockets.listening_hosts()
        for host in await _hosts(self._host.strip("[]")):
            if host not in bound:
                self._demand_absent(host)
        return self._port, sockets

    def _demand_absent(self, host: str) -> None:
        """Raise ListenFailed unless the host is none of this machine's."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with socket.socket(family) as trial:
                trial.bind((host, self._port))
        except OSError as error:
            if error.errno in NOT_HERE:
                return
        raise ListenFailed(self._listen, f"{host} could not be bound as well")


async def _hosts(name: str) -> set[str]:
    """Return the addresses that a host name or an address stands for."""
    found = await asyncio.to_thread(_socket_addresses, name, 0)
    return {str(address[0]) for _, address in found}


def _socket_addresses(name: str, port: int) -> list[tuple[int, SocketAddress]]:
    """Return each address that a host name or an address stands for, with its family.

    Raises:
        ListenFailed: it stands for none.
    """
    if name.lower() == "localhost":  # gRPC binds both, whatever /etc/hosts says
        return [(socket.AF_INET, ("127.0.0.1", port)), (socket.AF_INET6, ("::1", port))]
    try:
        found = socket.getaddrinfo(name, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "not a host name"
        raise ListenFailed(f"{name}:{port}", why) from error
    return [
        (socket.AF_INET, (plain_host(str(address[0])), port))
        if str(address[0]).startswith("::ffff:")
        else (family, address)
        for family, _, _, _, address in found
    ]


# -- Unix sockets --------------------------------------------------------------------------------


class AbstractSocket(ListenAddress):
    """`unix-abstract:name`. The system gives a name to one socket only."""

    def __init__(self, listen: str) -> None:
        self._listen = listen
        self._name = b"\0" + unquote(listen.removeprefix("unix-abstract:")).encode()

    def demand_bindable(self) -> None:
        """See `ListenAddress`."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
                trial.bind(self._name)
        except OSError as error:
            raise ListenFailed(self._listen, error.strerror or str(error)) from error

    async def bind(self, bind: Bind) -> tuple[int, ServerSockets]:
        """See `ListenAddress`."""
        return _bound(bind, self._listen), ServerSockets(self._name)


class SocketFile(ListenAddress):
    """`unix:path`. The socket is bound beside the path and moved there once nobody else has it, so
    that gRPC never removes the socket of another."""

    def __init__(self, listen: str) -> None:
        self._listen = listen
        path = unquote(listen.removeprefix("unix:"))
        self._path = Path(f"/{path.lstrip('/')}" if path.startswith("//") else path)
        self._file: tuple[int, int] | None = None

    def demand_bindable(self) -> None:
        """See `ListenAddress`."""
        beside = self._beside()
        try:
            self._demand_free()
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
                trial.bind(os.fsencode(beside))
            beside.unlink()
        except ListenFailed:
            raise
        except OSError as error:
            raise ListenFailed(self._listen, error.strerror or "not possible") from error

    def _beside(self) -> Path:
        if len(os.fsencode(self._path)) > MAX_PATH_BYTES:
            raise ListenFailed(self._listen, f"the path has more than {MAX_PATH_BYTES} bytes")
        return self._path.with_name(f"{self._path.name}.{secrets.token_hex(3)}")

    async def bind(self, bind: Bind) -> tuple[int, ServerSockets]:
        """See `ListenAddress`."""
        beside = self._beside()
        try:
            async with _only_one_binds(self._path.parent):
                self._demand_free()
                port = _bound(bind, f"unix:{quote(str(beside))}")
                self._file = _identity(beside)
                beside.rename(self._path)
        except ListenFailed as error:
            raise ListenFailed(self._listen) from error
        except OSError as error:
            raise ListenFailed(self._listen, error.strerror or "not possible") from error
        return port, ServerSockets(str(beside))

    def _demand_free(self) -> None:
        if self.holder() is not Holder.ANOTHER:
            return
        is_socket = self._path.is_socket()
        why = "another process listens there" if is_socket else "a file that is no socket is there"
        raise ListenFailed(self._listen, why)

    def holder(self) -> Holder:
        """Return who has the path. A socket on which nobody listens any more is nobody's."""
        try:
            found = self._path.lstat()
        except FileNotFoundError:
            return Holder.NOBODY
        if (found.st_dev, found.st_ino) == self._file:
            return Holder.OURS
        if stat.S_ISSOCK(found.st_mode) and not _is_listened_on(self._path):
            return Holder.NOBODY
        return Holder.ANOTHER

    def release(self) -> None:
        """Remove the socket, if it is ours."""
        if self._file is not None and self.holder() is Holder.OURS:
            self._path.unlink(missing_ok=True)


@asynccontextmanager
async def _only_one_binds(folder: Path) -> AsyncIterator[None]:
    """Keep other services from binding in this folder meanwhile.

    Raises:
        OSError: the folder is not there, or is locked for too long.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for left in reversed(range(LOCK_TRIES)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not left:
                    raise
                await asyncio.sleep(LOCK_PAUSE_S)
        yield
    finally:
        os.close(descriptor)


def _is_listened_on(path: Path) -> bool:
    """Return whether anybody takes connections there; who cannot be asked counts as somebody."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as trial:
        try:
            trial.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # its queue is full, or we may not
            return True
    return True


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _bound(bind: Bind, address: str) -> int:
    port = 0
    with suppress(RuntimeError):  # all that grpc says
        port = bind(address)
    if not port:
        raise ListenFailed(address)
    return port
