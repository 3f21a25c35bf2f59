"""RunService: runs are created, read, answered, canceled, and their output streamed."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncGenerator, Coroutine
from dataclasses import dataclass
from datetime import datetime
from typing import Final, TypeVar

from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb

from runrecovery_service.agents.output import OutputChannel, OutputFiles
from runrecovery_service.agents.session_checks import SESSION_TIMEOUT_S, check_session
from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.clock import Clock
from runrecovery_service.domain.errors import OutputOutOfRange, SessionNotResumable, ShuttingDown
from runrecovery_service.domain.recovery_matrix import REOPENABLE
from runrecovery_service.domain.run import NewRun, Run, RunFilter, RunStatus
from runrecovery_service.domain.session_check import REASON_TEXTS, StoredHandle
from runrecovery_service.engines.catalog import Catalog, Engine
from runrecovery_service.rpc import enums, json_values, paging, run_messages, times, validation
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.uuid7 import RANDOM_BYTES, uuid7
from runrecovery_service.rpc.watch_streams import RunWatcher
from runrecovery_service.storage import interactions, reopening, requests, runs
from runrecovery_service.storage.adapter import Storage
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.reopening import Candidate
from runrecovery_service.storage.requests import Receipt

PIECE_BYTES: Final = 65_536
POLL_S: Final = 0.2
"""How often a follower looks for more output."""

_CHANNELS: Final = {
    pb.OUTPUT_CHANNEL_UNSPECIFIED: OutputChannel.STDOUT,
    pb.OUTPUT_CHANNEL_STDOUT: OutputChannel.STDOUT,
    pb.OUTPUT_CHANNEL_STDERR: OutputChannel.STDERR,
}

MutationT = TypeVar(
    "MutationT",
    pb.CreateRunRequest,
    pb.SubmitReplyRequest,
    pb.CancelRunRequest,
    pb.ReopenRunRequest,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLimits:
    """What CreateRun is bound by: runs that may wait, and starts that a run may have."""

    max_queued: int
    max_attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDeps:
    """What RunService works with."""

    storage: Storage
    owner: Owner
    catalog: Catalog
    workspaces: Workspaces
    output: OutputFiles
    limits: RunLimits
    clock: Clock


class RunService:
    """The methods of runrecovery.v1.RunService; `server.py` finds them by name."""

    def __init__(self, deps: RunDeps, gate: Gate) -> None:
        self._deps = deps
        self._storage = deps.storage
        self._gate = gate
        self._watcher = RunWatcher(deps.storage, gate)
        self._committing: set[asyncio.Task[Run]] = set()

    async def create_run(self, request: pb.CreateRunRequest) -> pb.CreateRunResponse:
        """Record a run and queue it."""
        self._gate.demand_launches()
        validation.demand_valid(validation.create_run(request))
        engine = self._deps.catalog.get(request.engine)
        validation.demand_valid(validation.profile(request.interactive_profile, engine))
        now = self._deps.clock.now()
        write = self._storage.write(
            runs.create,
            self._new_run(request, engine, now),
            owner=self._deps.owner,
            max_queued=self._deps.limits.max_queued,
            receipt=receipt(request),
            now=now,
        )
        response = pb.CreateRunResponse()
        run_messages.fill_run(response.run, await self._commit(write))
        return response

    async def get_run(self, request: pb.GetRunRequest) -> pb.GetRunResponse:
        """Return one run."""
        validation.demand_run_id(request.run_id)
        run = await self._storage.point(runs.get, request.run_id)
        response = pb.GetRunResponse()
        run_messages.fill_run(response.run, run)
        return response

    async def list_runs(self, request: pb.ListRunsRequest) -> pb.ListRunsResponse:
        """Return a page of runs, newest first."""
        validation.demand_valid(validation.list_runs(request))
        scope = paging.scope(request, width=1)
        page = await self._storage.read(
            runs.page,
            _wanted(request.filter),
            after=paging.decode(scope, request.page_token),
            limit=paging.page_size(request.page_size),
            view=enums.VIEW_FROM_PROTO[request.view],
        )
        response = pb.ListRunsResponse(next_page_token=paging.encode(scope, page.after))
        for run in page.rows:
            run_messages.fill_run(response.runs.add(), run)
        return response

    async def submit_reply(self, request: pb.SubmitReplyRequest) -> pb.SubmitReplyResponse:
        """Accept the answer to a question."""
        validation.demand_valid(validation.submit_reply(request))
        write = self._storage.write(
            interactions.reply,
            request.run_id,
            request.interaction_id,
            json_values.read_value(request.response),
            owner=self._deps.owner,
            etag=request.etag or None,
            receipt=receipt(request),
            now=self._deps.clock.now(),
        )
        response = pb.SubmitReplyResponse()
        run_messages.fill_run(response.run, await self._commit(write))
        return response

    async def cancel_run(self, request: pb.CancelRunRequest) -> pb.CancelRunResponse:
        """Accept a cancel."""
        validation.demand_valid(validation.cancel_run(request))
        write = self._storage.write(
            runs.cancel,
            request.run_id,
            owner=self._deps.owner,
            etag=request.etag or None,
            receipt=receipt(request),
            now=self._deps.clock.now(),
        )
        response = pb.CancelRunResponse()
        run_messages.fill_run(response.run, await self._commit(write))
        return response

    def watch_run(self, request: pb.WatchRunRequest) -> AsyncGenerator[pb.WatchRunResponse, None]:
        """Stream what happens to a run."""
        return self._watcher.stream(request)

    async def reopen_run(self, request: pb.ReopenRunRequest) -> pb.ReopenRunResponse:
        """Set a run back that a recovery failed for want of its session."""
        validation.demand_valid(validation.reopen_run(request))
        handle = request.session_handle or None
        if await self._storage.point(requests.find, receipt(request)) is None:
            found = await self._storage.point(reopening.candidate, request.run_id)
            await self._demand_session(found, handle)
        write = self._storage.write(
            reopening.reopen,
            request.run_id,
            handle=handle,
            session_type=self._deps.catalog.session_type,
            owner=self._deps.owner,
            etag=request.etag or None,
            receipt=receipt(request),
            due_in=self._deps.clock.due_in,
            steady=self._deps.clock.steady(),
            now=self._deps.clock.now(),
        )
        response = pb.ReopenRunResponse()
        run_messages.fill_run(response.run, await self._commit(write))
        return response

    async def _demand_session(self, found: Candidate, supplied: str | None) -> None:
        """Refuse a handle that a restart would refuse again, and one of the caller's that is found
        lost, with a mark or without. A run that is not to be set back at all is left to the write,
        which knows why."""
        run, handle = found.run, supplied or found.handle
        rule = None if run.recovery is None else run.recovery.recovery_reason
        if run.status is not RunStatus.FAILED or rule not in REOPENABLE or handle is None:
            return
        if run.engine not in self._deps.catalog.names:
            return  # as in a restart: nobody can tell
        engine = self._deps.catalog.get(run.engine)
        workspace = self._deps.workspaces.workspace(run.key, run.attempt)
        mark = found.mark if handle == found.handle else None
        stored = StoredHandle(handle=handle, workspace=workspace, fingerprint=mark)
        finding = await check_session(
            engine, stored, timeout_s=SESSION_TIMEOUT_S, seen_before=supplied is None
        )
        if finding is not None and not finding.holds:
            why = "its session is lost" if finding.reason is None else REASON_TEXTS[finding.reason]
            raise SessionNotResumable(run.run_id, why)

    async def list_interactions(
        self, request: pb.ListInteractionsRequest
    ) -> pb.ListInteractionsResponse:
        """Return a page of a run's questions, oldest first."""
        validation.demand_valid(validation.list_interactions(request))
        scope = paging.scope(request, width=1)
        page = await self._storage.read(
            interactions.page,
            request.run_id,
            after=paging.decode(scope, request.page_token),
            limit=paging.page_size(request.page_size),
        )
        response = pb.ListInteractionsResponse(next_page_token=paging.encode(scope, page.after))
        for question in page.rows:
            run_messages.fill_interaction(response.interactions.add(), question)
        return response

    def stream_output(
        self, request: pb.StreamOutputRequest
    ) -> AsyncGenerator[pb.StreamOutputResponse, None]:
        """Stream what the processes of one attempt wrote."""
        return OutputReader(self._storage, self._deps.output, self._gate).stream(request)

    def _new_run(self, request: pb.CreateRunRequest, engine: Engine, now: datetime) -> NewRun:
        wish = request.interactive_profile
        return NewRun(
            run_id=request.run_id or str(uuid7(now, secrets.token_bytes(RANDOM_BYTES))),
            engine=engine.name,
            labels=dict(request.labels),
            profile=engine.profile,
            restart_policy=enums.RESTART_POLICY_FROM_PROTO[request.restart_policy],
            max_attempts=self._deps.limits.max_attempts,
            session_timeout_s=times.read_duration_s(wish.session_timeout)
            if wish.HasField("session_timeout")
            else engine.session_timeout_s,
            require_user_reply=wish.require_user_reply
            if wish.HasField("require_user_reply")
            else engine.require_user_reply,
            max_run_s=engine.max_run_time_s,
            input=json_values.read_struct(request.input),
        )

    async def _commit(self, write: Coroutine[object, object, Run]) -> Run:
        """Write, also when the caller hangs up in between."""
        task = asyncio.create_task(write)
        self._committing.add(task)
        task.add_done_callback(self._committed)
        return await asyncio.shield(task)

    def _committed(self, task: asyncio.Task[Run]) -> None:
        self._committing.discard(task)
        if not task.cancelled():
            task.exception()  # the caller has it, unless it hung up; then nobody wants it


def _wanted(asked: pb.RunFilter) -> RunFilter:
    any_status = run_pb2.RUN_STATUS_UNSPECIFIED in asked.statuses
    return RunFilter(
        statuses=frozenset(
            () if any_status else (enums.STATUS_FROM_PROTO[number] for number in asked.statuses)
        ),
        engine=asked.engine or None,
        labels=dict(asked.labels),
        after=times.read_optional_time(asked, "created_after"),
        before=times.read_optional_time(asked, "created_before"),
    )


def receipt(request: MutationT) -> Receipt | None:
    """Return what makes a repeated request have its effect once; None without a request_id."""
    if not request.request_id:
        return None
    payload = type(request)()
    payload.CopyFrom(request)
    payload.ClearField("request_id")
    return Receipt(
        request_id=request.request_id.lower(),
        method=request.DESCRIPTOR.name.removesuffix("Request"),
        fingerprint=hashlib.sha256(payload.SerializeToString(deterministic=True)).digest(),
    )


@dataclass(slots=True, kw_only=True)
class _Cursor:
    """Where a reader of output stands."""

    run_key: int
    attempt: int
    channel: OutputChannel
    offset: int
    at_limit: bool = False
    """True when the end of what is kept was reached: nothing will follow."""


class OutputReader:
    """Reads the output of one attempt to its end, or follows it."""

    def __init__(self, storage: Storage, output: OutputFiles, gate: Gate) -> None:
        self._storage = storage
        self._output = output
        self._gate = gate

    async def stream(
        self, request: pb.StreamOutputRequest
    ) -> AsyncGenerator[pb.StreamOutputResponse, None]:
        """Yield the output in pieces.

        Raises:
            InvalidFields, RunNotFound, OutputOutOfRange: nothing of it can be read.
            ShuttingDown: a follower has to go; it can resume elsewhere by its offset.
        """
        validation.demand_valid(validation.stream_output(request))
        cursor: _Cursor | None = None
        while True:
            change = self._gate.change
            # The look at the run comes before the read: what was written until its end is read.
            run = await self._storage.point(runs.get, request.run_id)
            if cursor is None or not cursor.attempt:
                cursor = _cursor(run, request)
                await self._demand_offset(run, cursor, follow=request.follow)
            live = request.follow and _goes_on(run, cursor)
            async for piece in self._pieces(cursor):
                yield piece
            if not live or cursor.at_limit:
                return
            if self._gate.draining:
                raise ShuttingDown
            await self._gate.wait(change, timeout_s=POLL_S)

    async def _pieces(self, cursor: _Cursor) -> AsyncGenerator[pb.StreamOutputResponse, None]:
        """Yield what there is from the cursor on, and move it."""
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

    async def _demand_offset(self, run: Run, cursor: _Cursor, *, follow: bool) -> None:
        """Refuse an offset that the output does not reach and never will."""
        if not cursor.offset or (follow and _goes_on(run, cursor)):
            return
        size = await asyncio.to_thread(
            self._output.size, cursor.run_key, cursor.attempt, cursor.channel
        )
        if cursor.offset > size:
            raise OutputOutOfRange(run.run_id, f"offset {cursor.offset} is behind its end, {size}")


def _cursor(run: Run, request: pb.StreamOutputRequest) -> _Cursor:
    if request.attempt > run.attempt:
        raise OutputOutOfRange(
            run.run_id, f"attempt {request.attempt} was never made, the latest is {run.attempt}"
        )
    return _Cursor(
        run_key=run.key,
        attempt=request.attempt or run.attempt,
        channel=_CHANNELS[request.channel],
        offset=request.offset,
    )


def _goes_on(run: Run, cursor: _Cursor) -> bool:
    """True while the attempt may still write."""
    over = run.status is None or run.status.is_terminal or run.quarantined
    return not over and cursor.attempt == run.attempt
