"""Answers calls of the contract over HTTP, by the Connect protocol (connectrpc.com).

A method with one response takes its request as the body of a POST. If the method changes nothing,
the request can also be in the query of a GET. A method with a stream takes and sends envelopes: a
byte of flags, the length in four bytes, a message. The last envelope has the status of the call.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import struct
from collections.abc import Mapping
from contextlib import aclosing
from typing import Final
from urllib.parse import parse_qsl

import grpc

from runrecovery_service.http.asgi import (
    BodyTooLarge,
    BodyTooSlow,
    Exchange,
    Headers,
    Response,
    Scope,
    Send,
    UntilGone,
    header_values,
    one_header,
    read_body,
)
from runrecovery_service.http.calls import CallFailed, CallOrigin, ContractCalls
from runrecovery_service.http.messages import (
    CODECS,
    STATUS,
    Codec,
    error_body,
    error_json,
    retry_after_s,
)
from runrecovery_service.rpc.method_handlers import ContractMethod

_Code = grpc.StatusCode

UNARY_TYPES: Final = {f"application/{name}": codec for name, codec in CODECS.items()}
STREAM_TYPES: Final = {f"application/connect+{name}": codec for name, codec in CODECS.items()}
GET_PARAMETERS: Final = frozenset({"connect", "encoding", "message", "base64", "compression"})

COMPRESSED: Final = 0b01
END_OF_STREAM: Final = 0b10
_HEAD: Final = struct.Struct(">BI")
_TIMEOUT: Final = re.compile(r"[0-9]{1,10}")
_UTF8: Final = re.compile(r"""charset\s*=\s*"?utf-?8"?""", re.IGNORECASE)


class ConnectHandler:
    """Answers calls of the contract.

    Args:
        max_request_bytes: the largest body that is accepted.
    """

    def __init__(self, calls: ContractCalls, *, max_request_bytes: int) -> None:
        self._calls = calls
        self._max_bytes = max_request_bytes

    async def answer(self, method: ContractMethod, who: CallOrigin, exchange: Exchange) -> None:
        """Answer one request to a method.

        Raises:
            ClientGone: the client closed the connection; the call was cancelled.
        """
        if response := self._refusal(method, exchange.scope):
            await exchange.respond(response)
        elif method.is_stream:
            await self._answer_stream(method, who, exchange)
        else:
            await exchange.respond(await self._answer_unary(method, who, exchange))

    def _refusal(self, method: ContractMethod, scope: Scope) -> Response | None:
        """Return the refusal of a request with a wrong verb or content type, else None."""
        reads_by_get = method.is_read and not method.is_stream
        if scope["method"] == "GET" and reads_by_get:
            return None
        if scope["method"] != "POST":
            allow = b"GET, POST" if reads_by_get else b"POST"
            return _plain(405, "the method needs another HTTP verb", (b"allow", allow))
        types = STREAM_TYPES if method.is_stream else UNARY_TYPES
        if _content_type(scope) not in types:
            wanted = ", ".join(types)
            return _plain(
                415,
                f"the Content-Type must be {' or '.join(types)}",
                (b"accept-post", wanted.encode()),
            )
        return None

    # -- one response --------------------------------------------------------------------------

    async def _answer_unary(
        self, method: ContractMethod, who: CallOrigin, exchange: Exchange
    ) -> Response:
        try:
            await self._calls.demand_caller(method, who)
            timeout_s = _timeout_s(exchange.scope)
            codec, data = await self._unary_request(exchange)
            request = await codec.decode(data, method.request)
            async with _Deadline(exchange.receive, timeout_s):
                payload = request.SerializeToString()
                found = await self._calls.unary_bytes(method, payload, who)
            body = await codec.encode(found, method.response)
        except CallFailed as error:
            return error_response(error)
        return Response(200, body, f"application/{codec.name}".encode())

    async def _unary_request(self, exchange: Exchange) -> tuple[Codec, bytes]:
        """Return the form and the message of a request."""
        scope = exchange.scope
        _demand_protocol(scope)
        if scope["method"] == "GET":
            await self._body(exchange)  # ignored, but read: the connection's next bytes follow it
            return _query_message(scope)
        _demand_no_query(scope)
        _demand_identity(one_header(scope, b"content-encoding"))
        return UNARY_TYPES[_content_type(scope)], await self._body(exchange)

    async def _body(self, exchange: Exchange) -> bytes:
        try:
            return await read_body(exchange.scope, exchange.receive, limit=self._max_bytes)
        except BodyTooLarge:
            what = f"the request is larger than {self._max_bytes} bytes"
            raise CallFailed(_Code.RESOURCE_EXHAUSTED, what) from None
        except BodyTooSlow:
            what = "the body of the request did not arrive in time"
            raise CallFailed(_Code.DEADLINE_EXCEEDED, what) from None

    # -- a stream ------------------------------------------------------------------------------

    async def _answer_stream(
        self, method: ContractMethod, who: CallOrigin, exchange: Exchange
    ) -> None:
        codec = STREAM_TYPES[_content_type(exchange.scope)]
        content_type = (b"content-type", f"application/connect+{codec.name}".encode())
        unbuffered = (b"x-accel-buffering", b"no")  # else nginx would hold messages back
        await exchange.start(200, (content_type, unbuffered))
        end: dict[str, object] = {}
        try:
            await self._calls.demand_caller(method, who)
            timeout_s = _timeout_s(exchange.scope)
            data = await self._stream_request(exchange)
            request = await codec.decode(data, method.request)
            async with (
                _Deadline(exchange.receive, timeout_s),
                aclosing(self._calls.stream(method.path, request, who)) as responses,
            ):
                async for response in responses:
                    packed = response.SerializeToString()
                    body = await codec.encode(packed, method.response)
                    await _send_envelope(exchange.send, 0, body)
        except CallFailed as error:
            end = {"error": error_json(error)}
        await _send_envelope(exchange.send, END_OF_STREAM, json.dumps(end).encode())
        await exchange.send({"type": "http.response.body", "body": b""})

    async def _stream_request(self, exchange: Exchange) -> bytes:
        """Return the message of a request."""
        _demand_protocol(exchange.scope)
        _demand_no_query(exchange.scope)
        _demand_identity(one_header(exchange.scope, b"connect-content-encoding"))
        return _one_envelope(await self._body(exchange))


class _Deadline(UntilGone):
    """Like `UntilGone`, with the timeout that the caller has set. After it the call fails."""

    async def __aexit__(self, *caught: object) -> None:
        try:
            await super().__aexit__(*caught)  # type: ignore[arg-type] # passed on as they are
        except TimeoutError:
            what = "the call took longer than its Connect-Timeout-Ms"
            raise CallFailed(_Code.DEADLINE_EXCEEDED, what) from None


def error_response(error: CallFailed) -> Response:
    """Return the response to a call that failed."""
    delay_s = retry_after_s(error)
    headers: Headers = () if delay_s is None else ((b"retry-after", b"%d" % delay_s),)
    if error.code is _Code.UNAUTHENTICATED:
        headers = (*headers, (b"www-authenticate", b"Bearer"))
    return Response(STATUS[error.code], error_body(error), headers=headers)


def _plain(status: int, sentence: str, header: tuple[bytes, bytes]) -> Response:
    text = f"{sentence}\n".encode()
    return Response(status, text, b"text/plain; charset=utf-8", headers=(header,))


# -- requests ----------------------------------------------------------------------------------


def _content_type(scope: Scope) -> str:
    """Return the content type without `charset=utf-8`; empty if the request has none or two."""
    given = header_values(scope, b"content-type")
    if len(given) != 1:
        return ""
    kind, semicolon, parameter = given[0].partition(";")
    if semicolon and not _UTF8.fullmatch(parameter.strip()):
        return ""
    return kind.strip().lower()


def _timeout_s(scope: Scope) -> float | None:
    given = one_header(scope, b"connect-timeout-ms")
    if given is None:
        return None
    if not _TIMEOUT.fullmatch(given):
        raise _invalid("Connect-Timeout-Ms must be a whole number of at most 10 digits")
    return int(given) / 1000


def _demand_protocol(scope: Scope) -> None:
    if one_header(scope, b"connect-protocol-version") not in {None, "1"}:
        raise _invalid("Connect-Protocol-Version must be 1")


def _demand_identity(encoding: str | None) -> None:
    if encoding not in {None, "", "identity"}:
        what = "compressed requests are not supported; send identity"
        raise CallFailed(_Code.UNIMPLEMENTED, what)


def _demand_no_query(scope: Scope) -> None:
    if scope["query_string"]:
        raise _invalid("a POST takes no query; a token goes into the header Authorization")


def _query_message(scope: Scope) -> tuple[Codec, bytes]:
    """Return the codec and the bytes of the message of a GET."""
    try:
        pairs = parse_qsl(
            scope["query_string"].decode("ascii"),
            keep_blank_values=True,
            errors="strict",
            max_num_fields=2 * len(GET_PARAMETERS),
        )
    except ValueError:
        raise _invalid("the query is not valid") from None
    given = dict(pairs)
    if len(given) != len(pairs) or given.keys() - GET_PARAMETERS:
        names = ", ".join(sorted(GET_PARAMETERS))
        raise _invalid(
            f"the query may have only {names}, each once; a token goes into Authorization"
        )
    if given.get("connect", "v1") != "v1":
        raise _invalid("the parameter connect must be v1")
    codec = CODECS.get(given.get("encoding", ""))
    if codec is None or "message" not in given:
        raise _invalid("a GET needs the parameters encoding=json or encoding=proto, and message")
    _demand_identity(given.get("compression"))
    return codec, _query_bytes(given)


def _query_bytes(given: Mapping[str, str]) -> bytes:
    is_base64 = given.get("base64", "0")
    if is_base64 not in {"0", "1"}:
        raise _invalid("the parameter base64 must be 1")
    if is_base64 == "0":
        return given["message"].encode()
    text = given["message"].rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _invalid("the parameter message is not valid base64url") from None


def _one_envelope(body: bytes) -> bytes:
    """Return the message of a body that must hold one envelope."""
    if len(body) < _HEAD.size:
        raise _invalid("the body must be one envelope")
    flags, size = _HEAD.unpack_from(body)
    if flags & COMPRESSED:
        raise CallFailed(_Code.UNIMPLEMENTED, "compressed messages are not supported")
    if flags or len(body) != _HEAD.size + size:
        raise _invalid("the body must be one envelope")
    return body[_HEAD.size :]


def _invalid(sentence: str) -> CallFailed:
    return CallFailed(_Code.INVALID_ARGUMENT, sentence)


async def _send_envelope(send: Send, flags: int, data: bytes) -> None:
    body = _HEAD.pack(flags, len(data)) + data
    await send({"type": "http.response.body", "body": body, "more_body": True})
