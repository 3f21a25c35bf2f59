"""The context of a call over HTTP. It has the methods of gRPC's context that handlers use."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import field
from typing import Any, Final, NoReturn, TypeAlias

import grpc
from google.rpc import error_details_pb2, status_pb2

from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc.callers import AUTHORIZATION
from runrecovery_service.rpc.errors import STATUS_TRAILER

# The package ships no types for mypy.
Detail: TypeAlias = Any
Trailers: TypeAlias = Iterable[tuple[str, str | bytes]]

DETAIL_TYPES: Final[Mapping[str, Detail]] = {
    kind.DESCRIPTOR.full_name: kind
    for kind in (
        error_details_pb2.ErrorInfo,
        error_details_pb2.BadRequest,
        error_details_pb2.PreconditionFailure,
        error_details_pb2.ResourceInfo,
        error_details_pb2.RetryInfo,
    )
}


class CallFailed(Exception):
    """A call of the contract failed.

    Attributes:
        code: the status of the call.
        message: one readable sentence.
        details: messages of google.rpc: an ErrorInfo, and for some errors further messages.
    """

    def __init__(
        self, code: grpc.StatusCode, message: str, details: tuple[Detail, ...] = ()
    ) -> None:
        super().__init__(f"{code.name}: {message}")
        self.code = code
        self.message = message
        self.details = details


@dataclass(frozen=True, slots=True, kw_only=True)
class CallOrigin:
    """The sender of a call.

    Attributes:
        authorization: the value of the Authorization header, `Bearer …`; None: no header.
        peer: the address of the client, for the log.
        certificate: the names in the certificate of the client, under the keys of gRPC.
        metadata: further metadata of the call, with keys in lower case.
    """

    authorization: str | None
    peer: str
    certificate: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)
    metadata: tuple[tuple[str, str], ...] = ()


class CallContext:
    """The context of one call.

    Args:
        write: takes each response of a stream, and waits until the reader has room for the next.
    """

    def __init__(
        self, origin: CallOrigin, write: Callable[[bytes], Awaitable[None]] | None = None
    ) -> None:
        self._origin = origin
        self._write = write
        self._code: grpc.StatusCode | None = None
        self._callbacks: list[Callable[[object], None]] = []

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the metadata, from which handlers read the token and the trace."""
        given = self._origin.authorization
        own = () if given is None else ((AUTHORIZATION, given),)
        return own + self._origin.metadata

    def auth_context(self) -> Mapping[str, tuple[bytes, ...]]:
        """Return the names in the certificate of the client."""
        return self._origin.certificate

    def peer(self) -> str:
        """Return the address of the client."""
        return self._origin.peer

    def code(self) -> grpc.StatusCode | None:
        """Return the status with which the call was aborted, or None if it was not aborted."""
        return self._code

    def add_done_callback(self, callback: Callable[[object], None]) -> None:
        """Call the function when the call has ended."""
        self._callbacks.append(callback)

    def finish(self) -> None:
        """Record that the call has ended."""
        for callback in self._callbacks:
            callback(self)

    async def send_initial_metadata(self, metadata: object) -> None:
        """Do nothing: a response over HTTP needs no initial metadata."""

    async def write(self, data: bytes) -> None:
        """Pass a response of a stream to its reader, and wait while the reader has no room."""
        if self._write is None:
            raise TypeError("a call with one response has no stream")
        await self._write(data)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Trailers = ()
    ) -> NoReturn:
        """Raise the failure of the call."""
        self._code = code
        raise CallFailed(code, details, _details_in(trailing_metadata))


def _details_in(trailers: Trailers) -> tuple[Detail, ...]:
    packed = dict(trailers).get(STATUS_TRAILER)
    if not isinstance(packed, bytes):
        return ()
    found = []
    for detail in status_pb2.Status.FromString(packed).details:
        message = DETAIL_TYPES[detail.type_url.rpartition("/")[2]]()
        detail.Unpack(message)
        found.append(message)
    return tuple(found)
