"""Wraps every method of the contract: callers, access, limits, parsing, errors as gRPC status.

It wraps at registration because an interceptor costs some 10 µs more per call. It also parses
requests and serializes responses, so that no failure of these reaches the caller as UNKNOWN with
the text of an exception.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext, suppress
from typing import TYPE_CHECKING, Final, NoReturn, TypeAlias

import grpc
import structlog
from google.protobuf.message import DecodeError, Message

from runrecovery_service.domain.caller import ANYONE, Caller
from runrecovery_service.domain.errors import (
    CallerUnknown,
    Denied,
    FieldViolation,
    InvalidFields,
    Overloaded,
    RunRecoveryError,
    SlowReader,
)
from runrecovery_service.domain.role import Role
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc import errors
from runrecovery_service.rpc.call_meter import CallMeter
from runrecovery_service.rpc.callers import CALLER, CallerGuard
from runrecovery_service.rpc.gate import Access, Gate, ServiceState
from runrecovery_service.rpc.open_calls import OpenCalls

if TYPE_CHECKING:  # not imported where traces are off
    from runrecovery_service.rpc.call_tracer import CallTracer

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Unary: TypeAlias = Callable[[Message], Awaitable[Message]]
Responses: TypeAlias = AsyncGenerator[Message | bytes, None]
"""The responses of a stream. Those that many streams share are serialized already."""
Stream: TypeAlias = Callable[[Message], Responses]

log = structlog.get_logger()

ABORT_TIMEOUT_S: Final = 1.0
"""Time for gRPC to accept the final status of a stream whose reader is too slow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One method of the contract: its full name, the role it needs, its access, its request."""

    name: str
    role: Role
    access: Access
    request: type[Message]


class MethodWrapper:
    """Wraps methods with admission, limits, and the conversion of errors.

    Args:
        max_calls: the most concurrent unary calls; methods with access ALWAYS are not counted.
        max_streams: the most concurrent streams; they are mostly idle, so they have their own
            limit.
        stall_s: seconds after which a stream is closed if its reader has taken nothing.
        guard: admits callers; None: everyone may call everything.
        meter: counts and times calls; None: metrics are off.
        tracer: reports calls as spans; None: traces are off.
    """

    def __init__(
        self,
        gate: Gate,
        *,
        max_calls: int,
        max_streams: int,
        stall_s: float,
        guard: CallerGuard | None = None,
        meter: CallMeter | None = None,
        tracer: CallTracer | None = None,
    ) -> None:
        self._gate = gate
        self._meter = meter
        self._tracer = tracer
        self._guard = guard
        self._max_calls = max_calls
        self._max_streams = max_streams
        self._stall_s = stall_s
        self.calls = OpenCalls()
        self._open_unary = 0
        self._open_streams = 0

    def unary(self, method: Method, respond: Unary) -> Callable[[bytes, Context], Awaitable[bytes]]:
        """Return the handler of a method with one response."""
        gate, access, parse = self._gate, method.access, method.request.FromString
        weight = 0 if access is Access.ALWAYS else 1
        serving = ServiceState.SERVING

        async def call(payload: bytes, context: Context) -> bytes:
            self.calls.track(context)
            # Before the limits: a refused call must not take the place of another caller's.
            caller = await self._admit(context, method)
            try:
                self._open_unary += weight
                try:
                    self._check_call_limit(weight)
                    if caller.max_calls is not None:
                        # A call that waits for nothing would end before the next one begins, and
                        # calls that arrived together would never count as in progress together.
                        await asyncio.sleep(0)
                    if gate.state is not serving:
                        gate.check_access(access)
                    response = await respond(parse(payload))
                    return response.SerializeToString()
                finally:  # before the refusal, which may have to wait
                    self._open_unary -= weight
                    self._release(caller)
            except Exception as error:  # noqa: BLE001 - last handler: every error gets a status
                await self._fail(context, method, caller, error)

        traced = call if self._tracer is None else self._tracer.wrap(method.name, call)
        return traced if self._meter is None else self._meter.unary(method.name, traced)

    def stream(
        self, method: Method, respond: Stream
    ) -> Callable[[bytes, Context], Awaitable[None]]:
        """Return the handler of a method with a stream of responses."""
        gate, access, parse = self._gate, method.access, method.request.FromString

        async def call(payload: bytes, context: Context) -> None:
            self.calls.track(context)
            # Before the limits: a refused call must not take the place of another caller's.
            caller = await self._admit(context, method)
            try:
                self._open_streams += 1
                try:
                    self._check_stream_limit()
                    gate.check_access(access)
                    async with self._while_admitted(context, caller):
                        await self._send_all(context, respond(parse(payload)))
                finally:  # before the refusal, which may have to wait
                    self._open_streams -= 1
                    self._release(caller)
            except (CallerUnknown, SlowReader) as error:
                if self._meter is not None and isinstance(error, SlowReader):
                    self._meter.note_cut(method.name)
                await _cut_off(context, method, error)
            except Exception as error:  # noqa: BLE001 - last handler: every error gets a status
                await self._fail(context, method, caller, error)

        traced = call if self._tracer is None else self._tracer.wrap(method.name, call)
        return traced if self._meter is None else self._meter.stream(method.name, traced)

    def may_call(self, method: Method, context: Context) -> bool:
        """Return whether a caller may call the method now.

        A server asks this before it reads a request, so that a refused caller need not send it.
        To refuse, the server calls the handler in the same turn of the event loop, without a
        request.
        """
        return self._guard is None or self._guard.would_admit(context, method.role)

    async def _admit(self, context: Context, method: Method) -> Caller:
        if self._guard is not None:
            return await self._guard.admit(context, method.name, method.role)
        CALLER.set(ANYONE)
        return ANYONE

    def _release(self, caller: Caller) -> None:
        if self._guard is not None:
            self._guard.release(caller)

    async def _fail(
        self, context: Context, method: Method, caller: Caller, error: Exception
    ) -> NoReturn:
        """End a failed call, which no longer counts against the limits.

        If a caller is refused often, its refusals are delayed.
        """
        if self._guard is not None and isinstance(error, Denied | Overloaded):
            if isinstance(error, Denied):
                self._guard.record_refusal(context, method.name, error)
            await self._guard.pace_refusal(caller.name)
        await _abort(context, method, error)

    def _while_admitted(
        self, context: Context, caller: Caller
    ) -> AbstractAsyncContextManager[None]:
        return nullcontext() if self._guard is None else self._guard.while_admitted(context, caller)

    async def _send_all(self, context: Context, responses: Responses) -> None:
        is_first = True
        async with aclosing(responses):
            async for response in responses:
                data = response if isinstance(response, bytes) else response.SerializeToString()
                await self._send(context, data, first=is_first)
                is_first = False

    async def _send(self, context: Context, data: bytes, *, first: bool) -> None:
        """Send a response. This waits while flow control does: the reader's buffers are full."""
        try:
            async with asyncio.timeout(self._stall_s):
                if first:
                    # Sent apart from the message. If the message is cancelled, gRPC would otherwise
                    # not know that the metadata were sent, and could send no status.
                    await context.send_initial_metadata(())
                await context.write(data)
        except TimeoutError:
            raise SlowReader from None
        except grpc.aio.InternalError:
            # The reader is gone, and gRPC will cancel this handler. Any other exception would be
            # logged by gRPC as an error with a stack trace, once per such reader.
            raise asyncio.CancelledError from None

    def _check_call_limit(self, weight: int) -> None:
        if weight and self._open_unary > self._max_calls:
            raise Overloaded

    def _check_stream_limit(self) -> None:
        if self._open_streams > self._max_streams:
            raise Overloaded


async def _cut_off(context: Context, method: Method, error: CallerUnknown | SlowReader) -> None:
    """End a stream, even if its reader has stopped reading.

    gRPC sends the status after the unread messages, so the reader gets it only if it reads on. This
    waits at most `ABORT_TIMEOUT_S`.
    """
    if isinstance(error, SlowReader):
        log.warning("rpc.slow_reader_cut", method=method.name)
    with suppress(TimeoutError, grpc.aio.InternalError):  # InternalError: the reader has gone
        async with asyncio.timeout(ABORT_TIMEOUT_S):
            await _abort(context, method, error)


async def _abort(context: Context, method: Method, error: Exception) -> NoReturn:
    """End the call with the status, message and details of the error."""
    if isinstance(error, grpc.aio.BaseError):  # raised by gRPC, for example by an abort
        raise error
    status = _to_status(method, error)
    await context.abort(status.code, status.message, trailing_metadata=status.trailers)


def _to_status(method: Method, error: Exception) -> errors.CallStatus:
    if isinstance(error, DecodeError):
        # The whole message is invalid, so the violation names the message instead of a field.
        name = method.request.DESCRIPTOR.name
        error = InvalidFields((FieldViolation(name, "not a valid message of this type"),))
    if type(error) in errors.TABLE and isinstance(error, RunRecoveryError):
        return errors.status_of(error)
    error_id = uuid.uuid4().hex
    log.error("rpc.internal_error", error_id=error_id, method=method.name, exc_info=error)
    return errors.internal_status(error_id)
