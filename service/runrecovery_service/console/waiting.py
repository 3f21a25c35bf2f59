"""The questions that wait, oldest first."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from runrecovery.v1 import run_pb2, run_service_pb2

from runrecovery_service.console.contract import Contract
from runrecovery_service.console.questions import QuestionView, question_of
from runrecovery_service.http.calls import CallFailed

MAX_LISTED: Final = 200
"""Waiting runs among which the oldest questions are found."""
MAX_SHOWN: Final = 20
_SEARCH_STEPS: Final = 24


@dataclass(frozen=True, slots=True)
class WaitingQuestions:
    """The questions that wait.

    Attributes:
        questions: the oldest ones.
        number: of the runs that were listed.
        has_more: there are more waiting runs than were listed. Those of the oldest runs were.
        version: changes when a listed run does.
    """

    questions: tuple[QuestionView, ...]
    number: int
    has_more: bool
    version: str


async def waiting_questions(contract: Contract) -> WaitingQuestions:
    """Return the oldest questions that wait."""
    listed = await list_waiting(contract)
    oldest = sorted(listed.runs, key=_asked)[:MAX_SHOWN]
    runs = await asyncio.gather(*(_get_if_there(contract, run.run_id) for run in oldest))
    views = (question_of(run) for run in runs if run is not None)
    return WaitingQuestions(
        questions=tuple(view for view in views if view is not None),
        number=len(listed.runs),
        has_more=listed.has_more,
        version=version_of(listed.runs),
    )


@dataclass(frozen=True, slots=True)
class ListedRuns:
    """Waiting runs, without their questions."""

    runs: list[run_pb2.Run]
    has_more: bool


async def list_waiting(contract: Contract) -> ListedRuns:
    """Return the waiting runs, or those that were created first if there are more than listed.

    ListRuns has the newest runs first. So if they are too many, the time is searched before which
    few enough were created.
    """
    answer = await _list_before(contract, None)
    if not answer.next_page_token:
        return ListedRuns(list(answer.runs), has_more=False)
    newest = answer.runs[-1].created_at.ToDatetime(tzinfo=UTC)
    oldest = datetime(2020, 1, 1, tzinfo=UTC)  # before the first run of any store
    best = answer
    for _ in range(_SEARCH_STEPS):
        middle = oldest + (newest - oldest) / 2
        answer = await _list_before(contract, middle)
        if answer.next_page_token:
            newest, best = answer.runs[-1].created_at.ToDatetime(tzinfo=UTC), answer
        elif len(answer.runs) >= MAX_SHOWN:
            return ListedRuns(list(answer.runs), has_more=True)
        else:
            oldest = middle
        if newest - oldest < timedelta(milliseconds=1):
            break
    return ListedRuns(list(best.runs), has_more=True)


async def _list_before(
    contract: Contract, before: datetime | None
) -> run_service_pb2.ListRunsResponse:
    created_before = None
    if before is not None:
        created_before = Timestamp()
        created_before.FromDatetime(before)
    return await contract.list_runs(
        run_service_pb2.ListRunsRequest(
            filter=run_service_pb2.RunFilter(
                statuses=[run_pb2.RUN_STATUS_WAITING_USER], created_before=created_before
            ),
            page_size=MAX_LISTED,
            view=run_pb2.RUN_VIEW_BASIC,
        )
    )


async def _get_if_there(contract: Contract, run_id: str) -> run_pb2.Run | None:
    try:
        return await contract.get_run(run_id)
    except CallFailed as error:
        if error.code is grpc.StatusCode.NOT_FOUND:  # removed since it was listed
            return None
        raise


def _asked(run: run_pb2.Run) -> tuple[int, int]:
    asked = run.pending_interaction.asked_at
    return asked.seconds, asked.nanos


def version_of(runs: Sequence[run_pb2.Run]) -> str:
    """Return a short text that changes when one of the runs does, or when there are others."""
    seen = tuple((run.run_id, run.etag, run.recovery.recovery_count) for run in runs)
    return f"{hash(seen) & 0xFFFFFFFFFFFFFFFF:x}"
