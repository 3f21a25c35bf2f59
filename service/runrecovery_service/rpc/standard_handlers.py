"""Handlers for gRPC's standard services: health and reflection, which are not in our contract.

They parse requests themselves, and answer an invalid message with INVALID_ARGUMENT. gRPC would
answer with UNKNOWN and the name of a protobuf class, and would log a traceback.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from runrecovery_service.rpc.callers import CallerGuard
from runrecovery_service.rpc.method_roles import role_of
from runrecovery_service.rpc.open_calls import OpenCalls

# Neither package ships types for mypy.
Request: TypeAlias = Any
Response: TypeAlias = Any
RequestType: TypeAlias = Any
Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Handler: TypeAlias = "grpc.RpcMethodHandler[bytes, bytes]"


def unary(
    calls: OpenCalls,
    request: RequestType,
    respond: Callable[[Request, Context], Awaitable[Response]],
) -> Handler:
    """Return the handler of a method with one response."""

    async def call(payload: bytes, context: Context) -> bytes:
        calls.track(context)
        data: bytes = (
            await respond(await _parse(request, payload, context), context)
        ).SerializeToString()
        return data

    return grpc.unary_unary_rpc_method_handler(call)


def stream(
    calls: OpenCalls,
    request: RequestType,
    respond: Callable[[Request, Context], AsyncIterator[Response]],
) -> Handler:
    """Return the handler of a method with a stream of responses."""

    async def call(payload: bytes, context: Context) -> AsyncIterator[bytes]:
        calls.track(context)
        async for response in respond(await _parse(request, payload, context), context):
            yield response.SerializeToString()

    return grpc.unary_stream_rpc_method_handler(call)


def bidirectional_stream(
    calls: OpenCalls,
    request: RequestType,
    respond: Callable[[AsyncIterator[Request], Context], AsyncIterator[Response]],
    *,
    guard: CallerGuard | None,
    method: str,
) -> Handler:
    """Return the handler of a method that streams in both directions.

    Args:
        guard: admits callers; None: everyone may call the method.
        method: its full name.
    """
    needed = role_of(method)

    async def call(payloads: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        calls.track(context)
        caller = None
        if guard is not None and needed is not None:
            caller = await guard.admit(context, method, needed)
        try:
            async for response in respond(_parse_each(request, payloads, context), context):
                yield response.SerializeToString()
        finally:
            if guard is not None and caller is not None:
                guard.release(caller)

    return grpc.stream_stream_rpc_method_handler(call)


async def _parse_each(
    request: RequestType, payloads: AsyncIterator[bytes], context: Context
) -> AsyncIterator[Request]:
    async for payload in payloads:
        yield await _parse(request, payload, context)


async def _parse(request: RequestType, payload: bytes, context: Context) -> Request:
    try:
        return request.FromString(payload)
    except DecodeError:
        message = f"not a valid {request.DESCRIPTOR.name} message"
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, message)
