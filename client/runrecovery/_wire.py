"""Performs calls on a channel, for threads and for asyncio. Streams are reopened here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import aclosing, closing
from typing import TypeVar

import grpc
import grpc.aio

from runrecovery import _streams as streams
from runrecovery._failures import from_rpc_error
from runrecovery._requests import Call, Listing, Page
from runrecovery._silence import SilenceTimeout
from runrecovery._token import BearerToken

ResultT = TypeVar("ResultT")
RowT = TypeVar("RowT")


class Wire:
    """Performs calls on a channel and raises the client's own errors."""

    def __init__(self, channel: grpc.Channel, *, timeout_s: float, token: BearerToken) -> None:
        self.channel = channel
        self.timeout_s = timeout_s
        self.token = token

    def unary(self, call: Call[ResultT], *, timeout_s: float | None) -> ResultT:
        invoke = self.channel.unary_unary(
            call.path, request_serializer=call.encode, response_deserializer=call.decode
        )
        try:
            return invoke(
                call.request,
                timeout=self.timeout_s if timeout_s is None else timeout_s,
                wait_for_ready=call.wait_for_ready,
                metadata=self.token.metadata(),
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    def rows(
        self,
        listing: Listing[RowT],
        *,
        timeout_s: float | None,
        first: Page[RowT] | None = None,
    ) -> Iterator[RowT]:
        page = self.unary(listing(""), timeout_s=timeout_s) if first is None else first
        while True:
            yield from page.rows
            if not page.next_token:
                return
            page = self.unary(listing(page.next_token), timeout_s=timeout_s)

    def stream(
        self, call: Call[ResultT], *, timeout_s: float | None, silence_s: float | None
    ) -> Generator[ResultT, None, None]:
        invoke = self.channel.unary_stream(
            call.path, request_serializer=call.encode, response_deserializer=call.decode
        )
        answers = invoke(
            call.request,
            timeout=timeout_s,
            wait_for_ready=call.wait_for_ready,
            metadata=self.token.metadata(),
        )
        silence = None if silence_s is None else SilenceTimeout(silence_s, answers.cancel)
        try:
            yield from answers if silence is None else silence.watch(answers)
        except grpc.RpcError as error:
            if silence is not None and silence.has_expired:
                raise streams.silence_error() from error
            raise from_rpc_error(error) from error
        finally:
            if silence is not None:
                silence.stop()
            answers.cancel()

    def resumed(self, reader: streams.Reader[ResultT]) -> Generator[ResultT, None, None]:
        """Yield the messages of a stream, and reopen the stream whenever it breaks."""
        while True:
            call, left_s = reader.open()
            stream = self.stream(call, timeout_s=left_s, silence_s=reader.silence_s)
            try:
                with closing(stream):
                    for message in stream:
                        if reader.accept(message):
                            yield message
            except streams.BROKEN as failure:
                pause_s = reader.pause_s(failure)
            else:
                return
            time.sleep(pause_s)


class AsyncWire:
    """The same as `Wire`, for asyncio."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout_s: float, token: BearerToken) -> None:
        self.channel = channel
        self.timeout_s = timeout_s
        self.token = token

    async def unary(self, call: Call[ResultT], *, timeout_s: float | None) -> ResultT:
        invoke = self.channel.unary_unary(
            call.path, request_serializer=call.encode, response_deserializer=call.decode
        )
        try:
            return await invoke(
                call.request,
                timeout=self.timeout_s if timeout_s is None else timeout_s,
                wait_for_ready=call.wait_for_ready,
                metadata=self.token.metadata(),
            )
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error

    async def rows(
        self,
        listing: Listing[RowT],
        *,
        timeout_s: float | None,
        first: Page[RowT] | None = None,
    ) -> AsyncIterator[RowT]:
        page = await self.unary(listing(""), timeout_s=timeout_s) if first is None else first
        while True:
            for row in page.rows:
                yield row
            if not page.next_token:
                return
            page = await self.unary(listing(page.next_token), timeout_s=timeout_s)

    async def stream(
        self, call: Call[ResultT], *, timeout_s: float | None, silence_s: float | None
    ) -> AsyncGenerator[ResultT, None]:
        invoke = self.channel.unary_stream(
            call.path, request_serializer=call.encode, response_deserializer=call.decode
        )
        answers = invoke(
            call.request,
            timeout=timeout_s,
            wait_for_ready=call.wait_for_ready,
            metadata=self.token.metadata(),
        )
        coming = aiter(answers)
        try:
            while True:
                async with asyncio.timeout(silence_s):
                    answer = await anext(coming)
                yield answer
        except StopAsyncIteration:
            return
        except TimeoutError as error:
            raise streams.silence_error() from error
        except grpc.RpcError as error:
            raise from_rpc_error(error) from error
        finally:
            answers.cancel()

    async def resumed(self, reader: streams.Reader[ResultT]) -> AsyncGenerator[ResultT, None]:
        """Yield the messages of a stream, and reopen the stream whenever it breaks."""
        while True:
            call, left_s = reader.open()
            stream = self.stream(call, timeout_s=left_s, silence_s=reader.silence_s)
            try:
                async with aclosing(stream):
                    async for message in stream:
                        if reader.accept(message):
                            yield message
            except streams.BROKEN as failure:
                pause_s = reader.pause_s(failure)
            else:
                return
            await asyncio.sleep(pause_s)
