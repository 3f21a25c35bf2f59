"""The client for asyncio. `runrecovery.client` has the same methods and describes them in full."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping, Sequence
from contextlib import aclosing
from datetime import datetime
from os import PathLike
from types import TracebackType
from typing import Self, TypeVar

import grpc
import grpc.aio

from runrecovery import _requests as requests
from runrecovery import _streams as streams
from runrecovery import _waiting as waiting
from runrecovery._channel import (
    DEFAULT_MAX_RECEIVE_BYTES,
    DEFAULT_PAGE_SIZE,
    DEFAULT_TIMEOUT_S,
    ChannelOption,
    Tls,
    channel_options,
    required_target,
    secured,
)
from runrecovery._failures import from_rpc_error
from runrecovery._requests import Call, Listing, Page, Plan, ServingStatus
from runrecovery._token import BearerToken, demand_encrypted
from runrecovery._values import JsonValue
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2, run_service_pb2

ResultT = TypeVar("ResultT")
RowT = TypeVar("RowT")


class _AsyncWire:
    """Performs calls on a channel and raises the client's own errors."""

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


class AsyncRuns:
    """RunService; see `runrecovery.client.Runs`."""

    def __init__(self, wire: _AsyncWire) -> None:
        self._wire = wire

    async def create(
        self,
        *,
        engine: str,
        input: Mapping[str, JsonValue] | None = None,  # noqa: A002 - the contract's name
        run_id: str | None = None,
        labels: Mapping[str, str] | None = None,
        restart_policy: run_pb2.RestartPolicy.ValueType = run_pb2.RESTART_POLICY_UNSPECIFIED,
        interactive_profile: run_pb2.InteractiveProfileKind.ValueType = (
            run_pb2.INTERACTIVE_PROFILE_KIND_UNSPECIFIED
        ),
        session_timeout_s: float | None = None,
        require_user_reply: bool | None = None,
        max_tokens: int | None = None,
        max_cost_usd: float | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> run_pb2.Run:
        """Record and queue a run. The run is durable when this returns."""
        call = requests.create_run(
            engine=engine,
            input=input,
            run_id=run_id,
            labels=labels,
            restart_policy=restart_policy,
            interactive_profile=interactive_profile,
            session_timeout_s=session_timeout_s,
            require_user_reply=require_user_reply,
            max_tokens=max_tokens,
            max_cost_usd=max_cost_usd,
            request_id=request_id,
        )
        return await self._wire.unary(call, timeout_s=timeout_s)

    async def get(self, run_id: str, *, timeout_s: float | None = None) -> run_pb2.Run:
        """Return one run with its recovery fields; raise RunNotFound if there is none."""
        return await self._wire.unary(requests.get_run(run_id), timeout_s=timeout_s)

    def list(
        self,
        *,
        statuses: Iterable[run_pb2.RunStatus.ValueType] = (),
        engine: str | None = None,
        labels: Mapping[str, str] | None = None,
        created_after: datetime | None = None,
        created_before: datetime | None = None,
        view: run_pb2.RunView.ValueType = run_pb2.RUN_VIEW_UNSPECIFIED,
        page_size: int = DEFAULT_PAGE_SIZE,
        timeout_s: float | None = None,
    ) -> AsyncIterator[run_pb2.Run]:
        """Iterate over all runs that match, newest first; pages are fetched as needed."""
        listing = requests.list_runs(
            statuses=statuses,
            engine=engine,
            labels=labels,
            created_after=created_after,
            created_before=created_before,
            view=view,
            page_size=page_size,
        )
        return self._wire.rows(listing, timeout_s=timeout_s)

    def watch(
        self,
        run_id: str,
        *,
        after_sequence: int | None = None,
        include_bookmarks: bool = False,
        reconnect_s: float | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[run_service_pb2.WatchRunResponse, None]:
        """Iterate over the events of a run: a snapshot, then every event once and in order.

        The watch resumes by itself, see `runrecovery.client.Runs.watch`. If you leave the loop
        early, wrap the iterator in `contextlib.aclosing` to end the stream at once.
        """
        watch = streams.RunWatch(
            run_id,
            streams.Reconnection(reconnect_s=reconnect_s, timeout_s=timeout_s),
            after_sequence=after_sequence,
            include_bookmarks=include_bookmarks,
        )
        return self._wire.resumed(watch)

    async def reply(
        self,
        run_id: str,
        interaction_id: int,
        response: JsonValue,
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> run_pb2.Run:
        """Answer the open question of a waiting run. Repeating the same answer changes nothing."""
        call = requests.submit_reply(
            run_id, interaction_id, response, etag=etag, request_id=request_id
        )
        return await self._wire.unary(call, timeout_s=timeout_s)

    async def cancel(
        self,
        run_id: str,
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> run_pb2.Run:
        """Cancel a run. A live process is ended first: see `cancel_requested`."""
        call = requests.cancel_run(run_id, etag=etag, request_id=request_id)
        return await self._wire.unary(call, timeout_s=timeout_s)

    async def reopen(
        self,
        run_id: str,
        *,
        session_handle: str | None = None,
        etag: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> run_pb2.Run:
        """Reopen a run that a recovery failed because its session was lost."""
        call = requests.reopen_run(
            run_id, session_handle=session_handle, etag=etag, request_id=request_id
        )
        return await self._wire.unary(call, timeout_s=timeout_s)

    def interactions(
        self, run_id: str, *, page_size: int = DEFAULT_PAGE_SIZE, timeout_s: float | None = None
    ) -> AsyncIterator[run_pb2.Interaction]:
        """Iterate over the questions and answers of a run, oldest first; raise RunNotFound."""
        listing = requests.list_interactions(run_id, page_size=page_size)
        return self._wire.rows(listing, timeout_s=timeout_s)

    def output(
        self,
        run_id: str,
        *,
        attempt: int = 0,
        channel: run_service_pb2.OutputChannel.ValueType = (
            run_service_pb2.OUTPUT_CHANNEL_UNSPECIFIED
        ),
        offset: int = 0,
        follow: bool = False,
        reconnect_s: float = 60.0,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[run_service_pb2.StreamOutputResponse, None]:
        """Iterate over the output of one attempt, without gap or repetition.

        If you leave the loop early, wrap the iterator in `contextlib.aclosing` to end the stream
        at once.
        """
        asked = run_service_pb2.StreamOutputRequest(
            run_id=run_id, attempt=attempt, channel=channel, offset=offset, follow=follow
        )
        reader = streams.OutputReader(
            asked,
            streams.Reconnection(reconnect_s=reconnect_s, timeout_s=timeout_s),
            reconnect_s=reconnect_s,
        )
        return self._wire.resumed(reader)


class AsyncRecovery:
    """RecoveryService; see `runrecovery.client.Recovery`."""

    def __init__(self, wire: _AsyncWire) -> None:
        self._wire = wire

    async def info(
        self, run_id: str, *, timeout_s: float | None = None
    ) -> recovery_service_pb2.GetRecoveryInfoResponse:
        """Return the latest decision about a run and all earlier ones; raise RunNotFound."""
        return await self._wire.unary(requests.get_recovery_info(run_id), timeout_s=timeout_s)

    def recovered(
        self,
        *,
        recovery_states: Iterable[run_pb2.RecoveryState.ValueType] = (),
        recovery_reason: str | None = None,
        engine: str | None = None,
        labels: Mapping[str, str] | None = None,
        recovered_after: datetime | None = None,
        recovered_before: datetime | None = None,
        reconciliation_id: str | None = None,
        view: run_pb2.RunView.ValueType = run_pb2.RUN_VIEW_UNSPECIFIED,
        page_size: int = DEFAULT_PAGE_SIZE,
        timeout_s: float | None = None,
    ) -> AsyncIterator[run_pb2.Run]:
        """Iterate over all runs that a restart decided about, newest decision first."""
        chosen = requests.recovered_filter(
            recovery_states=recovery_states,
            recovery_reason=recovery_reason,
            engine=engine,
            labels=labels,
            recovered_after=recovered_after,
            recovered_before=recovered_before,
            reconciliation_id=reconciliation_id,
        )
        listing = requests.list_recovered(chosen, view=view, page_size=page_size)
        return self._wire.rows(listing, timeout_s=timeout_s)

    def watch_recovered(
        self,
        *,
        recovery_states: Iterable[run_pb2.RecoveryState.ValueType] = (),
        recovery_reason: str | None = None,
        engine: str | None = None,
        labels: Mapping[str, str] | None = None,
        recovered_after: datetime | None = None,
        recovered_before: datetime | None = None,
        reconciliation_id: str | None = None,
        after_cursor: str = "",
        include_bookmarks: bool = False,
        reconnect_s: float | None = None,
        timeout_s: float | None = None,
    ) -> AsyncGenerator[recovery_service_pb2.WatchRecoveredResponse, None]:
        """Iterate over decisions as they are committed; resumes as `runs.watch` does."""
        chosen = requests.recovered_filter(
            recovery_states=recovery_states,
            recovery_reason=recovery_reason,
            engine=engine,
            labels=labels,
            recovered_after=recovered_after,
            recovered_before=recovered_before,
            reconciliation_id=reconciliation_id,
        )
        watch = streams.RecoveredWatch(
            chosen,
            streams.Reconnection(reconnect_s=reconnect_s, timeout_s=timeout_s),
            after_cursor=after_cursor,
            include_bookmarks=include_bookmarks,
        )
        return self._wire.resumed(watch)

    async def explain(
        self, run_id: str, *, timeout_s: float | None = None
    ) -> recovery_service_pb2.ExplainRecoveryResponse:
        """Return the decisions about a run with facts, sources, and what was done to processes.

        Newest first, at most the latest 100. Raise RunNotFound if there is no such run.
        """
        return await self._wire.unary(requests.explain_recovery(run_id), timeout_s=timeout_s)

    async def plan(
        self, *, page_size: int = DEFAULT_PAGE_SIZE, timeout_s: float | None = None
    ) -> Plan[AsyncIterator[recovery_service_pb2.PlannedDecision]]:
        """Return what a restart of this instance would decide now. Changes nothing."""
        listing = requests.plan_recovery(page_size=page_size)
        first = await self._wire.unary(listing(""), timeout_s=timeout_s)
        decisions = self._wire.rows(listing, first=first, timeout_s=timeout_s)
        return Plan(first.totals, decisions)

    async def status(
        self, *, timeout_s: float | None = None
    ) -> recovery_service_pb2.GetRecoveryStatusResponse:
        """Return the state of the service; works during a recovery as well."""
        return await self._wire.unary(requests.get_recovery_status(), timeout_s=timeout_s)

    def reconciliations(
        self, *, page_size: int = DEFAULT_PAGE_SIZE, timeout_s: float | None = None
    ) -> AsyncIterator[recovery_pb2.Reconciliation]:
        """Iterate over all reports, newest first; works during a recovery as well."""
        listing = requests.list_reconciliations(page_size=page_size)
        return self._wire.rows(listing, timeout_s=timeout_s)

    async def reconciliation(
        self, reconciliation_id: str, *, timeout_s: float | None = None
    ) -> recovery_pb2.Reconciliation:
        """Return one report; raise ReconciliationNotFound if there is none."""
        call = requests.get_reconciliation(reconciliation_id)
        return await self._wire.unary(call, timeout_s=timeout_s)


class AsyncHealth:
    """grpc.health.v1; see `runrecovery.client.Health`."""

    def __init__(self, wire: _AsyncWire) -> None:
        self._wire = wire

    async def check(self, service: str = "", *, timeout_s: float | None = None) -> ServingStatus:
        """Check once, without retries and without waiting for a server."""
        return await self._wire.unary(requests.check_health(service), timeout_s=timeout_s)


class AsyncRunRecoveryClient:
    """A connection to the service for one event loop. Create it inside that loop and reuse it.

    The arguments are those of `RunRecoveryClient`; `channel` is one of `grpc.aio`.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        channel: grpc.aio.Channel | None = None,
        tls: Tls | bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        token_file: str | PathLike[str] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_receive_bytes: int = DEFAULT_MAX_RECEIVE_BYTES,
        options: Sequence[ChannelOption] = (),
    ) -> None:
        asyncio.get_running_loop()  # grpc would take any loop, and hang on the wrong one
        if channel is not None and target is not None:
            raise TypeError("give a target or a channel, not both")
        bearer = BearerToken(token=token, file=token_file)
        settings = channel_options(
            target=target, max_receive_bytes=max_receive_bytes, options=options
        )
        self._owns_channel = channel is None
        if channel is None:
            credentials, settings = secured(settings, tls=tls, credentials=credentials)
            channel = _open(required_target(target), credentials, settings, bearer)
        self._channel = channel
        self._timeout_s = timeout_s
        wire = _AsyncWire(self._channel, timeout_s=timeout_s, token=bearer)
        self.runs = AsyncRuns(wire)
        self.recovery = AsyncRecovery(wire)
        self.health = AsyncHealth(wire)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection; open calls fail. Your own channel stays open."""
        if self._owns_channel:
            await self._channel.close()

    async def wait_until_ready(self, timeout_s: float | None = 60.0, *, service: str = "") -> None:
        """Return once the service is SERVING; raise DeadlineExceeded after `timeout_s`."""
        wait = waiting.wait_until_serving(service, timeout_s=timeout_s)
        while True:
            with wait.attempt():
                limit_s = wait.attempt_timeout_s(self._timeout_s)
                if wait.is_over(await self.health.check(service, timeout_s=limit_s)):
                    return
            await asyncio.sleep(wait.pause_s())

    async def wait_for_run(
        self, run_id: str, *, timeout_s: float | None, or_waiting: bool = False
    ) -> run_pb2.Run:
        """Return a run once it has ended, across restarts of the service."""
        wait = waiting.wait_for_run(run_id, timeout_s=timeout_s, or_waiting=or_waiting)
        while True:
            with wait.attempt():
                limit_s = wait.attempt_timeout_s(self._timeout_s)
                run = await self.runs.get(run_id, timeout_s=limit_s)
                if wait.is_over(run):
                    return run
            await asyncio.sleep(wait.pause_s())


def _open(
    target: str,
    credentials: grpc.ChannelCredentials | None,
    options: Sequence[ChannelOption],
    token: BearerToken,
) -> grpc.aio.Channel:
    if credentials is None:
        demand_encrypted(token, target)
        return grpc.aio.insecure_channel(target, options=options)
    return grpc.aio.secure_channel(target, credentials, options=options)
