"""Listen addresses: bind all of an address, check who has it, and release it.

gRPC alone does not do this safely. If one address of `localhost` is taken, gRPC binds only the
other. And gRPC removes any socket that it finds at a path, both when it binds and when it ends.
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
from contextlib import ExitStack, asynccontextmanager, suppress
from enum import Enum, auto
from ipaddress import ip_address
from pathlib import Path
from typing import Final, TypeAlias
from urllib.parse import quote, unquote

from runrecovery_service.rpc.server_sockets import WILDCARDS, ServerSockets, plain_host

BindPort: TypeAlias = Callable[[str], int]
"""gRPC's function that binds an address and returns the port, or raises RuntimeError."""

SocketAddress: TypeAlias = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]
"""An address as in `socket`; the last form is of a Python without IPv6."""

BACKLOG: Final = 1024
LOCK_TRIES: Final = 100
LOCK_PAUSE_S: Final = 0.02
MAX_PATH_BYTES: Final = 100
"""The longest path of a Unix socket. Linux allows 107 bytes, and the socket is first bound under a
name with 7 more bytes."""
NO_SUCH_ADDRESS: Final = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})
"""The system errors for an address that this machine does not have, so that no other process can
listen there."""


class ListenFailed(OSError):
    """The service cannot listen on the address."""

    def __init__(self, listen: str, why: str = "taken, not permitted, or not an address") -> None:
        super().__init__(f"cannot listen on {listen}: {why}")
        self.listen = listen


class Holder(Enum):
    """The present holder of an address that this service had bound."""

    OURS = auto()
    NOBODY = auto()
    ANOTHER = auto()


class ListenAddress(ABC):
    """An address to listen on."""

    @abstractmethod
    def check_bindable(self) -> None:
        """Bind the address and release it at once, to see whether the real bind could succeed.

        A start checks this before it claims anything. The real bind can still fail.

        Raises:
            ListenFailed: the address does not exist, is taken, or is not permitted.
        """

    @abstractmethod
    async def bind(self, bind_port: BindPort) -> tuple[int, ServerSockets]:
        """Bind the whole address; return the port and the server's sockets.

        Can be called again for the server that replaces one that ended.

        Raises:
            ListenFailed: the address is taken or not permitted.
        """

    def holder(self) -> Holder:
        """Return the holder of the address: OURS for an address that nobody else can take."""
        return Holder.OURS

    def release(self) -> None:
        """Remove the socket file, if the address has one."""
        return


def parse_listen_address(listen: str) -> ListenAddress:
    """Return the address for a valid value of `listen`."""
    if listen.startswith("unix-abstract:"):
        return AbstractSocket(listen)
    if listen.startswith("unix:"):
        return SocketFile(listen)
    return HostAndPort(listen)


# -- TCP -----------------------------------------------------------------------------------------


class HostAndPort(ListenAddress):
    """`host:port`, with all addresses of the host. Port 0 becomes a free port at the first bind."""

    def __init__(self, listen: str) -> None:
        self._host, _, port = listen.rpartition(":")
        self._port = int(port)

    def check_bindable(self) -> None:
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
                if error.errno not in NO_SUCH_ADDRESS:
                    raise ListenFailed(self._listen, error.strerror or str(error)) from error
            else:
                bindable = True
        if not bindable:
            raise ListenFailed(self._listen, "this machine has no such address")

    @property
    def _listen(self) -> str:
        return f"{self._host}:{self._port}"

    async def bind(self, bind_port: BindPort) -> tuple[int, ServerSockets]:
        """See `ListenAddress`."""
        self._port = _bind_or_raise(bind_port, self._listen)
        sockets = ServerSockets(self._port)
        bound = sockets.listening_hosts()
        for host in await _hosts(self._host.strip("[]")):
            if host not in bound:
                self._check_not_ours_to_bind(host)
        return self._port, sockets

    def _check_not_ours_to_bind(self, host: str) -> None:
        """Raise ListenFailed if this machine has the address that gRPC did not bind."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            with socket.socket(family) as trial:
                trial.bind((host, self._port))
        except OSError as error:
            if error.errno in NO_SUCH_ADDRESS:
                return
        raise ListenFailed(self._listen, f"{host} could not be bound as well")


def bind_sockets(listen: str) -> list[socket.socket]:
    """Return listening sockets for all addresses of `host:port`, for a server that is not gRPC's.

    Raises:
        ListenFailed: an address is taken or not permitted, or this machine has none of them.
    """
    host, _, port_text = listen.rpartition(":")
    port = int(port_text)
    with ExitStack() as bound:
        sockets: list[socket.socket] = []
        for family, address in _socket_addresses(host.strip("[]"), port):
            try:
                sock = bound.enter_context(_listening_socket(family, (str(address[0]), port)))
            except OSError as error:
                if error.errno in NO_SUCH_ADDRESS:
                    continue
                raise ListenFailed(listen, error.strerror or str(error)) from error
            sockets.append(sock)
            port = sock.getsockname()[1]
        if not sockets:
            raise ListenFailed(listen, "this machine has no such address")
        bound.pop_all()
    return sockets


def _listening_socket(family: int, address: tuple[str, int]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)  # noqa: FBT003 - its signature
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # `[::]` takes IPv4 as well, as with gRPC
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, int(address[0] != "::"))
        sock.bind(address)
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


async def _hosts(name: str) -> set[str]:
    """Return the IP addresses of a host name or address."""
    found = await asyncio.to_thread(_socket_addresses, name, 0)
    return {str(address[0]) for _, address in found}


def count_addresses(listen: str) -> int:
    """Return how many addresses `listen` can stand for: gRPC limits connections per address.

    A name counts as at least two, because gRPC resolves `localhost` to an IPv4 and an IPv6 address.
    """
    host, colon, _ = listen.rpartition(":")
    if not colon or listen.startswith(("unix:", "unix-abstract:")):
        return 1
    with suppress(ValueError):
        ip_address(host.strip("[]"))
        return 1
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError):  # the bind reports the error
        return 2
    return max(2, len(found))


def bound_address(listen: str, port: int) -> str:
    """Return the address for clients: `listen` with the port that was bound."""
    host, colon, _ = listen.rpartition(":")
    is_socket_file = listen.startswith(("unix:", "unix-abstract:"))
    return f"{host}:{port}" if colon and not is_socket_file else listen


def _socket_addresses(name: str, port: int) -> list[tuple[int, SocketAddress]]:
    """Return the addresses of a host name or address, each with its family.

    Raises:
        ListenFailed: there are none.
    """
    if name.lower() == "localhost":  # gRPC binds both addresses, whatever /etc/hosts says
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
    """`unix-abstract:name`. The kernel gives such a name to one socket only."""

    def __init__(self, listen: str) -> None:
        self._listen = listen
        self._name = b"\0" + unquote(listen.removeprefix("unix-abstract:")).encode()

    def check_bindable(self) -> None:
        """See `ListenAddress`."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
                trial.bind(self._name)
        except OSError as error:
            raise ListenFailed(self._listen, error.strerror or str(error)) from error

    async def bind(self, bind_port: BindPort) -> tuple[int, ServerSockets]:
        """See `ListenAddress`."""
        return _bind_or_raise(bind_port, self._listen), ServerSockets(self._name)


class SocketFile(ListenAddress):
    """`unix:path`. The socket is bound under a temporary name and renamed once the path is free.

    gRPC would otherwise remove the socket of another process at the path.
    """

    def __init__(self, listen: str) -> None:
        self._listen = listen
        path = unquote(listen.removeprefix("unix:"))
        self._path = Path(f"/{path.lstrip('/')}" if path.startswith("//") else path)
        self._file: tuple[int, int] | None = None

    def check_bindable(self) -> None:
        """See `ListenAddress`."""
        temporary = self._temporary_path()
        try:
            self._check_free()
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
                trial.bind(os.fsencode(temporary))
            temporary.unlink()
        except ListenFailed:
            raise
        except OSError as error:
            raise ListenFailed(self._listen, error.strerror or "not possible") from error

    def _temporary_path(self) -> Path:
        if len(os.fsencode(self._path)) > MAX_PATH_BYTES:
            raise ListenFailed(self._listen, f"the path has more than {MAX_PATH_BYTES} bytes")
        return self._path.with_name(f"{self._path.name}.{secrets.token_hex(3)}")

    async def bind(self, bind_port: BindPort) -> tuple[int, ServerSockets]:
        """See `ListenAddress`."""
        temporary = self._temporary_path()
        try:
            async with _bind_lock(self._path.parent):
                self._check_free()
                port = _bind_or_raise(bind_port, f"unix:{quote(str(temporary))}")
                self._file = _identity(temporary)
                temporary.rename(self._path)
        except ListenFailed as error:
            raise ListenFailed(self._listen) from error
        except OSError as error:
            raise ListenFailed(self._listen, error.strerror or "not possible") from error
        return port, ServerSockets(str(temporary))

    def _check_free(self) -> None:
        if self.holder() is not Holder.ANOTHER:
            return
        is_socket = self._path.is_socket()
        why = "another process listens there" if is_socket else "a file that is no socket is there"
        raise ListenFailed(self._listen, why)

    def holder(self) -> Holder:
        """Return which process has the path: NOBODY if no process listens on the socket."""
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
async def _bind_lock(folder: Path) -> AsyncIterator[None]:
    """Keep other services from binding in this folder, inside the context.

    Raises:
        OSError: the folder does not exist, or stays locked for too long.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for tries_left in reversed(range(LOCK_TRIES)):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not tries_left:
                    raise
                await asyncio.sleep(LOCK_PAUSE_S)
        yield
    finally:
        os.close(descriptor)


def _is_listened_on(path: Path) -> bool:
    """Return whether a process accepts connections at the path; True when that is unknown."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as trial:
        try:
            trial.connect(str(path))
        except (ConnectionRefusedError, FileNotFoundError):
            return False
        except OSError:  # a full queue, or no permission to connect
            return True
    return True


def _identity(path: Path) -> tuple[int, int]:
    found = path.lstat()
    return found.st_dev, found.st_ino


def _bind_or_raise(bind_port: BindPort, address: str) -> int:
    port = 0
    with suppress(RuntimeError):  # gRPC raises nothing more specific
        port = bind_port(address)
    if not port:
        raise ListenFailed(address)
    return port
