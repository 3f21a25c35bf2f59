"""A recovery that fails is tried again, and health says in between what the service does."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.periodic import Backoff
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.recovery_runner import RecoveryRunner
from runrecovery_service.stop_signal import StopSignal


async def test_a_recovery_that_is_tried_again_looks_failed_only_until_the_next_try() -> None:
    done: list[str] = []

    async def run_exclusive(_: object) -> str:
        done.append("try")
        if done.count("try") < 3:
            raise StorageUnavailable
        return "report"

    unused: Any = None
    storage: Any = SimpleNamespace(run_exclusive=run_exclusive)
    gate: Any = SimpleNamespace(
        set_recovery_failed=lambda: done.append("failed"),
        set_recovering=lambda: done.append("recovering"),
    )
    runner = RecoveryRunner(
        storage=storage,
        at_start=unused,
        at_stop=unused,
        hand_over=None,
        status=RecoveryStatus(),
        gate=gate,
        stop=StopSignal(),
        tries=3,
        backoff=Backoff(0.0, 0.0),
    )

    report: Any = await runner.recover()

    assert report == "report"
    assert done == ["try", "failed", "recovering", "try", "failed", "recovering", "try"]
