"""RecoveryService, for threads and for asyncio. `Recovery` describes the methods in full."""

from __future__ import annotations

from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from datetime import datetime

from runrecovery import _requests as requests
from runrecovery import _streams as streams
from runrecovery._channel import DEFAULT_PAGE_SIZE
from runrecovery._requests import Plan
from runrecovery._wire import AsyncWire, Wire
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2


class Recovery:
    """RecoveryService: the decisions of restarts. Errors and `timeout_s` are as in `Runs`."""

    def __init__(self, wire: Wire) -> None:
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
            InvalidRequest, DeadlineExceeded: see their docs.
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
        """Return the decisions about a run, each with its facts and the killed processes.

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

    def instances(
        self, *, timeout_s: float | None = None
    ) -> Sequence[recovery_service_pb2.Instance]:
        """Return the instances that use the database; works during a recovery as well."""
        return self._wire.unary(requests.get_instances(), timeout_s=timeout_s)

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

    def prune(
        self, *, dry_run: bool = False, timeout_s: float | None = None
    ) -> recovery_service_pb2.PruneResponse:
        """Remove all data that has reached its age by the service's `[retention]`.

        One call works for about 5 seconds. Repeat the call until the response has `done` set.

        Args:
            dry_run: remove nothing, and return what would be removed. A dry run can take minutes if
                there are many runs: give it a `timeout_s`.
        """
        return self._wire.unary(requests.prune(dry_run=dry_run), timeout_s=timeout_s)

    def webhooks(self, *, timeout_s: float | None = None) -> Sequence[recovery_service_pb2.Webhook]:
        """Return the webhooks of the instance, with the number of their waiting deliveries."""
        return self._wire.unary(requests.list_webhooks(), timeout_s=timeout_s)

    def retry_webhook(self, name: str, *, timeout_s: float | None = None) -> int:
        """Try all deliveries of a webhook at once, also those that were given up.

        A webhook that has answered 410 Gone is enabled again.

        Returns:
            The number of deliveries that had been given up, and are tried again.

        Raises:
            InvalidRequest: no webhook has this name.
        """
        return self._wire.unary(requests.retry_webhook(name), timeout_s=timeout_s)


class AsyncRecovery:
    """RecoveryService; see `Recovery`."""

    def __init__(self, wire: AsyncWire) -> None:
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
        """Return the decisions about a run, each with its facts and the killed processes.

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

    async def instances(
        self, *, timeout_s: float | None = None
    ) -> Sequence[recovery_service_pb2.Instance]:
        """Return the instances that use the database; works during a recovery as well."""
        return await self._wire.unary(requests.get_instances(), timeout_s=timeout_s)

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

    async def prune(
        self, *, dry_run: bool = False, timeout_s: float | None = None
    ) -> recovery_service_pb2.PruneResponse:
        """Remove all data that has reached its age. See `Recovery.prune`."""
        return await self._wire.unary(requests.prune(dry_run=dry_run), timeout_s=timeout_s)

    async def webhooks(
        self, *, timeout_s: float | None = None
    ) -> Sequence[recovery_service_pb2.Webhook]:
        """Return the webhooks of the instance, with the number of their waiting deliveries."""
        return await self._wire.unary(requests.list_webhooks(), timeout_s=timeout_s)

    async def retry_webhook(self, name: str, *, timeout_s: float | None = None) -> int:
        """Try the deliveries of a webhook at once. See `Recovery.retry_webhook`."""
        return await self._wire.unary(requests.retry_webhook(name), timeout_s=timeout_s)
