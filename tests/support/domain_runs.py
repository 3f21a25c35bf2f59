"""A queued run of the domain, from which tests derive others."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from runrecovery_service.domain import run as domain
from runrecovery_service.domain.run import Run, RunStatus

AT: Final = datetime(2026, 11, 24, 1, 2, 3, 456_789, tzinfo=UTC)

QUEUED_RUN: Final = Run(
    key=5,
    run_id="r1",
    engine="demo",
    labels={},
    status=RunStatus.QUEUED,
    profile=domain.Profile.RESUMABLE,
    restart_policy=domain.RestartPolicy.FAIL,
    max_attempts=1,
    input={},
    output=None,
    error=None,
    pending=None,
    session=None,
    interaction_count=0,
    attempt=0,
    turn=0,
    cancel_requested=False,
    recovery=None,
    owner="here",
    owner_epoch=3,
    version=2,
    created_at=AT,
    started_at=None,
    updated_at=AT,
    ended_at=None,
)
