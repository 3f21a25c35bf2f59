"""Streams the stored output of one attempt, and follows it while the attempt runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

from runrecovery.v1 import run_service_pb2 as pb

from runrecovery_service.agents.output import OutputChannel, OutputFiles
from runrecovery_service.domain.errors import (
    OutputOutOfRange,
    OutputRemoved,
    RunOfAnotherInstance,
    ShuttingDown,
)
from runrecovery_service.domain.run import Run
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc import validation
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.visibility import demand_visible
from runrecovery_service.storage import retention, runs
from runrecovery_service.storage.async_storage import Storage

PIECE_BYTES: Final = 65_536
FOLLOW_POLL_S: Final = 0.2
"""How often the service checks for more output while an attempt runs."""

_CHANNELS: Final = {
    pb.OUTPUT_CHANNEL_UNSPECIFIED: OutputChannel.STDOUT,
    pb.OUTPUT_CHANNEL_STDOUT: OutputChannel.STDOUT,
    pb.OUTPUT_CHANNEL_STDERR: OutputChannel.STDERR,
}


@dataclass(slots=True, kw_only=True)
class _Cursor:
    """The position of one reader in the output of one attempt."""

    run_key: int
    attempt: int
    channel: OutputChannel
    offset: int
    at_limit: bool = False
    """True at the end of what is stored; nothing will follow."""


class OutputReader:
    """Reads the output of one attempt to its present end, or follows it."""

    def __init__(self, storage: Storage, output: OutputFiles, gate: Gate, *, instance: str) -> None:
        self._storage = storage
        self._instance = instance
        self._output = output
        self._gate = gate

    async def stream(
        self, request: pb.StreamOutputRequest
    ) -> AsyncGenerator[pb.StreamOutputResponse, None]:
        """Yield the output in pieces.

        Raises:
            InvalidFields, RunNotFound, OutputOutOfRange, OutputRemoved: see their docs.
            RunOfAnotherInstance: another instance has the files.
            ShuttingDown: only when following; the caller can resume by its offset.
        """
        validation.require_valid(validation.stream_output(request))
        await demand_visible(self._storage, request.run_id)
        cursor: _Cursor | None = None
        while True:
            change = self._gate.change
            # Read before the output: if the run has ended, all of its output is there.
            run = await self._storage.read_row(runs.get, request.run_id)
            if cursor is None or not cursor.attempt:
                cursor = _cursor(run, request)
                await self._demand_kept(run)
                await self._demand_here(run, cursor)
                await self._check_offset(run, cursor, follow=request.follow)
            following = request.follow and _may_write_more(run, cursor)
            async for piece in self._read_pieces(cursor):
                yield piece
            await self._demand_kept(run)  # otherwise the caller would not notice missing pieces
            if not following or cursor.at_limit:
                return
            if self._gate.ends_streams:
                raise ShuttingDown
            await self._gate.wait(change, timeout_s=FOLLOW_POLL_S)

    async def _read_pieces(self, cursor: _Cursor) -> AsyncGenerator[pb.StreamOutputResponse, None]:
        """Yield the output from the cursor to the present end, and move the cursor."""
        while not cursor.at_limit:
            try:
                piece = await asyncio.to_thread(
                    self._output.read,
                    cursor.run_key,
                    cursor.attempt,
                    cursor.channel,
                    cursor.offset,
                    PIECE_BYTES,
                )
            except FileNotFoundError:
                return
            cursor.at_limit = piece.truncated
            if not piece.data and not piece.truncated:
                return
            yield pb.StreamOutputResponse(
                attempt=cursor.attempt,
                offset=cursor.offset,
                data=piece.data,
                truncated=piece.truncated,
            )
            cursor.offset += len(piece.data)

    async def _demand_kept(self, run: Run) -> None:
        """Raise OutputRemoved if the output of the run was removed."""
        if _has_ended(run) and await self._storage.read_row(retention.is_output_removed, run):
            raise OutputRemoved(run.run_id)

    async def _demand_here(self, run: Run, cursor: _Cursor) -> None:
        """Raise RunOfAnotherInstance if the folder of the attempt is at another instance."""
        if not self._storage.is_shared or run.owner == self._instance or not cursor.attempt:
            return
        if not await asyncio.to_thread(self._output.has_attempt, cursor.run_key, cursor.attempt):
            raise RunOfAnotherInstance(run.run_id, run.owner)

    async def _check_offset(self, run: Run, cursor: _Cursor, *, follow: bool) -> None:
        """Raise OutputOutOfRange for an offset that the output will never reach."""
        if not cursor.offset or (follow and _may_write_more(run, cursor)):
            return
        size = await asyncio.to_thread(
            self._output.size, cursor.run_key, cursor.attempt, cursor.channel
        )
        if cursor.offset > size:
            raise OutputOutOfRange(
                run.run_id, f"offset {cursor.offset} is beyond the end at {size}"
            )


def _cursor(run: Run, request: pb.StreamOutputRequest) -> _Cursor:
    if request.attempt > run.attempt:
        raise OutputOutOfRange(
            run.run_id, f"there is no attempt {request.attempt}; the latest is {run.attempt}"
        )
    return _Cursor(
        run_key=run.key,
        attempt=request.attempt or run.attempt,
        channel=_CHANNELS[request.channel],
        offset=request.offset,
    )


def _may_write_more(run: Run, cursor: _Cursor) -> bool:
    """True while the attempt can still write output."""
    return not _has_ended(run) and cursor.attempt == run.attempt


def _has_ended(run: Run) -> bool:
    return run.status is None or run.status.is_terminal or run.quarantined
