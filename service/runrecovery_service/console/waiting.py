"""The questions that wait for an answer, those of the oldest runs first. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from runrecovery.v1 import run_pb2, run_service_pb2

from runrecovery_service.console.questions import QuestionView, question_of

MAX_SHOWN: Final = 20
"""The most questions on a page."""


def waiting_request(page_token: str) -> run_service_pb2.ListRunsRequest:
    """Return the request for a page of waiting runs, ordered by the time of their creation."""
    return run_service_pb2.ListRunsRequest(
        filter=run_service_pb2.RunFilter(statuses=[run_pb2.RUN_STATUS_WAITING_USER]),
        page_size=MAX_SHOWN,
        page_token=page_token,
        oldest_first=True,
    )


def waiting_questions(runs: Sequence[run_pb2.Run]) -> tuple[QuestionView, ...]:
    """Return the questions of a page of waiting runs, ordered by the time when each was asked."""
    oldest_first = sorted(runs, key=_asked)
    views = (question_of(run) for run in oldest_first)
    return tuple(view for view in views if view is not None)


def _asked(run: run_pb2.Run) -> tuple[int, int]:
    asked = run.pending_interaction.asked_at
    return asked.seconds, asked.nanos


def version_of(runs: Sequence[run_pb2.Run]) -> str:
    """Return a short text that changes when one of the runs changes, or when a run is added."""
    seen = tuple((run.run_id, run.etag, run.recovery.recovery_count) for run in runs)
    return f"{hash(seen) & 0xFFFFFFFFFFFFFFFF:x}"
