"""RecoveryService: the decisions of restarts, and the state of the service."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final, Protocol

import structlog
from runrecovery.v1 import recovery_service_pb2 as pb

from runrecovery_service import daemon_threads
from runrecovery_service.domain.errors import FieldViolation, InvalidFields
from runrecovery_service.domain.plan import PlannedDecision, RecoveryPlan
from runrecovery_service.domain.reconciliation import RecoveredFilter
from runrecovery_service.domain.retention import PruneResult, RetentionKind
from runrecovery_service.domain.role import Role
from runrecovery_service.domain.run import Page
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.recovery.plan import Planner
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.rpc import (
    enums,
    paging,
    recovery_messages,
    run_messages,
    times,
    validation,
)
from runrecovery_service.rpc.callers import CALLER, caller_name
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.paging import PageTokens
from runrecovery_service.rpc.visibility import demand_visible, visible_engines
from runrecovery_service.rpc.watch_streams import RecoveredWatcher
from runrecovery_service.storage import decisions, instance_list, launch_records, reports, usage
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.instances import Owner
from runrecovery_service.webhooks.webhooks import Webhooks

log = structlog.get_logger()


class Prune(Protocol):
    """Removes the data that has reached its age; with `dry_run` it only counts this data."""

    async def __call__(self, *, dry_run: bool) -> PruneResult: ...


MAX_UNENDED_LAUNCHES: Final = 100
MAX_EXPLANATIONS: Final = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class RecoveryDeps:
    """The dependencies of RecoveryService.

    Attributes:
        prune: removes data that has reached its configured age; None: no age is configured.
        webhooks: the webhooks of this instance; None: there are none.
    """

    storage: Storage
    owner: Owner
    status: RecoveryStatus
    planner: Planner
    page_tokens: PageTokens
    prune: Prune | None = None
    webhooks: Webhooks | None = None


class RecoveryService:
    """The methods of runrecovery.v1.RecoveryService. `method_handlers.py` finds them by name."""

    def __init__(self, deps: RecoveryDeps, gate: Gate) -> None:
        self._storage = deps.storage
        self._owner = deps.owner
        self._status = deps.status
        self._planner = deps.planner
        self._page_tokens = deps.page_tokens
        self._prune = deps.prune
        self._webhooks = deps.webhooks
        self._planning = asyncio.Lock()
        self._gate = gate
        self._watcher = RecoveredWatcher(deps.storage, gate, deps.page_tokens)

    async def get_recovery_info(
        self, request: pb.GetRecoveryInfoRequest
    ) -> pb.GetRecoveryInfoResponse:
        """Return the decisions for one run."""
        validation.require_run_id(request.run_id)
        await demand_visible(self._storage, request.run_id)
        history = await self._storage.read(decisions.history, request.run_id)
        response = pb.GetRecoveryInfoResponse()
        recovery_messages.fill_recovery_info(response.recovery, history[0] if history else None)
        for decision in history:
            recovery_messages.fill_recovery_info(response.history.add(), decision)
        return response

    async def list_recovered(self, request: pb.ListRecoveredRequest) -> pb.ListRecoveredResponse:
        """Return a page of recovered runs, newest decision first."""
        validation.require_valid(validation.list_recovered(request))
        scope = paging.token_scope(request, width=2)
        page = await self._storage.read(
            decisions.recovered_page,
            _to_domain_filter(request.filter),
            after=self._page_tokens.decode(scope, request.page_token),
            limit=paging.page_size(request.page_size),
            view=enums.VIEW_FROM_PROTO[request.view],
        )
        response = pb.ListRecoveredResponse(
            next_page_token=self._page_tokens.encode(scope, page.after)
        )
        for run in page.rows:
            run_messages.fill_run(response.runs.add(), run)
        return response

    async def watch_recovered(
        self, request: pb.WatchRecoveredRequest
    ) -> AsyncGenerator[pb.WatchRecoveredResponse, None]:
        """Stream decisions as they are committed."""
        validation.require_valid(validation.recovered_filter(request.filter))
        async with aclosing(
            self._watcher.stream(request, _to_domain_filter(request.filter))
        ) as responses:
            async for response in responses:
                yield response

    async def explain_recovery(
        self, request: pb.ExplainRecoveryRequest
    ) -> pb.ExplainRecoveryResponse:
        """Return the explanation of each decision about a run."""
        validation.require_run_id(request.run_id)
        await demand_visible(self._storage, request.run_id)
        explained = await self._storage.read(
            decisions.explain, request.run_id, limit=MAX_EXPLANATIONS
        )
        response = pb.ExplainRecoveryResponse()
        for seen in explained:
            recovery_messages.fill_explanation(response.explanations.add(), seen)
        return response

    async def plan_recovery(self, request: pb.PlanRecoveryRequest) -> pb.PlanRecoveryResponse:
        """Return the decisions that a restart would make now; the first page has the totals."""
        validation.require_valid(validation.plan_recovery(request))
        scope = paging.token_scope(request, width=1)
        after, limit = (
            self._page_tokens.decode(scope, request.page_token),
            paging.page_size(request.page_size),
        )
        response = pb.PlanRecoveryResponse()
        await self._planning.acquire()  # one plan at a time: each reads every run, and files
        planning = asyncio.create_task(self._plan(after, limit))
        planning.add_done_callback(self._end_planning)
        page, plan = await asyncio.shield(planning)  # the plan goes on if the call ends
        if plan is not None:
            recovery_messages.fill_plan(response.plan, plan)
        response.next_page_token = self._page_tokens.encode(scope, page.after)
        for planned in page.rows:
            recovery_messages.fill_planned_decision(response.decisions.add(), planned)
        return response

    async def _plan(
        self, after: tuple[int, ...] | None, limit: int
    ) -> tuple[Page[PlannedDecision], RecoveryPlan | None]:
        planner = self._planner.pinned()
        rows = await self._storage.read(planner.read, after=after, limit=limit)
        # A file system may hang, and must not block a thread of the pool.
        return await daemon_threads.run(lambda: planner.decide(rows))

    def _end_planning(
        self, planning: asyncio.Task[tuple[Page[PlannedDecision], RecoveryPlan | None]]
    ) -> None:
        self._planning.release()
        if not planning.cancelled():
            # Asking for the error marks it as seen: the caller has it, unless its call ended.
            planning.exception()

    async def get_recovery_status(
        self, _request: pb.GetRecoveryStatusRequest
    ) -> pb.GetRecoveryStatusResponse:
        """Return the state of the service.

        An operator also gets the report of this start and the launches that are still alive, which
        are about the runs of all engines. Other callers get the usage of their engines.
        """
        current = self._status.report_id
        is_operator = CALLER.get().role is Role.OPERATOR
        report = None
        if is_operator and current is not None:
            report = await self._storage.read_row(reports.get_report, current)
        response = pb.GetRecoveryStatusResponse(
            instance=self._owner.instance, epoch=self._owner.epoch
        )
        recovery_messages.fill_status(
            response,
            state=self._gate.state,
            report=report,
            containment=self._status.containment,
            unended=await self._storage.read(
                launch_records.unended_launches, self._owner, limit=MAX_UNENDED_LAUNCHES
            )
            if is_operator
            else (),
            used=[
                used
                for used in await self._storage.read(usage.by_engine)
                if CALLER.get().sees(used.engine)
            ],
        )
        return response

    async def get_instances(self, _request: pb.GetInstancesRequest) -> pb.GetInstancesResponse:
        """Return the instances that use the database, with their runs and slots."""
        response = pb.GetInstancesResponse()
        for state in await self._storage.read(instance_list.list_instances):
            recovery_messages.fill_instance(response.instances.add(), state)
        return response

    async def list_reconciliations(
        self, request: pb.ListReconciliationsRequest
    ) -> pb.ListReconciliationsResponse:
        """Return a page of reports, newest first."""
        validation.require_valid(validation.list_reconciliations(request))
        scope = paging.token_scope(request, width=1)
        page = await self._storage.read(
            reports.report_page,
            after=self._page_tokens.decode(scope, request.page_token),
            limit=paging.page_size(request.page_size),
        )
        response = pb.ListReconciliationsResponse(
            next_page_token=self._page_tokens.encode(scope, page.after)
        )
        for report in page.rows:
            recovery_messages.fill_reconciliation(response.reconciliations.add(), report)
        return response

    async def get_reconciliation(
        self, request: pb.GetReconciliationRequest
    ) -> pb.GetReconciliationResponse:
        """Return one report."""
        wanted = request.reconciliation_id
        validation.require_valid(validation.reconciliation_id_violations(wanted))
        report = await self._storage.read_row(reports.get_report, wanted.lower())
        response = pb.GetReconciliationResponse()
        recovery_messages.fill_reconciliation(response.reconciliation, report)
        return response

    async def prune(self, request: pb.PruneRequest) -> pb.PruneResponse:
        """Remove the data that has reached its age; in a dry run only count it."""
        response = pb.PruneResponse(done=True)
        if self._prune is None:
            return response
        pruned = await self._prune(dry_run=request.dry_run)
        recovery_messages.fill_pruned(response, pruned)
        if caller_name() is not None and not request.dry_run:
            runs = pruned.counts.get(RetentionKind.RUNS, 0)
            log.info("audit.pruned", caller=caller_name(), runs=runs)
        return response

    async def list_webhooks(self, request: pb.ListWebhooksRequest) -> pb.ListWebhooksResponse:
        """Return the webhooks with their waiting deliveries."""
        response = pb.ListWebhooksResponse()
        for status in [] if self._webhooks is None else await self._webhooks.statuses():
            recovery_messages.fill_webhook(response.webhooks.add(), status)
        return response

    async def retry_webhook(self, request: pb.RetryWebhookRequest) -> pb.RetryWebhookResponse:
        """Try the deliveries of a webhook at once."""
        name = request.name
        revived = None if self._webhooks is None else await self._webhooks.retry(name)
        if revived is None:
            raise InvalidFields((FieldViolation("name", "no webhook has this name"),))
        if caller_name() is not None:
            log.info("audit.webhook_retried", caller=caller_name(), webhook=name, revived=revived)
        return pb.RetryWebhookResponse(revived=revived)


def _to_domain_filter(asked: pb.RecoveredFilter) -> RecoveredFilter:
    """Return the filter as the domain's value; UNSPECIFIED among the states means every state."""
    any_state = 0 in asked.recovery_states
    return RecoveredFilter(
        engines=visible_engines(),
        states=frozenset(
            () if any_state else (enums.RECOVERY_STATE_FROM_PROTO[n] for n in asked.recovery_states)
        ),
        reason=asked.recovery_reason or None,
        engine=asked.engine or None,
        labels=dict(asked.labels),
        after=times.read_optional_time(asked, "recovered_after"),
        before=times.read_optional_time(asked, "recovered_before"),
        reconciliation_id=asked.reconciliation_id.lower() or None,
    )
