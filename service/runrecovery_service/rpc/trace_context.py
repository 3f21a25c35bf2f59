"""The trace that a call belongs to, from its metadata (W3C Trace Context, `traceparent`).

A damaged value is ignored as a whole, and the call continues without a trace: a tracing library of
a caller must not be able to fail a call. `tracestate` is not read.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable
from contextvars import ContextVar
from typing import Final, TypeAlias

import grpc

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Handler: TypeAlias = Callable[[bytes, Context], Awaitable[bytes]]

TRACEPARENT: Final[ContextVar[str | None]] = ContextVar("traceparent", default=None)
"""The trace of the call that this task answers. None: its caller sent none that is valid."""

TRACED: Final = frozenset({"CreateRun"})
"""The methods that need the trace of their call even while traces are off."""

MAX_CHARS: Final = 512
SAMPLED: Final = 1
_FORM: Final = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)


def read_traceparent(metadata: Iterable[tuple[str, str | bytes]]) -> str | None:
    """Return the one valid `traceparent` as version 00; None if there is none, or more than one."""
    values = [value for key, value in metadata if key == "traceparent"]
    if len(values) != 1 or not isinstance(values[0], str) or len(values[0]) > MAX_CHARS:
        return None
    found = _FORM.fullmatch(values[0].strip(" \t"))
    if found is None or (found[1] == "00" and found[5] is not None):
        return None
    # Version 00 has one flag, "sampled". Agents must not rely on the other bits.
    return f"00-{found[2]}-{found[3]}-{int(found[4], 16) & SAMPLED:02x}"


def with_trace(respond: Handler) -> Handler:
    """Return a handler that sets `TRACEPARENT` for the task of each call."""

    async def call(payload: bytes, context: Context) -> bytes:
        TRACEPARENT.set(read_traceparent(context.invocation_metadata() or ()))
        return await respond(payload, context)

    return call
