"""A shim counts as useless only if two checks in a row find it stopped or gone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from runrecovery_service.execution.supervisor import TurnSupervisor
from runrecovery_service.execution.turn_state import Signal


async def test_a_shim_that_works_between_two_bad_checks_is_not_useless() -> None:
    unused: Any = None
    launch: Any = SimpleNamespace(is_guarded=True)
    supervisor = TurnSupervisor(
        records=unused,
        launch=launch,
        catalog=unused,
        sessions=unused,
        permissions=unused,
        output=unused,
        threads=unused,
        exit_grace_s=1.0,
    )

    def events_after(checks: list[bool]) -> list[object]:
        for launch.is_guarded in checks:
            supervisor.check_shim()
        return [supervisor._events.get_nowait() for _ in range(supervisor._events.qsize())]

    assert events_after([False, True, False]) == []
    assert events_after([False]) == [Signal.SHIM_USELESS]
