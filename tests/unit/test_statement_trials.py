"""Trials of statements: after a failure, each one writes until a write has succeeded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import trial
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage_health import StatementTrials
from support.clock import FakeClock


async def test_on_postgresql_writes_that_fail_are_tried_again_although_reads_succeed() -> None:
    noted: list[bool] = []

    async def run_trial(use: object, **_: object) -> None:
        if use is trial.try_create_and_take:
            raise StorageUnavailable

    storage: Any = SimpleNamespace(is_shared=True, run_trial=run_trial)
    dispatcher: Any = SimpleNamespace(check_queue=lambda: None, failing_s=0.0)
    gate: Any = SimpleNamespace(recovered=True)
    health: Any = SimpleNamespace(note=lambda _, *, answers: noted.append(answers))
    trials = StatementTrials(
        lease_ttl_s=15.0,
        storage=storage,
        owner=Owner("a", 1, "t"),
        clock=FakeClock(),
        dispatcher=dispatcher,
        gate=gate,
        health=health,
        stop=StopSignal(),
    )

    for _ in range(4):
        await trials.run_trial()

    assert noted == [True, False, False, False]
