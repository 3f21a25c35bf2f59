"""RunService, for threads and for asyncio. `Runs` describes the methods in full."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Iterator, Mapping
from datetime import datetime

from runrecovery import _requests as requests
from runrecovery import _streams as streams
from runrecovery._channel import DEFAULT_PAGE_SIZE
from runrecovery._values import JsonValue
from runrecovery._wire import AsyncWire, Wire
from runrecovery.v1 import run_pb2, run_service_pb2


class Runs:
    """RunService. Every method raises a `RunRecoveryClientError` when the call fails.

    `timeout_s` is the deadline of one call in seconds; None means the client's default. Until the
    deadline, the client retries after a lost connection and after UNAVAILABLE.
    """

    def __init__(self, wire: Wire) -> None:
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
            require_user_reply: False: a question without an answer within its timeout is decided
                automatically. None: the setting of the engine.
            max_tokens: tokens that the run may use, input and output together; at most the limit
                of the engine, which is the default. At the limit the run fails with
                BUDGET_EXCEEDED.
            max_cost_usd: the same for the cost that the agent reports.
            request_id: a UUID that makes the call safe to repeat. None: the client makes one for
                the retries of this call only.

        Raises:
            UnknownEngine, RunAlreadyExists, RequestIdReused, InvalidRequest, Overloaded,
                StorageFull: see their docs.
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
        oldest_first: bool = False,
        page_size: int = DEFAULT_PAGE_SIZE,
        timeout_s: float | None = None,
    ) -> Iterator[run_pb2.Run]:
        """Iterate over all runs that match, newest first by default; pages are fetched as needed.

        Args:
            statuses: only these; empty means every status.
            engine: only this engine.
            labels: only runs with all of these labels, at most 8.
            created_after: only runs created at or after this time, which needs a time zone.
            created_before: only runs created before this time, which needs a time zone.
            view: `RUN_VIEW_BASIC` omits input, output and the question's text.
            oldest_first: the runs that were created first come first.
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
            oldest_first=oldest_first,
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

        The watch resumes by itself after the last update that it returned. It does so after a
        broken connection, after a restart of the service, if the caller read too slowly, and after
        45 s without any message. It ends after the event that made the run terminal or quarantined
        it.

        If you leave the loop early, wrap the iterator in `contextlib.closing` to end the stream.

        Args:
            run_id: the run.
            after_sequence: the last sequence that you received. The watch begins with the next
                event, without a snapshot. 0 means every event since the creation.
            include_bookmarks: return bookmarks as well; the service sends one after 15 s without
                an event.
            reconnect_s: seconds from the break of a stream until the latest failure is raised, if
                no message arrives meanwhile; None: no limit. A service that does not run yet counts
                as a broken stream.
            timeout_s: seconds for the whole watch; None: no limit.

        Raises:
            WatchHistoryPruned, WatchSequenceUnknown: start a new watch without `after_sequence`.
            WatchGap: the service omitted events.
            RunNotFound, DeadlineExceeded: see their docs.
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
            RunNotFound, RunNotWaiting, InteractionSuperseded, RunQuarantined, EtagMismatch,
                RequestIdReused, InvalidRequest: see their docs.
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
            RunNotFound, RunAlreadyTerminal, RunQuarantined, EtagMismatch, RequestIdReused: see
                each. Canceling a CANCELED run raises nothing.
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
                logged. None: the stored handle, for a session that can be resumed again.
            etag: the etag of the run that you saw; EtagMismatch if the run has changed since.
            request_id: as in `create`.

        Raises:
            RunNotFound, RunNotReopenable, SessionNotResumable, RunOfAnotherInstance,
                RunQuarantined, EtagMismatch, RequestIdReused, InvalidRequest: see their docs.
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
            RunNotFound, OutputRemoved, OutputOutOfRange, DeadlineExceeded: see their docs.
            RunOfAnotherInstance: the files are at another instance on the same database.
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


class AsyncRuns:
    """RunService; see `Runs`."""

    def __init__(self, wire: AsyncWire) -> None:
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
        oldest_first: bool = False,
        page_size: int = DEFAULT_PAGE_SIZE,
        timeout_s: float | None = None,
    ) -> AsyncIterator[run_pb2.Run]:
        """Iterate over all runs that match, newest first by default; pages come as needed."""
        listing = requests.list_runs(
            statuses=statuses,
            engine=engine,
            labels=labels,
            created_after=created_after,
            created_before=created_before,
            view=view,
            oldest_first=oldest_first,
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

        The watch resumes by itself, see `Runs.watch`. If you leave the loop
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
