"""Calls methods of the contract inside this process.

The handlers are those that gRPC calls. So access, limits, metrics and traces are the same as over
gRPC.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, TypeAlias

from google.protobuf.message import Message

from runrecovery_service.http.call_context import CallContext, CallFailed, CallOrigin
from runrecovery_service.rpc.method_handlers import ContractMethod
from runrecovery_service.rpc.server_setup import Contract

__all__ = ["CallFailed", "CallOrigin", "ContractCalls"]

Pieces: TypeAlias = asyncio.Queue[bytes | Exception | None]
"""The serialized responses of a stream, and its end: None, or the error that ended it."""


class ContractCalls:
    """Calls methods of the contract. Use it on the event loop.

    Attributes:
        methods: the methods by path, such as `runrecovery.v1.RunService/GetRun`.
    """

    def __init__(self, contract: Contract) -> None:
        self.methods = contract.methods

    async def unary(self, method: str, request: Message, who: CallOrigin) -> Message:
        """Return the response of a method, named by its path.

        If this coroutine is cancelled, a write that has begun is still finished.

        Raises:
            CallFailed: the service refused the call, or the call failed.
        """
        found = self.methods[method]
        data = await self.unary_bytes(found, request.SerializeToString(), who)
        return found.response.FromString(data)

    async def unary_bytes(self, method: ContractMethod, payload: bytes, who: CallOrigin) -> bytes:
        """Return the serialized response of a method.

        Raises:
            CallFailed: the service refused the call, or the call failed.
        """
        context: Any = CallContext(who)  # the part of gRPC's context that the handlers use
        try:
            data: bytes = await method.handle(payload, context)
        finally:
            context.finish()
        return data

    async def demand_caller(self, method: ContractMethod, who: CallOrigin) -> None:
        """Refuse a call before its request is read, if its caller has no right to make it.

        Raises:
            CallFailed: the call is refused.
        """
        context: Any = CallContext(who)
        if not method.may_call(context):
            try:
                await method.handle(b"", context)  # counts and logs the refusal
            finally:
                context.finish()

    async def stream(
        self, method: str, request: Message, who: CallOrigin
    ) -> AsyncGenerator[Message, None]:
        """Yield the responses of a method, named by its path. Close the generator when done.

        Raises:
            CallFailed: the service refused the call, or the stream failed, for example because
                its reader took nothing for `watch_stall_s`.
        """
        found = self.methods[method]
        pieces: Pieces = asyncio.Queue(maxsize=1)
        handler = asyncio.create_task(_handle(found, request, CallContext(who, pieces.put), pieces))
        try:
            while (piece := await pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield found.response.FromString(piece)
        finally:
            handler.cancel()
            await asyncio.wait({handler})


async def _handle(method: ContractMethod, request: Message, context: Any, pieces: Pieces) -> None:
    """Handle a call with a stream: put its responses, and then its end, into the queue."""
    end: Exception | None = None
    try:
        await method.handle(request.SerializeToString(), context)
    except Exception as error:  # noqa: BLE001 - raised where the responses are read
        end = error
    finally:
        context.finish()
    await pieces.put(end)
