"""The calls of the contract that the pages make. Pages have no other access to the service."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final, TypeVar

import grpc
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Value
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2, run_service_pb2

from runrecovery_service.domain.run import JsonValue
from runrecovery_service.http.calls import CallFailed, CallOrigin, ContractCalls
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.rpc.json_values import write_value

_RUNS: Final = "runrecovery.v1.RunService"
_RECOVERY: Final = "runrecovery.v1.RecoveryService"
MAX_EVENTS: Final = 100
"""The page of a run shows at most this many events, the latest ones."""
MAX_QUESTIONS: Final = 100
MAX_PLANNED: Final = 50
MAX_REPORTS: Final = 25

MessageT = TypeVar("MessageT", bound=Message)


@dataclass(frozen=True, slots=True)
class RunEvents:
    """The latest events of a run, oldest first.

    Attributes:
        sequence: the number of the latest event. It rises with every event.
        is_cut: whether the run had earlier events, which are missing here.
    """

    run: run_pb2.Run
    sequence: int
    events: tuple[run_pb2.RunEvent, ...]
    is_cut: bool


class Contract:
    """Calls the contract for one visitor. Every method raises CallFailed if its call fails."""

    def __init__(self, calls: ContractCalls, origin: CallOrigin) -> None:
        self._calls = calls
        self._origin = origin

    async def _call(self, method: str, request: Message, response: type[MessageT]) -> MessageT:
        answer = await self._calls.unary(method, request, self._origin)
        if not isinstance(answer, response):
            raise TypeError(f"{method} answered with {type(answer).__name__}")
        return answer

    async def _stream(
        self, method: str, request: Message, response: type[MessageT]
    ) -> AsyncGenerator[MessageT, None]:
        answers = self._calls.stream(method, request, self._origin)
        async for answer in answers:
            if not isinstance(answer, response):
                raise TypeError(f"{method} answered with {type(answer).__name__}")
            yield answer

    # -- runs ----------------------------------------------------------------------------------

    async def get_run(self, run_id: str) -> run_pb2.Run:
        """Return a run."""
        request = run_service_pb2.GetRunRequest(run_id=run_id)
        answer = await self._call(f"{_RUNS}/GetRun", request, run_service_pb2.GetRunResponse)
        return answer.run

    async def list_runs(
        self, request: run_service_pb2.ListRunsRequest
    ) -> run_service_pb2.ListRunsResponse:
        """Return a page of runs."""
        return await self._call(f"{_RUNS}/ListRuns", request, run_service_pb2.ListRunsResponse)

    async def run_events(self, run_id: str) -> RunEvents:
        """Return a run with its latest events."""
        first = run_service_pb2.WatchRunRequest(run_id=run_id)
        async with aclosing(self._watch(first)) as stream:
            snapshot = await anext(stream)
        after = max(0, snapshot.sequence - MAX_EVENTS)
        try:
            events = await self._events_between(run_id, after, snapshot.sequence)
        except CallFailed as error:
            oldest = _metadata(error, "oldest_sequence")
            if error.code is not grpc.StatusCode.OUT_OF_RANGE or not oldest.isdecimal():
                raise
            after = int(oldest) - 1
            events = await self._events_between(run_id, after, snapshot.sequence)
        return RunEvents(snapshot.snapshot, snapshot.sequence, tuple(events), after > 0)

    async def _events_between(self, run_id: str, after: int, last: int) -> list[run_pb2.RunEvent]:
        if after >= last:
            return []
        request = run_service_pb2.WatchRunRequest(run_id=run_id, after_sequence=after)
        events = []
        async with aclosing(self._watch(request)) as stream:
            async for update in stream:
                if update.HasField("event"):
                    events.append(update.event)
                if update.sequence >= last:
                    break
        return events

    def watch_run(self, run_id: str) -> AsyncGenerator[run_service_pb2.WatchRunResponse, None]:
        """Yield the run, and then every event. Ends when the run has ended."""
        return self._watch(run_service_pb2.WatchRunRequest(run_id=run_id))

    def _watch(
        self, request: run_service_pb2.WatchRunRequest
    ) -> AsyncGenerator[run_service_pb2.WatchRunResponse, None]:
        return self._stream(f"{_RUNS}/WatchRun", request, run_service_pb2.WatchRunResponse)

    async def list_interactions(self, run_id: str) -> list[run_pb2.Interaction]:
        """Return the questions of a run, oldest first, `MAX_QUESTIONS` at most."""
        request = run_service_pb2.ListInteractionsRequest(run_id=run_id, page_size=MAX_QUESTIONS)
        response = run_service_pb2.ListInteractionsResponse
        answer = await self._call(f"{_RUNS}/ListInteractions", request, response)
        return list(answer.interactions)

    def stream_output(
        self, request: run_service_pb2.StreamOutputRequest
    ) -> AsyncGenerator[run_service_pb2.StreamOutputResponse, None]:
        """Yield pieces of output."""
        return self._stream(f"{_RUNS}/StreamOutput", request, run_service_pb2.StreamOutputResponse)

    async def reply(self, run_id: str, interaction_id: int, response: JsonValue, etag: str) -> None:
        """Answer a question of a run, if the run has not changed."""
        value = Value()
        write_value(value, response)
        request = run_service_pb2.SubmitReplyRequest(
            run_id=run_id, interaction_id=interaction_id, response=value, etag=etag
        )
        await self._call(f"{_RUNS}/SubmitReply", request, run_service_pb2.SubmitReplyResponse)

    async def cancel(self, run_id: str, etag: str) -> None:
        """Cancel a run, if it has not changed."""
        request = run_service_pb2.CancelRunRequest(run_id=run_id, etag=etag)
        await self._call(f"{_RUNS}/CancelRun", request, run_service_pb2.CancelRunResponse)

    async def reopen(self, run_id: str, etag: str) -> None:
        """Reopen a run with its kept session, if it has not changed."""
        request = run_service_pb2.ReopenRunRequest(run_id=run_id, keep_session=True, etag=etag)
        await self._call(f"{_RUNS}/ReopenRun", request, run_service_pb2.ReopenRunResponse)

    # -- recovery ------------------------------------------------------------------------------

    async def explain(self, run_id: str) -> recovery_service_pb2.ExplainRecoveryResponse:
        """Return the decisions of restarts about a run, newest first."""
        request = recovery_service_pb2.ExplainRecoveryRequest(run_id=run_id)
        response = recovery_service_pb2.ExplainRecoveryResponse
        return await self._call(f"{_RECOVERY}/ExplainRecovery", request, response)

    async def plan(self, page_token: str) -> recovery_service_pb2.PlanRecoveryResponse:
        """Return a page of the decisions that a restart would make now."""
        request = recovery_service_pb2.PlanRecoveryRequest(
            page_size=MAX_PLANNED, page_token=page_token
        )
        response = recovery_service_pb2.PlanRecoveryResponse
        return await self._call(f"{_RECOVERY}/PlanRecovery", request, response)

    async def status(self) -> recovery_service_pb2.GetRecoveryStatusResponse:
        """Return the state of the service and of its recovery."""
        request = recovery_service_pb2.GetRecoveryStatusRequest()
        response = recovery_service_pb2.GetRecoveryStatusResponse
        return await self._call(f"{_RECOVERY}/GetRecoveryStatus", request, response)

    async def instances(self) -> list[recovery_service_pb2.Instance]:
        """Return the instances, those that are alive first."""
        request = recovery_service_pb2.GetInstancesRequest()
        response = recovery_service_pb2.GetInstancesResponse
        answer = await self._call(f"{_RECOVERY}/GetInstances", request, response)
        return list(answer.instances)

    async def list_reports(
        self, page_token: str
    ) -> recovery_service_pb2.ListReconciliationsResponse:
        """Return a page of reports, newest first."""
        request = recovery_service_pb2.ListReconciliationsRequest(
            page_size=MAX_REPORTS, page_token=page_token
        )
        response = recovery_service_pb2.ListReconciliationsResponse
        return await self._call(f"{_RECOVERY}/ListReconciliations", request, response)

    async def get_report(self, reconciliation_id: str) -> recovery_pb2.Reconciliation:
        """Return a report."""
        request = recovery_service_pb2.GetReconciliationRequest(reconciliation_id=reconciliation_id)
        response = recovery_service_pb2.GetReconciliationResponse
        answer = await self._call(f"{_RECOVERY}/GetReconciliation", request, response)
        return answer.reconciliation

    async def recovered_runs(self, reconciliation_id: str) -> list[run_pb2.Run]:
        """Return the first page of the runs whose latest decision belongs to a report."""
        request = recovery_service_pb2.ListRecoveredRequest(
            filter=recovery_service_pb2.RecoveredFilter(reconciliation_id=reconciliation_id),
            page_size=MAX_PLANNED,
            view=run_pb2.RUN_VIEW_BASIC,
        )
        response = recovery_service_pb2.ListRecoveredResponse
        answer = await self._call(f"{_RECOVERY}/ListRecovered", request, response)
        return list(answer.runs)


def reason_of(error: CallFailed) -> str:
    """Return the reason of a refused call, by its name in docs/errors.md; empty if it has none."""
    for detail in error.details:
        reason = getattr(detail, "reason", "")
        if isinstance(reason, str) and reason:
            return reason
    return ""


def _metadata(error: CallFailed, key: str) -> str:
    for detail in error.details:
        metadata = getattr(detail, "metadata", None)
        if metadata is not None and key in metadata:
            return str(metadata[key])
    return ""
