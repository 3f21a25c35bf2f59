"""RunService: creates, reads and cancels runs, answers their questions, and streams."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncGenerator
from datetime import datetime
from functools import partial
from typing import TypeVar

import structlog
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb

from runrecovery_service.agents.output import OutputFiles
from runrecovery_service.agents.session_checks import SESSION_TIMEOUT_S, check_session
from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.clock import Clock
from runrecovery_service.domain.errors import SessionNotResumable
from runrecovery_service.domain.recovery_matrix import REOPENABLE
from runrecovery_service.domain.run import NewRun, RestartPolicy, Run, RunFilter, RunStatus
from runrecovery_service.domain.session_check import REASON_TEXTS, StoredHandle
from runrecovery_service.domain.usage import Budget, cost_to_nanos
from runrecovery_service.engines.catalog import Catalog, Engine
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc import enums, json_values, paging, run_messages, times, validation
from runrecovery_service.rpc.callers import CALLER, caller_name
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.output_reader import OutputReader
from runrecovery_service.rpc.paging import PageTokens
from runrecovery_service.rpc.trace_context import TRACEPARENT
from runrecovery_service.rpc.uuid7 import RANDOM_BYTES, uuid7
from runrecovery_service.rpc.visibility import demand_visible, visible_engines
from runrecovery_service.rpc.watch_streams import RunWatcher
from runrecovery_service.storage import interactions, reopening, requests, run_pages, runs
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.reopening import ReopenCandidate
from runrecovery_service.storage.requests import Receipt

log = structlog.get_logger()

MutationT = TypeVar(
    "MutationT",
    pb.CreateRunRequest,
    pb.SubmitReplyRequest,
    pb.CancelRunRequest,
    pb.ReopenRunRequest,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunLimits:
    """Limits of CreateRun: QUEUED runs at one time, and attempts of one run."""

    max_queued: int
    max_attempts: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunDeps:
    """The dependencies of RunService."""

    storage: Storage
    owner: Owner
    catalog: Catalog
    workspaces: Workspaces
    output: OutputFiles
    limits: RunLimits
    clock: Clock
    page_tokens: PageTokens


class RunService:
    """The methods of runrecovery.v1.RunService. `method_handlers.py` finds them by name."""

    def __init__(self, deps: RunDeps, gate: Gate) -> None:
        self._deps = deps
        self._storage = deps.storage
        self._gate = gate
        self._watcher = RunWatcher(deps.storage, gate)

    async def create_run(self, request: pb.CreateRunRequest) -> pb.CreateRunResponse:
        """Record a run and queue it."""
        self._gate.check_launches_allowed()
        validation.require_valid(validation.create_run(request))
        CALLER.get().demand_engine(request.engine)
        engine = self._deps.catalog.get(request.engine)
        validation.require_valid(validation.fits_engine(request, engine))
        now = self._deps.clock.now()
        write = self._storage.start_write(
            runs.create,
            self._new_run(request, engine, now),
            owner=self._deps.owner,
            max_queued=self._deps.limits.max_queued,
            receipt=make_receipt(request),
            now=now,
        )
        response = pb.CreateRunResponse()
        run_messages.fill_run(response.run, await self._commit("CreateRun", write))
        return response

    async def get_run(self, request: pb.GetRunRequest) -> pb.GetRunResponse:
        """Return one run."""
        validation.require_run_id(request.run_id)
        run = await self._storage.read_row(runs.get, request.run_id)
        CALLER.get().demand_visible(run.run_id, run.engine)
        response = pb.GetRunResponse()
        run_messages.fill_run(response.run, run)
        return response

    async def list_runs(self, request: pb.ListRunsRequest) -> pb.ListRunsResponse:
        """Return a page of runs in the order of their creation."""
        validation.require_valid(validation.list_runs(request))
        scope = paging.token_scope(request, width=1)
        page = await self._storage.read(
            run_pages.page,
            _to_domain_filter(request.filter),
            after=self._deps.page_tokens.decode(scope, request.page_token),
            limit=paging.page_size(request.page_size),
            view=enums.VIEW_FROM_PROTO[request.view],
            oldest_first=request.oldest_first,
        )
        response = pb.ListRunsResponse(
            next_page_token=self._deps.page_tokens.encode(scope, page.after)
        )
        for run in page.rows:
            run_messages.fill_run(response.runs.add(), run)
        return response

    async def submit_reply(self, request: pb.SubmitReplyRequest) -> pb.SubmitReplyResponse:
        """Record the answer to a question."""
        validation.require_valid(validation.submit_reply(request))
        await demand_visible(self._storage, request.run_id)
        write = self._storage.start_write(
            interactions.reply,
            request.run_id,
            request.interaction_id,
            json_values.read_value(request.response),
            owner=self._deps.owner,
            etag=request.etag or None,
            receipt=make_receipt(request),
            now=self._deps.clock.now(),
            caller=caller_name(),
        )
        response = pb.SubmitReplyResponse()
        run_messages.fill_run(response.run, await self._commit("SubmitReply", write))
        return response

    async def cancel_run(self, request: pb.CancelRunRequest) -> pb.CancelRunResponse:
        """Cancel a run, or record that it is to be canceled."""
        validation.require_valid(validation.cancel_run(request))
        await demand_visible(self._storage, request.run_id)
        write = self._storage.start_write(
            runs.cancel,
            request.run_id,
            owner=self._deps.owner,
            etag=request.etag or None,
            receipt=make_receipt(request),
            now=self._deps.clock.now(),
            caller=caller_name(),
        )
        response = pb.CancelRunResponse()
        run_messages.fill_run(response.run, await self._commit("CancelRun", write))
        return response

    def watch_run(
        self, request: pb.WatchRunRequest
    ) -> AsyncGenerator[pb.WatchRunResponse | bytes, None]:
        """Stream the events of a run."""
        return self._watcher.stream(request)

    async def reopen_run(self, request: pb.ReopenRunRequest) -> pb.ReopenRunResponse:
        """Reopen a run that a recovery failed because its session was lost."""
        validation.require_valid(validation.reopen_run(request))
        await demand_visible(self._storage, request.run_id)
        handle = request.session_handle or None
        if await self._storage.read_row(requests.find_effect, make_receipt(request)) is None:
            found = await self._storage.read_row(reopening.find_candidate, request.run_id)
            await self._check_session_usable(found, handle)
        write = self._storage.start_write(
            reopening.reopen,
            request.run_id,
            handle=handle,
            session_type_of=self._deps.catalog.session_type,
            wait_s_of=self._deps.catalog.wait_s,
            owner=self._deps.owner,
            etag=request.etag or None,
            receipt=make_receipt(request),
            due_in=self._deps.clock.due_in,
            steady=self._deps.clock.steady(),
            now=self._deps.clock.now(),
            caller=caller_name(),
        )
        response = pb.ReopenRunResponse()
        run_messages.fill_run(response.run, await self._commit("ReopenRun", write))
        return response

    async def _check_session_usable(self, found: ReopenCandidate, supplied: str | None) -> None:
        """Raise SessionNotResumable if the session check finds the session lost.

        A run that is not reopenable is not checked here: the write refuses it with the
        right reason. The session of another instance's run can be on another host: the run's next
        turn checks the session there.
        """
        run, handle = found.run, supplied or found.handle
        rule = None if run.recovery is None else run.recovery.recovery_reason
        if run.status is not RunStatus.FAILED or rule not in REOPENABLE or handle is None:
            return
        if self._storage.is_shared and run.owner != self._deps.owner.instance:
            return
        if run.engine not in self._deps.catalog.names:
            return  # without its engine the session cannot be checked, as in a restart
        engine = self._deps.catalog.get(run.engine)
        workspace = self._deps.workspaces.workspace(run.key, run.attempt)
        fingerprint = found.mark if handle == found.handle else None
        stored = StoredHandle(handle=handle, workspace=workspace, fingerprint=fingerprint)
        finding = await check_session(
            engine, stored, timeout_s=SESSION_TIMEOUT_S, seen_before=supplied is None
        )
        if finding is not None and not finding.holds:
            reason = (
                "its session is lost" if finding.reason is None else REASON_TEXTS[finding.reason]
            )
            raise SessionNotResumable(run.run_id, reason)

    async def list_interactions(
        self, request: pb.ListInteractionsRequest
    ) -> pb.ListInteractionsResponse:
        """Return a page of a run's questions, oldest first."""
        validation.require_valid(validation.list_interactions(request))
        await demand_visible(self._storage, request.run_id)
        scope = paging.token_scope(request, width=1)
        page = await self._storage.read(
            interactions.page,
            request.run_id,
            after=self._deps.page_tokens.decode(scope, request.page_token),
            limit=paging.page_size(request.page_size),
        )
        response = pb.ListInteractionsResponse(
            next_page_token=self._deps.page_tokens.encode(scope, page.after)
        )
        for question in page.rows:
            run_messages.fill_interaction(response.interactions.add(), question)
        return response

    def stream_output(
        self, request: pb.StreamOutputRequest
    ) -> AsyncGenerator[pb.StreamOutputResponse, None]:
        """Stream the output of the processes of one attempt."""
        reader = OutputReader(
            self._storage, self._deps.output, self._gate, instance=self._deps.owner.instance
        )
        return reader.stream(request)

    def _new_run(self, request: pb.CreateRunRequest, engine: Engine, now: datetime) -> NewRun:
        requested = request.interactive_profile
        policy = enums.RESTART_POLICY_FROM_PROTO.get(request.restart_policy, engine.restart_policy)
        return NewRun(
            run_id=request.run_id or str(uuid7(now, secrets.token_bytes(RANDOM_BYTES))),
            engine=engine.name,
            labels=dict(request.labels),
            profile=engine.profile,
            restart_policy=policy,
            max_attempts=self._deps.limits.max_attempts,
            max_resumes=engine.max_resumes if policy is RestartPolicy.RESUME else 0,
            session_timeout_s=times.read_duration_s(requested.session_timeout)
            if requested.HasField("session_timeout")
            else engine.session_timeout_s,
            require_user_reply=requested.require_user_reply
            if requested.HasField("require_user_reply")
            else engine.require_user_reply,
            max_run_s=engine.max_run_time_s,
            budget=engine.budget.narrowed(_budget(request)),
            input=json_values.read_struct(request.input),
            created_by=caller_name(),
            traceparent=TRACEPARENT.get(),
        )

    async def _commit(self, method: str, write: asyncio.Future[Run]) -> Run:
        """Finish the write, and log its caller, even if the caller cancels its call."""
        write.add_done_callback(partial(self._end_commit, method, caller_name()))
        return await asyncio.shield(write)

    def _end_commit(self, method: str, caller: str | None, write: asyncio.Future[Run]) -> None:
        # Asking for the error marks it as seen: the caller has it, unless the call was cancelled.
        if write.cancelled() or write.exception() is not None:
            return
        run = write.result()
        if caller is not None:
            log.info("audit.changed", caller=caller, method=method, run_id=run.run_id)
        notices = self._storage.notices
        if notices is not None and run.owner != self._deps.owner.instance:
            notices.announce(run.owner, run.key)


def _budget(request: pb.CreateRunRequest) -> Budget:
    has_cost = request.HasField("max_cost_usd")
    return Budget(
        max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
        max_cost_nanos=cost_to_nanos(request.max_cost_usd) if has_cost else None,
    )


def _to_domain_filter(asked: pb.RunFilter) -> RunFilter:
    any_status = run_pb2.RUN_STATUS_UNSPECIFIED in asked.statuses
    return RunFilter(
        engines=visible_engines(),
        statuses=frozenset(
            () if any_status else (enums.STATUS_FROM_PROTO[number] for number in asked.statuses)
        ),
        engine=asked.engine or None,
        labels=dict(asked.labels),
        after=times.read_optional_time(asked, "created_after"),
        before=times.read_optional_time(asked, "created_before"),
    )


def make_receipt(request: MutationT) -> Receipt | None:
    """Return the receipt by which a repeated request takes effect once; None without request_id."""
    if not request.request_id:
        return None
    payload = type(request)()
    payload.CopyFrom(request)
    payload.ClearField("request_id")
    return Receipt(
        request_id=request.request_id.lower(),
        caller=caller_name(),
        method=request.DESCRIPTOR.name.removesuffix("Request"),
        fingerprint=hashlib.sha256(payload.SerializeToString(deterministic=True)).digest(),
    )
