"""Converts messages of the contract from and to the body of a request: JSON or Protobuf."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, TypeVar

import grpc
from google.protobuf import json_format
from google.protobuf.message import DecodeError, Message

from runrecovery_service.http.call_context import CallFailed, Detail
from runrecovery_service.lazy_dataclass import dataclass

R = TypeVar("R")

THREAD_BYTES: Final = 32_768
"""The largest JSON that is converted on the event loop. A larger one is converted in a thread,
because it would delay every other call."""

_Code = grpc.StatusCode
STATUS: Final[Mapping[grpc.StatusCode, int]] = MappingProxyType(
    {
        _Code.CANCELLED: 499,
        _Code.UNKNOWN: 500,
        _Code.INVALID_ARGUMENT: 400,
        _Code.DEADLINE_EXCEEDED: 504,
        _Code.NOT_FOUND: 404,
        _Code.ALREADY_EXISTS: 409,
        _Code.PERMISSION_DENIED: 403,
        _Code.RESOURCE_EXHAUSTED: 429,
        _Code.FAILED_PRECONDITION: 400,
        _Code.ABORTED: 409,
        _Code.OUT_OF_RANGE: 400,
        _Code.UNIMPLEMENTED: 501,
        _Code.INTERNAL: 500,
        _Code.UNAVAILABLE: 503,
        _Code.DATA_LOSS: 500,
        _Code.UNAUTHENTICATED: 401,
    }
)
"""The HTTP status of each code, as the Connect protocol defines it."""


@dataclass(frozen=True, slots=True)
class Codec:
    """One form of messages.

    Attributes:
        parse: returns a message of a given type. Raises ValueError for data of another form.
    """

    name: str
    parse: Callable[[bytes, type[Message]], Message]
    format: Callable[[Message], bytes]
    in_thread: bool

    async def decode(self, data: bytes, kind: type[Message]) -> Message:
        """Return a message.

        Raises:
            CallFailed: the data is not a message of this type.
        """
        try:
            return await self._run(lambda: self.parse(data, kind), len(data))
        except ValueError:
            what = f"not a valid {kind.DESCRIPTOR.name} as {self.name}"
            raise CallFailed(_Code.INVALID_ARGUMENT, what) from None

    async def encode(self, data: bytes, kind: type[Message]) -> bytes:
        """Return a serialized message in this form."""
        if not self.in_thread:
            return data
        return await self._run(lambda: self.format(kind.FromString(data)), len(data))

    async def _run(self, work: Callable[[], R], size: int) -> R:
        if self.in_thread and size > THREAD_BYTES:
            return await asyncio.to_thread(work)
        return work()


def _parse_json(data: bytes, kind: type[Message]) -> Message:
    try:
        text = data.decode() or "{}"  # in Connect, a missing body is the empty message
        if not text.lstrip().startswith("{"):  # the parser takes a list for an empty message
            raise ValueError("not an object")
        # Unknown fields are ignored, as Connect demands: a caller can be newer than the service.
        return json_format.Parse(text, kind(), ignore_unknown_fields=True)
    except (json_format.ParseError, RecursionError, TypeError, AttributeError) as error:
        raise ValueError from error


def _format_json(message: Message) -> bytes:
    return json_format.MessageToJson(message, indent=None).encode() + b"\n"  # for terminals


def _parse_proto(data: bytes, kind: type[Message]) -> Message:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise ValueError from error


JSON: Final = Codec("json", _parse_json, _format_json, in_thread=True)
PROTO: Final = Codec("proto", _parse_proto, Message.SerializeToString, in_thread=False)
CODECS: Final[Mapping[str, Codec]] = MappingProxyType({"json": JSON, "proto": PROTO})


def error_json(error: CallFailed) -> dict[str, Any]:
    """Return a failure as an error of the Connect protocol."""
    name = "canceled" if error.code is _Code.CANCELLED else error.code.name.lower()
    found: dict[str, Any] = {"code": name, "message": error.message}
    if error.details:
        found["details"] = [_detail_json(detail) for detail in error.details]
    return found


def _detail_json(detail: Detail) -> dict[str, Any]:
    value = base64.b64encode(detail.SerializeToString()).decode().rstrip("=")
    return {
        "type": detail.DESCRIPTOR.full_name,
        "value": value,
        "debug": json_format.MessageToDict(detail),
    }


def error_body(error: CallFailed) -> bytes:
    """Return a failure as the body of a response."""
    return json.dumps(error_json(error)).encode() + b"\n"


def retry_after_s(error: CallFailed) -> int | None:
    """Return the whole seconds after which a retry makes sense; None if the error has no time."""
    for detail in error.details:
        if detail.DESCRIPTOR.name == "RetryInfo":
            seconds: float = detail.retry_delay.ToMilliseconds() / 1000
            return max(1, math.ceil(seconds))
    return None
