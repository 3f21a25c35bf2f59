"""Nothing is removed by a wall clock that was set far ahead, until the time is confirmed."""

from __future__ import annotations

from datetime import timedelta

import structlog
from runrecovery_service.retention.time_check import TimeCheck
from support.clock import FakeClock

from .conftest import DAY_S, Machine

HOUR_S = 3600.0
DAY = timedelta(days=1)


def check(machine: Machine) -> TimeCheck:
    """Make the check of a start."""
    clock = FakeClock(wall=machine.store.now)
    return TimeCheck(storage=machine.storage, owner=machine.store.owner, clock=clock)


async def run_for(time: TimeCheck, seconds: float, *, every_s: float = 600) -> list[bool]:
    """Repeat the check while time passes."""
    assert isinstance(time.clock, FakeClock)
    found = []
    for _ in range(round(seconds / every_s)):
        time.clock.advance(every_s)
        found.append(await time.is_confirmed())
    return found


async def test_a_clock_that_runs_on_is_confirmed(machine: Machine) -> None:
    machine.ended()
    time = check(machine)

    assert await time.is_confirmed()
    assert all(await run_for(time, 3 * DAY_S, every_s=HOUR_S))


async def test_a_clock_that_was_set_ahead_is_not_believed_for_an_hour(machine: Machine) -> None:
    machine.ended()
    time = check(machine)
    assert await time.is_confirmed()
    time.clock.wall += 365 * DAY  # type: ignore[attr-defined]

    with structlog.testing.capture_logs() as logged:
        found = await run_for(time, 2 * HOUR_S)

    assert found == [False] * 6 + [True] * 6
    assert [line["event"] for line in logged] == ["retention.paused", "retention.resumed"]


async def test_a_clock_that_is_set_right_again_is_believed_at_once(machine: Machine) -> None:
    machine.ended()
    time = check(machine)
    assert await time.is_confirmed()
    time.clock.wall += 365 * DAY  # type: ignore[attr-defined]
    assert not any(await run_for(time, HOUR_S / 2))
    time.clock.wall -= 365 * DAY  # type: ignore[attr-defined]

    assert all(await run_for(time, HOUR_S))


async def test_a_clock_that_is_set_again_begins_another_hour(machine: Machine) -> None:
    machine.ended()
    time = check(machine)
    assert await time.is_confirmed()
    found: list[bool] = []
    for _ in range(3):
        time.clock.wall += 365 * DAY  # type: ignore[attr-defined]
        found += await run_for(time, HOUR_S)

    assert not any(found)


async def test_a_start_with_a_clock_far_ahead_is_not_believed_either(machine: Machine) -> None:
    machine.ended()
    machine.store.advance(HOUR_S)
    assert await check(machine).is_confirmed()

    machine.store.restart()
    machine.store.advance(2 * DAY_S)
    late = check(machine)

    assert await run_for(late, 2 * HOUR_S) == [False] * 6 + [True] * 6


async def test_a_time_that_was_confirmed_is_known_to_the_next_start(machine: Machine) -> None:
    """Otherwise a service without new runs would wait an hour after every start."""
    machine.ended()
    machine.store.advance(2 * DAY_S)
    await run_for(check(machine), 2 * HOUR_S)
    machine.store.restart()
    machine.store.advance(2 * HOUR_S)

    assert await check(machine).is_confirmed()


async def test_a_store_without_ended_runs_has_nothing_to_lose(machine: Machine) -> None:
    machine.store.waiting()
    machine.store.advance(1000 * DAY_S)

    assert await check(machine).is_confirmed()


async def test_a_regular_sweep_waits_until_the_time_is_confirmed(machine: Machine) -> None:
    machine.ended(2)
    machine.age(5 * DAY_S)
    sweep = machine.sweep(ended_runs=DAY_S)

    await sweep._step()
    assert machine.rows == ["1", "2"]
    await sweep.sweep()  # as an operator requests it

    assert machine.rows == []
