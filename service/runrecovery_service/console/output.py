"""The output of a run as text: one part for a page, and then the output that is added."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

import grpc
from markupsafe import Markup
from runrecovery.v1 import run_service_pb2

from runrecovery_service.console.contract import Contract
from runrecovery_service.console.shown_text import shown
from runrecovery_service.http.calls import CallFailed
from runrecovery_service.lazy_dataclass import dataclass

WINDOW_BYTES: Final = 32 * 1024
"""The most bytes of output on one page. A link leads to earlier output."""
MAX_PARTIAL_BYTES: Final = 64 * 1024
"""The longest line that is shown only once it is complete. A longer line is shown in parts."""

CHANNELS: Final = {
    "stdout": run_service_pb2.OUTPUT_CHANNEL_STDOUT,
    "stderr": run_service_pb2.OUTPUT_CHANNEL_STDERR,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputView:
    """A part of the output.

    Attributes:
        start, end: the range of bytes that is shown. A stream continues at `end`.
        earlier: the start of the part before this one; None if there is none.
        later: whether there was output after `end` when the page was made.
        problem: why the output cannot be shown; empty if it can be shown, or if it is empty.
    """

    channel: str
    attempt: int
    html: Markup
    start: int
    end: int
    earlier: int | None
    later: bool
    truncated: bool
    problem: str


@dataclass(frozen=True, slots=True)
class _Part:
    data: bytes
    start: int
    attempt: int
    truncated: bool
    has_more: bool


async def output_view(
    contract: Contract, run_id: str, channel: str, start: int | None
) -> OutputView:
    """Return a window of the output of the latest attempt.

    Args:
        start: the first byte of the window; None: the window ends where the output ends.
    """
    source = _Source(contract, run_id, channel)
    try:
        part = await (source.last_part() if start is None else source.part(start))
    except CallFailed as error:
        if error.code not in {
            grpc.StatusCode.OUT_OF_RANGE,
            grpc.StatusCode.NOT_FOUND,
            grpc.StatusCode.FAILED_PRECONDITION,
        }:
            raise
        problem = "" if error.code is grpc.StatusCode.OUT_OF_RANGE else error.message
        return _empty(channel, problem)
    data, first = _whole_lines(part.data, part.start, at_end=not part.has_more)
    return OutputView(
        channel=channel,
        attempt=part.attempt,
        html=shown(data.decode("utf-8", "replace")),
        start=first,
        end=first + len(data),
        earlier=max(0, first - WINDOW_BYTES) if first else None,
        later=part.has_more,
        truncated=part.truncated,
        problem="",
    )


def _empty(channel: str, problem: str) -> OutputView:
    return OutputView(
        channel=channel,
        attempt=0,
        html=Markup(),
        start=0,
        end=0,
        earlier=None,
        later=False,
        truncated=False,
        problem=problem,
    )


def _whole_lines(data: bytes, start: int, *, at_end: bool) -> tuple[bytes, int]:
    """Return the whole lines of a window, and where they begin.

    An incomplete last line is included, unless more output follows it in the file.
    """
    if start:
        cut = data.find(b"\n") + 1
        if 0 < cut < len(data):
            data, start = data[cut:], start + cut
    if not at_end:
        cut = data.rfind(b"\n") + 1
        data = data[:cut] if cut else data
    return data, start


class _Source:
    """Reads pieces of the present output of one channel."""

    def __init__(self, contract: Contract, run_id: str, channel: str) -> None:
        self._contract = contract
        self._run_id = run_id
        self._channel = CHANNELS[channel]

    async def part(self, start: int) -> _Part:
        """Return up to `WINDOW_BYTES` from a position."""
        request = run_service_pb2.StreamOutputRequest(
            run_id=self._run_id, channel=self._channel, offset=start
        )
        data, attempt, truncated = b"", 0, False
        async with aclosing(self._contract.stream_output(request)) as pieces:
            async for piece in pieces:
                data += piece.data
                attempt, truncated = piece.attempt, piece.truncated
                if len(data) > WINDOW_BYTES:
                    break
        has_more = len(data) > WINDOW_BYTES
        return _Part(data[:WINDOW_BYTES], start, attempt, truncated, has_more)

    async def last_part(self) -> _Part:
        """Return the end of the output. Search for its position, which no call returns."""
        part = await self.part(0)
        if not part.has_more:
            return part
        low, high = WINDOW_BYTES, WINDOW_BYTES * 2
        while await self._reaches(high):
            low, high = high, high * 2
        while high - low > WINDOW_BYTES // 2:
            middle = (low + high) // 2
            low, high = (middle, high) if await self._reaches(middle) else (low, middle)
        return await self.part(max(0, high - WINDOW_BYTES))

    async def _reaches(self, offset: int) -> bool:
        """Return whether there is output after a position."""
        request = run_service_pb2.StreamOutputRequest(
            run_id=self._run_id, channel=self._channel, offset=offset
        )
        try:
            async with aclosing(self._contract.stream_output(request)) as pieces:
                async for piece in pieces:
                    if piece.data:
                        return True
        except CallFailed as error:
            if error.code is not grpc.StatusCode.OUT_OF_RANGE:
                raise
        return False


async def follow_output(
    contract: Contract, run_id: str, channel: str, *, attempt: int, start: int
) -> AsyncGenerator[tuple[Markup, int], None]:
    """Yield output after `start` as HTML, line by line, each line with the position after it.

    The generator ends when the run has ended or a later attempt has begun.
    """
    request = run_service_pb2.StreamOutputRequest(
        run_id=run_id, channel=CHANNELS[channel], attempt=attempt, offset=start, follow=True
    )
    kept, end = b"", start
    async with aclosing(contract.stream_output(request)) as pieces:
        async for piece in pieces:
            kept += piece.data
            cut = len(kept) if len(kept) > MAX_PARTIAL_BYTES else kept.rfind(b"\n") + 1
            if cut:
                end += cut
                yield shown(kept[:cut].decode("utf-8", "replace")), end
                kept = kept[cut:]
    if kept:
        yield shown(kept.decode("utf-8", "replace")), end + len(kept)
