"""Sends one POST over a new connection, to an address that was checked.

Complete HTTP clients resolve the host name again when they connect, so the connection could go to
another address than the checked one. The response is parsed by h11, which is small and has no
dependencies.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import field
from ipaddress import ip_address
from typing import Final, TypeAlias

import h11

from runrecovery_service import daemon_threads
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.webhooks.address_policy import address_problem
from runrecovery_service.webhooks.endpoint import Endpoint

CONNECT_S: Final = 5.0
"""Time limit for resolving the name, and for connecting to one address including TLS."""
ADDRESSES_TRIED: Final = 4
READ_BYTES: Final = 8192
HEAD_BYTES: Final = 64 * 1024
"""The most bytes of a response up to the end of its headers."""

Resolve: TypeAlias = Callable[[str, int], list[str]]
"""Returns the addresses of a host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The response of an endpoint, without its body.

    Attributes:
        retry_after: the header `Retry-After`; None: the response has none.
    """

    status: int
    retry_after: str | None = None


class PostFailed(Exception):
    """There was no response. The text is the reason, and contains nothing secret."""


def resolve(host: str, port: int) -> list[str]:
    """Return the IP addresses of a host, the preferred one first. Blocks."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@dataclass(slots=True, eq=False)
class Resolver:
    """Resolves the host name of one endpoint. Concurrent tries share one resolution.

    A resolution can hang, so it runs in a separate thread, which cannot be ended.
    """

    resolve: Resolve = resolve
    _under_way: Future[list[str]] | None = field(default=None, init=False)

    async def addresses(self, host: str, port: int) -> list[str]:
        """Return the IP addresses of the endpoint's host.

        Raises:
            TimeoutError: there is no result within `CONNECT_S`.
        """
        if self._under_way is None or self._under_way.done():
            self._under_way = daemon_threads.start(lambda: self.resolve(host, port))
        async with asyncio.timeout(CONNECT_S):
            return await asyncio.wrap_future(self._under_way)


async def post(
    endpoint: Endpoint,
    headers: Mapping[str, str],
    body: bytes,
    *,
    resolver: Resolver | None = None,
) -> Answer:
    """Send the body and return the response. Redirects are not followed.

    Args:
        resolver: the resolver of the endpoint; None: a new one.

    Raises:
        PostFailed: no address is allowed, the host cannot be reached, its certificate is not valid,
            there was no response within `timeout_s`, or the request would not be valid HTTP.
    """
    with _failures():
        async with asyncio.timeout(endpoint.timeout_s):
            reader, writer = await _connect(
                endpoint, await _addresses(endpoint, resolver or Resolver())
            )
            try:
                return await _exchange(endpoint, headers, body, reader, writer)
            finally:
                writer.transport.abort()  # the rest of the response, however long, is not read


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise PostFailed("no answer in time") from error
    except ssl.SSLCertVerificationError as error:
        raise PostFailed(f"the certificate is not valid: {error.verify_message}") from error
    except ssl.SSLError as error:
        raise PostFailed(f"TLS failed: {error.reason}") from error
    except socket.gaierror as error:
        raise PostFailed(f"the name of the host was not found: {error.strerror}") from error
    except UnicodeError as error:
        raise PostFailed("the name of the host is not valid") from error
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else "the connection failed"
        raise PostFailed(why) from error
    except h11.LocalProtocolError as error:
        raise PostFailed("the request would not be HTTP") from error
    except h11.RemoteProtocolError as error:
        raise PostFailed("the answer is not HTTP") from error


async def _addresses(endpoint: Endpoint, resolver: Resolver) -> list[str]:
    """Return the allowed addresses of the endpoint."""
    host, port = endpoint.host, endpoint.port
    with suppress(ValueError):
        return _allowed(endpoint, [str(ip_address(host))])
    return _allowed(endpoint, await resolver.addresses(host, port))


def _allowed(endpoint: Endpoint, addresses: list[str]) -> list[str]:
    problems = {
        address: address_problem(
            address,
            is_encrypted=endpoint.tls is not None,
            private=endpoint.private,
            insecure_http=endpoint.insecure_http,
        )
        for address in addresses
    }
    allowed = [address for address, problem in problems.items() if problem is None]
    if not allowed:
        raise PostFailed(next(filter(None, problems.values()), "the host has no address"))
    return allowed[:ADDRESSES_TRIED]


async def _connect(
    endpoint: Endpoint, addresses: list[str]
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Connect to the first address that answers."""
    for index, address in enumerate(addresses):
        try:
            async with asyncio.timeout(CONNECT_S):
                return await asyncio.open_connection(
                    address,
                    endpoint.port,
                    ssl=endpoint.tls,
                    server_hostname=endpoint.host if endpoint.tls else None,
                    limit=READ_BYTES,
                )
        except OSError:  # TimeoutError is one
            if index == len(addresses) - 1:
                raise
    raise AssertionError


async def _exchange(
    endpoint: Endpoint,
    headers: Mapping[str, str],
    body: bytes,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> Answer:
    connection = h11.Connection(h11.CLIENT)
    own = {
        "host": endpoint.origin.partition("://")[2],
        "content-length": str(len(body)),
        "connection": "close",
    }
    request = h11.Request(
        method="POST", target=endpoint.target, headers=[*own.items(), *headers.items()]
    )
    for part in (request, h11.Data(data=body), h11.EndOfMessage()):
        writer.write(connection.send(part) or b"")
    await writer.drain()
    received = 0
    while not isinstance(event := connection.next_event(), h11.Response):
        if event is h11.NEED_DATA:
            data = await reader.read(READ_BYTES)
            received += len(data)
            if not data:
                raise PostFailed("the connection was closed without an answer")
            if received > HEAD_BYTES:
                raise PostFailed("the head of the answer is too long")
            connection.receive_data(data)
    found = dict(event.headers).get(b"retry-after")
    retry_after = None if found is None else found.decode("latin-1")
    return Answer(status=event.status_code, retry_after=retry_after)
