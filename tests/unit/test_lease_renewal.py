"""When the lease is renewed, and how long a renewal may take."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.execution.lease_deadline import TreeDeadline
from runrecovery_service.lease_renewal import LeaseRenewal
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage.instances import Owner

OWNER = Owner("default", 1, "t")
DEMO_ENGINES: Any = SimpleNamespace(names=("demo", "other"))
NO_TURNS: Any = SimpleNamespace(tree_deadline=TreeDeadline(0))


def renewal_with(
    storage: Any, *, catalog: Any = DEMO_ENGINES, turns: Any = NO_TURNS, health: Any = None
) -> LeaseRenewal:
    """Return the renewal of a lease of 15 s."""
    return LeaseRenewal(
        lease_ttl_s=15.0,
        storage=storage,
        owner=OWNER,
        catalog=catalog,
        turns=turns,
        health=health,
        stop=StopSignal(),
        note=None,
    )


@pytest.mark.parametrize("is_shared", [True, False], ids=["PostgreSQL", "SQLite"])
async def test_the_lease_is_renewed_and_trees_live_on_five_times_in_its_time(
    *, is_shared: bool
) -> None:
    storage: Any = SimpleNamespace(is_shared=is_shared)
    renewal = renewal_with(storage)

    pauses = {task.name: task.interval_s for task in renewal.tasks()}

    assert pauses == ({"lease-renewal": 3.0} | ({} if is_shared else {"tree-deadline": 3.0}))


@pytest.mark.parametrize("unrenewed_s", [0.0, 15.0])
async def test_on_sqlite_a_slow_renewal_succeeds_however_late_it_is(unrenewed_s: float) -> None:
    noted: list[tuple[str, bool]] = []

    async def renew_on_a_slow_disk(*_: object, **__: object) -> None:
        await asyncio.sleep(0.3)

    storage: Any = SimpleNamespace(is_shared=False, renew=renew_on_a_slow_disk)
    health: Any = SimpleNamespace(note=lambda part, *, answers: noted.append((part, answers)))
    renewal = renewal_with(storage, health=health)
    renewal._renewed_s = boot_time_ns() / 1e9 - unrenewed_s

    await renewal.renew()

    assert noted == [("lease", True)]


async def test_each_renewal_tells_the_engines_that_are_configured_now() -> None:
    told: list[object] = []

    async def renew(*_: object, engines: object, **__: object) -> None:
        told.append(engines)

    catalog: Any = SimpleNamespace(names=("demo",))
    storage: Any = SimpleNamespace(is_shared=False, renew=renew)
    health: Any = SimpleNamespace(note=lambda *_, **__: None)
    renewal = renewal_with(storage, catalog=catalog, health=health)
    await renewal.renew()
    catalog.names = ("demo", "another")  # a reload

    await renewal.renew()

    assert told == [("demo",), ("demo", "another")]


async def test_trees_live_by_the_start_of_a_renewal_and_not_by_its_answer() -> None:
    """The database counts the lease from a moment between the two."""
    seconds = [100]
    heartbeats: list[int] = []

    async def renew(*_: object, **__: object) -> None:
        seconds[0] += 4

    storage: Any = SimpleNamespace(is_shared=True, renew=renew)
    deadline = TreeDeadline(0, now_ns=lambda: seconds[0] * 10**9)
    turns: Any = SimpleNamespace(heartbeat=heartbeats.append, tree_deadline=deadline)
    health: Any = SimpleNamespace(note=lambda *_, **__: None)
    renewal = renewal_with(storage, turns=turns, health=health)

    await renewal.renew()

    assert heartbeats == [114 * 10**9]
    assert renewal.left_s == 11.0


async def test_a_failed_renewal_is_repeated_early_and_a_success_ends_the_outage() -> None:
    """A planned stop gives its decisions up while the outage lasts."""
    seconds, fails = [100], [True]

    async def renew(*_: object, **__: object) -> None:
        if fails[0]:
            raise StorageUnavailable

    storage: Any = SimpleNamespace(is_shared=False, renew=renew)
    deadline = TreeDeadline(0, now_ns=lambda: seconds[0] * 10**9)
    turns: Any = SimpleNamespace(tree_deadline=deadline)
    health: Any = SimpleNamespace(note=lambda *_, **__: None)
    renewal = renewal_with(storage, turns=turns, health=health)

    async def try_at(second: int) -> tuple[float | None, bool]:
        seconds[0] = second
        return await renewal.renew(), renewal.unrenewed.is_set()

    assert await try_at(110) == (1.0, False)
    assert await try_at(111) == (1.0, True)
    fails[0] = False
    assert await try_at(112) == (None, False)
