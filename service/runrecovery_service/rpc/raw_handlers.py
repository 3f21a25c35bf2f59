"""Handlers of the services that are not of our contract: health and reflection.

gRPC would answer bytes that are no message with UNKNOWN, a class of protobuf in the text, and a
traceback in the log. They are parsed here instead, and refused as INVALID_ARGUMENT.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from runrecovery_service.rpc.open_calls import OpenCalls

# Neither package ships types that mypy may see.
Request: TypeAlias = Any
Response: TypeAlias = Any
RequestType: TypeAlias = Any
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"


def unary(
    calls: OpenCalls,
    request: RequestType,
    answer: Callable[[Request, Context], Awaitable[Response]],
) -> Handler:
    """Return the handler of a method with one answer."""

    async def call(payload: bytes, context: Context) -> bytes:
        calls.begin(context)
        data: bytes = (
            await answer(await _parsed(request, payload, context), context)
        ).SerializeToString()
        return data

    return grpc.unary_unary_rpc_method_handler(call)


def stream(
    calls: OpenCalls,
    request: RequestType,
    answers: Callable[[Request, Context], AsyncIterator[Response]],
) -> Handler:
    """Return the handler of a method with a stream of answers."""

    async def call(payload: bytes, context: Context) -> AsyncIterator[bytes]:
        calls.begin(context)
        async for response in answers(await _parsed(request, payload, context), context):
            yield response.SerializeToString()

    return grpc.unary_stream_rpc_method_handler(call)


def dialogue(
    calls: OpenCalls,
    request: RequestType,
    answers: Callable[[AsyncIterator[Request], Context], AsyncIterator[Response]],
) -> Handler:
    """Return the handler of a method with streams in both directions."""

    async def call(payloads: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        calls.begin(context)
        async for response in answers(_each(request, payloads, context), context):
            yield response.SerializeToString()

    return grpc.stream_stream_rpc_method_handler(call)


async def _each(
    request: RequestType, payloads: AsyncIterator[bytes], context: Context
) -> AsyncIterator[Request]:
    async for payload in payloads:
        yield await _parsed(request, payload, context)


async def _parsed(request: RequestType, payload: bytes, context: Context) -> Request:
    try:
        return request.FromString(payload)
    except DecodeError:
        message = f"not a valid {request.DESCRIPTOR.name} message"
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
