"""Counts and times the calls of registered methods.

gRPC itself refuses calls of unknown methods, so a caller cannot create a new label.
"""

from __future__ import annotations

from collections import Counter as Count
from collections.abc import Awaitable, Callable
from time import perf_counter
from typing import Final, TypeAlias

import grpc

from runrecovery_service.metric_counters import Meters

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"

OK: Final = grpc.StatusCode.OK
CODES: Final = {code.value[0]: code.name for code in grpc.StatusCode}
"""The name of each code, by its number. grpc.aio reports the number of the code that was sent."""

DELAYED: Final = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED"})
"""The codes of refusals that the service delays if there are many. These calls are not timed,
because one caller with a wrong token would make the service look slow."""


class CallMeter:
    """Wraps handlers, and counts their calls. Use it on the event loop.

    Attributes:
        meters: the counters and histograms that get the numbers.
        open_streams: streams that are open now, by method.
    """

    def __init__(self, meters: Meters) -> None:
        self.meters = meters
        self.open_streams: Count[str] = Count()

    def unary(
        self, method: str, respond: Callable[[bytes, Context], Awaitable[bytes]]
    ) -> Callable[[bytes, Context], Awaitable[bytes]]:
        """Return the handler of a method with one response, counted and timed."""
        calls, seconds = self.meters.calls, self.meters.call_seconds
        calls.show_zero(method, "OK")

        async def call(payload: bytes, context: Context) -> bytes:
            begun = perf_counter()
            code = "OK"
            try:
                return await respond(payload, context)
            except BaseException:
                code = code_of(context)
                raise
            finally:
                calls.add(method, code)
                if code not in DELAYED:
                    seconds.observe(perf_counter() - begun, method)

        return call

    def stream(
        self, method: str, respond: Callable[[bytes, Context], Awaitable[None]]
    ) -> Callable[[bytes, Context], Awaitable[None]]:
        """Return the handler of a method with a stream of responses, counted."""
        self.open_streams[method] = 0
        self.meters.streams_cut.show_zero(method)

        async def call(payload: bytes, context: Context) -> None:
            code = ""
            self.open_streams[method] += 1
            try:
                await respond(payload, context)
            except BaseException:
                code = code_of(context)
                raise
            finally:
                self.open_streams[method] -= 1
                self.meters.calls.add(method, code or sent_code(context))

        return call

    def note_cut(self, method: str) -> None:
        """Count a stream that is cut off from a slow reader."""
        self.meters.streams_cut.add(method)


def code_of(context: Context) -> str:
    """Return the code of a call that was aborted; CANCELLED if its caller has gone."""
    code = sent_code(context)
    return "CANCELLED" if code == "OK" else code


def sent_code(context: Context) -> str:
    """Return the name of the code that was sent, OK if none was."""
    code = context.code()
    if code is None:  # gRPC has set none yet: the handler ended well, or was cancelled
        return "OK"
    number = code.value[0] if isinstance(code, grpc.StatusCode) else code
    return CODES.get(number, "UNKNOWN")
