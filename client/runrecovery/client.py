"""The client for threads. `runrecovery.aio` is the same for asyncio."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from datetime import datetime
from os import PathLike
from types import TracebackType
from typing import Self, TypeVar

import grpc

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
from runrecovery._silence import SilenceTimeout
from runrecovery._token import BearerToken, demand_encrypted
from runrecovery._values import JsonValue
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2, run_service_pb2

ResultT = TypeVar("ResultT")
RowT = TypeVar("RowT")


class _Wire:
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


class Runs:
    """RunService. Every method raises a `RunRecoveryClientError` when the call fails.

    `timeout_s` is the deadline of one call in seconds; None means the client's own. Within it the
    client retries after a lost connection and after UNAVAILABLE.
    """

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def create(
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
        """Record and queue a run. The run is durable when this returns.

        Args:
            engine: a configured engine of the service.
            input: a JSON object for the engine.
            run_id: your own id, `[a-z0-9][a-z0-9_-]{0,63}`; None: the service makes one.
            labels: your own labels, at most 32.
            restart_policy: what a restart does with the run while it is QUEUED or RUNNING. Unset:
                the policy of the engine.
            interactive_profile: the engine's own profile, or unset.
            session_timeout_s: seconds that one question waits, at most the engine's own timeout.
            require_user_reply: False: a question without an answer in this time is decided
                automatically. None: the setting of the engine.
            max_tokens: tokens that the run may use, input and output together; at most the limit
                of the engine, which is the default. At the limit it fails with BUDGET_EXCEEDED.
            max_cost_usd: the same for the cost that the agent reports.
            request_id: a UUID that makes the call safe to repeat. None: the client makes one for
                the retries of this call only.

        Raises:
            UnknownEngine, RunAlreadyExists, RequestIdReused, InvalidRequest, Overloaded,
                StorageFull: see each.
            TypeError: the input is not JSON.
            ValueError: a number of the input cannot be sent unchanged.
        """
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
        return self._wire.unary(call, timeout_s=timeout_s)

    def get(self, run_id: str, *, timeout_s: float | None = None) -> run_pb2.Run:
        """Return one run with its recovery fields; raise RunNotFound if there is none."""
        return self._wire.unary(requests.get_run(run_id), timeout_s=timeout_s)

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
    ) -> Iterator[run_pb2.Run]:
        """Iterate over all runs that match, newest first; pages are fetched as needed.

        Args:
            statuses: only these; empty means every status.
            engine: only this engine.
            labels: only runs with all of these labels, at most 8.
            created_after: only runs created at or after this time, which needs a time zone.
            created_before: only runs created before this time, which needs a time zone.
            view: `RUN_VIEW_BASIC` omits input, output and the question's text.
            page_size: runs per call, 1 to 1000. A page must fit `max_receive_bytes`.
            timeout_s: the deadline of each page.
        """
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
    ) -> Generator[run_service_pb2.WatchRunResponse, None, None]:
        """Iterate over the events of a run: a snapshot, then every event once and in order.

        The watch resumes by itself after the last update that it returned: after a broken
        connection, a restart of the service, too slow a reader, and 45 s without any message. It
        ends after the event that made the run terminal or quarantined it.

        If you leave the loop early, wrap the iterator in `contextlib.closing` to end the stream.

        Args:
            run_id: the run.
            after_sequence: the last sequence that you received. The watch begins with the next
                event, without a snapshot. 0 means every event since the creation.
            include_bookmarks: return bookmarks as well; the service sends one after 15 s without
                an event.
            reconnect_s: seconds for which a broken stream is reopened while no message arrives;
                None: no limit. A service that does not run yet counts as a broken stream.
            timeout_s: seconds for the whole watch; None: no limit.

        Raises:
            WatchHistoryPruned, WatchSequenceUnknown: start a new watch without `after_sequence`.
            WatchGap: the service omitted events.
            RunNotFound, DeadlineExceeded: see each.
            Unavailable, Overloaded, SlowReader: the last failure, once `reconnect_s` is over.
        """
        watch = streams.RunWatch(
            run_id,
            streams.Reconnection(reconnect_s=reconnect_s, timeout_s=timeout_s),
            after_sequence=after_sequence,
            include_bookmarks=include_bookmarks,
        )
        return self._wire.resumed(watch)

    def reply(
        self,
        run_id: str,
        interaction_id: int,
        response: JsonValue,
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> run_pb2.Run:
        """Answer the open question of a waiting run. Repeating the same answer changes nothing.

        Args:
            run_id: the waiting run.
            interaction_id: its `pending_interaction.interaction_id`.
            response: the answer, passed to the engine unchanged.
            etag: the etag of the run that you saw; EtagMismatch if the run has changed since.
            request_id: as in `create`.

        Raises:
            RunNotFound, RunNotWaiting, InteractionSuperseded, RunOfAnotherInstance,
                RunQuarantined, EtagMismatch, RequestIdReused, InvalidRequest: see each.
        """
        call = requests.submit_reply(
            run_id, interaction_id, response, etag=etag, request_id=request_id
        )
        return self._wire.unary(call, timeout_s=timeout_s)

    def cancel(
        self,
        run_id: str,
        *,
        etag: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> run_pb2.Run:
        """Cancel a run. A live process is ended first: see `cancel_requested`.

        Raises:
            RunNotFound, RunAlreadyTerminal, RunOfAnotherInstance, RunQuarantined, EtagMismatch,
                RequestIdReused: see each. Canceling a CANCELED run raises nothing.
        """
        call = requests.cancel_run(run_id, etag=etag, request_id=request_id)
        return self._wire.unary(call, timeout_s=timeout_s)

    def reopen(
        self,
        run_id: str,
        *,
        session_handle: str | None = None,
        etag: str | None = None,
        request_id: str | None = None,
        timeout_s: float | None = None,
    ) -> run_pb2.Run:
        """Reopen a run that a recovery failed because its session was lost.

        The run becomes WAITING_USER again; or QUEUED, if a reply had been accepted.

        Args:
            run_id: the run, FAILED with SESSION_RESUME_FAILED; see its `reopenable_until`.
            session_handle: the handle that resumes the session, a secret that is never shown or
                logged. None: the stored handle, whose session is usable again.
            etag: the etag of the run that you saw; EtagMismatch if the run has changed since.
            request_id: as in `create`.

        Raises:
            RunNotFound, RunNotReopenable, SessionNotResumable, RunOfAnotherInstance,
                RunQuarantined, EtagMismatch, RequestIdReused, InvalidRequest: see each.
        """
        call = requests.reopen_run(
            run_id, session_handle=session_handle, etag=etag, request_id=request_id
        )
        return self._wire.unary(call, timeout_s=timeout_s)

    def interactions(
        self, run_id: str, *, page_size: int = DEFAULT_PAGE_SIZE, timeout_s: float | None = None
    ) -> Iterator[run_pb2.Interaction]:
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
    ) -> Generator[run_service_pb2.StreamOutputResponse, None, None]:
        """Iterate over the output of one attempt, in pieces of at most 64 KiB.

        A broken stream is reopened where it stopped; no byte is missing or repeated.

        Args:
            run_id: the run.
            attempt: the attempt; 0 means the latest.
            channel: standard output (the default) or standard error.
            offset: bytes to skip.
            follow: wait for more output until the run is terminal; False: end after the present
                output.
            reconnect_s: seconds for which a broken stream is reopened while no piece arrives.
            timeout_s: seconds for reading everything; None: no limit.

        Raises:
            RunNotFound, OutputOutOfRange, DeadlineExceeded: see each.
            Unavailable, Overloaded, SlowReader: the last failure, once `reconnect_s` is over.
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


class Recovery:
    """RecoveryService: what restarts decided, and why. Errors and `timeout_s` as in `Runs`."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def info(
        self, run_id: str, *, timeout_s: float | None = None
    ) -> recovery_service_pb2.GetRecoveryInfoResponse:
        """Return the latest decision about a run and all earlier ones; raise RunNotFound."""
        return self._wire.unary(requests.get_recovery_info(run_id), timeout_s=timeout_s)

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
    ) -> Iterator[run_pb2.Run]:
        """Iterate over all runs that a restart decided about, newest decision first.

        Args:
            recovery_states: only these; empty means every state but NONE.
            recovery_reason: only decisions by this rule.
            engine: only this engine.
            labels: only runs with all of these labels, at most 8.
            recovered_after: only decisions at or after this time, which needs a time zone.
            recovered_before: only decisions before this time, which needs a time zone.
            reconciliation_id: only runs whose latest decision belongs to this report.
            view: `RUN_VIEW_BASIC` omits input, output and the question's text.
            page_size: runs per call, 1 to 1000. A page must fit `max_receive_bytes`.
            timeout_s: the deadline of each page.
        """
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
    ) -> Generator[recovery_service_pb2.WatchRecoveredResponse, None, None]:
        """Iterate over decisions of restarts as they are committed, each once, without an end.

        The watch resumes by itself as `Runs.watch` does, after the last cursor that it returned.
        Store the cursor of the last response that you have handled, to start a later watch there.

        Args:
            recovery_states: as in `recovered`, like the filters that follow.
            after_cursor: the last cursor that you handled; empty: only decisions from now on, that
                is, after the first bookmark.
            include_bookmarks: return bookmarks as well. The first response of every stream is a
                bookmark, so you get a cursor before the first decision.
            reconnect_s: seconds for which a broken stream is reopened while no message arrives;
                None: no limit.
            timeout_s: seconds for the whole watch; None: no limit.

        Raises:
            WatchCursorInvalid: start a new watch without `after_cursor`.
            InvalidRequest, DeadlineExceeded: see each.
            Unavailable, Overloaded, SlowReader: the last failure, once `reconnect_s` is over.
        """
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

    def explain(
        self, run_id: str, *, timeout_s: float | None = None
    ) -> recovery_service_pb2.ExplainRecoveryResponse:
        """Return the decisions about a run with facts, sources, and what was done to processes.

        Newest first, at most the latest 100. Raise RunNotFound if there is no such run.
        """
        return self._wire.unary(requests.explain_recovery(run_id), timeout_s=timeout_s)

    def plan(
        self, *, page_size: int = DEFAULT_PAGE_SIZE, timeout_s: float | None = None
    ) -> Plan[Iterator[recovery_service_pb2.PlannedDecision]]:
        """Return what a restart of this instance would decide now. Changes nothing.

        Args:
            page_size: decisions per call, 1 to 1000.
            timeout_s: the deadline of each page. The first page is fetched at once.
        """
        listing = requests.plan_recovery(page_size=page_size)
        first = self._wire.unary(listing(""), timeout_s=timeout_s)
        decisions = self._wire.rows(listing, first=first, timeout_s=timeout_s)
        return Plan(first.totals, decisions)

    def status(
        self, *, timeout_s: float | None = None
    ) -> recovery_service_pb2.GetRecoveryStatusResponse:
        """Return the state of the service; works during a recovery as well."""
        return self._wire.unary(requests.get_recovery_status(), timeout_s=timeout_s)

    def reconciliations(
        self, *, page_size: int = DEFAULT_PAGE_SIZE, timeout_s: float | None = None
    ) -> Iterator[recovery_pb2.Reconciliation]:
        """Iterate over all reports, newest first; works during a recovery as well."""
        listing = requests.list_reconciliations(page_size=page_size)
        return self._wire.rows(listing, timeout_s=timeout_s)

    def reconciliation(
        self, reconciliation_id: str, *, timeout_s: float | None = None
    ) -> recovery_pb2.Reconciliation:
        """Return one report; raise ReconciliationNotFound if there is none."""
        call = requests.get_reconciliation(reconciliation_id)
        return self._wire.unary(call, timeout_s=timeout_s)


class Health:
    """grpc.health.v1."""

    def __init__(self, wire: _Wire) -> None:
        self._wire = wire

    def check(self, service: str = "", *, timeout_s: float | None = None) -> ServingStatus:
        """Check once, without retries and without waiting for a server.

        Args:
            service: a health name of the service; empty: the service as a whole.

        Raises:
            NotFound: the service has no such health name.
            Unavailable: there is no connection.
        """
        return self._wire.unary(requests.check_health(service), timeout_s=timeout_s)


class RunRecoveryClient:
    """A connection to the service. Safe to share between threads; create one and reuse it.

    Args:
        target: `host:port` or any gRPC target.
        channel: your own channel instead of a target (see `channel_options`). You close it.
        tls: how the connection is encrypted. True: with the roots that gRPC trusts, and without a
            certificate of the client. False: not encrypted, unless `credentials` are given.
        credentials: any other credentials of gRPC, instead of `tls`.
        token: the caller's bearer token. It is never sent to another machine without encryption.
        token_file: the file that holds the token, instead of `token`. It is read for each call, so
            that the token can be replaced.
        timeout_s: default deadline of unary calls, in seconds.
        max_receive_bytes: size of the largest response to accept.
        options: further gRPC channel options; they override the client's own.

    Raises:
        OSError: a file of `tls` cannot be read.
        ValueError: the token is malformed, or would be sent to another machine unencrypted.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        channel: grpc.Channel | None = None,
        tls: Tls | bool = False,
        credentials: grpc.ChannelCredentials | None = None,
        token: str | None = None,
        token_file: str | PathLike[str] | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        max_receive_bytes: int = DEFAULT_MAX_RECEIVE_BYTES,
        options: Sequence[ChannelOption] = (),
    ) -> None:
        settings = channel_options(
            target=target, max_receive_bytes=max_receive_bytes, options=options
        )
        if channel is not None and target is not None:
            raise TypeError("give a target or a channel, not both")
        bearer = BearerToken(token=token, file=token_file)
        self._owns_channel = channel is None
        if channel is None:
            credentials, settings = secured(settings, tls=tls, credentials=credentials)
            channel = _open(required_target(target), credentials, settings, bearer)
        self._channel = channel
        self._timeout_s = timeout_s
        wire = _Wire(self._channel, timeout_s=timeout_s, token=bearer)
        self.runs = Runs(wire)
        self.recovery = Recovery(wire)
        self.health = Health(wire)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; open calls fail. Your own channel stays open."""
        if self._owns_channel:
            self._channel.close()

    def wait_until_ready(self, timeout_s: float | None = 60.0, *, service: str = "") -> None:
        """Return once the service is SERVING, which means that its recovery has committed.

        Args:
            timeout_s: seconds to wait, also for a server that does not run yet; None: no limit.
            service: a health name of the service; empty: the service as a whole.

        Raises:
            DeadlineExceeded: the service was not SERVING in time.
            NotFound: the service has no such health name.
        """
        wait = waiting.wait_until_serving(service, timeout_s=timeout_s)
        while True:
            with wait.attempt():
                limit_s = wait.attempt_timeout_s(self._timeout_s)
                if wait.is_over(self.health.check(service, timeout_s=limit_s)):
                    return
            time.sleep(wait.pause_s())

    def wait_for_run(
        self, run_id: str, *, timeout_s: float | None, or_waiting: bool = False
    ) -> run_pb2.Run:
        """Return a run once it has ended, across restarts of the service.

        This polls at growing intervals of up to 2 s.

        Args:
            run_id: the run.
            timeout_s: seconds to wait; None: no limit.
            or_waiting: also return the run when it is WAITING_USER.

        Raises:
            DeadlineExceeded: the run has not ended in time.
            RunNotFound: no run has this id.
            RunQuarantined: the run is quarantined and will not end by itself.
        """
        wait = waiting.wait_for_run(run_id, timeout_s=timeout_s, or_waiting=or_waiting)
        while True:
            with wait.attempt():
                run = self.runs.get(run_id, timeout_s=wait.attempt_timeout_s(self._timeout_s))
                if wait.is_over(run):
                    return run
            time.sleep(wait.pause_s())


def _open(
    target: str,
    credentials: grpc.ChannelCredentials | None,
    options: Sequence[ChannelOption],
    token: BearerToken,
) -> grpc.Channel:
    if credentials is None:
        demand_encrypted(token, target)
        return grpc.insecure_channel(target, options=options)
    return grpc.secure_channel(target, credentials, options=options)
