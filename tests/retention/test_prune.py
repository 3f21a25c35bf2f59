"""An operator prunes at once, or previews a prune."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from runrecovery_service.domain.retention import PruneResult, RetentionKind
from runrecovery_service.retention import prune as prune_module
from runrecovery_service.retention import sweep as sweep_module
from runrecovery_service.retention.prune import Pruner
from storage.service_store import receipt

from .conftest import DAY_S, Machine

POLICY: dict[str, Any] = {
    "ended_runs": 3 * DAY_S, "outputs": DAY_S, "workspaces": DAY_S, "events": DAY_S,
    "receipts": DAY_S, "reports": DAY_S,
}  # fmt: skip


def everything(machine: Machine) -> PruneResult:
    """Create old data of every kind, and return the counts that a prune removes."""
    machine.ended(3)
    machine.store.cancel(machine.store.create(with_receipt=receipt("old")))
    for _ in range(3):
        machine.store.open_report()
    machine.age(2.5 * DAY_S)
    kept = machine.ended(2)
    machine.age(1.5 * DAY_S)
    machine.store.cancel(machine.store.create(with_receipt=receipt("young")))
    return PruneResult(
        counts={
            RetentionKind.RUNS: 4, RetentionKind.OUTPUTS: 2, RetentionKind.WORKSPACES: 2,
            RetentionKind.EVENTS: 2, RetentionKind.RECEIPTS: 1, RetentionKind.REPORTS: 2,
        },
        sizes={
            RetentionKind.RUNS: 330, RetentionKind.OUTPUTS: 20, RetentionKind.WORKSPACES: 200
        },
        oldest_kept=kept[0].ended_at,
        done=True,
    )  # fmt: skip


def without_zeros(result: PruneResult) -> dict[str, Any]:
    """Return a result without zeros."""
    sizes = {kind: size for kind, size in result.sizes.items() if size}
    return {"counts": dict(result.counts), "sizes": sizes, "oldest": result.oldest_kept}


async def test_a_dry_run_says_what_a_prune_removes_and_removes_nothing(machine: Machine) -> None:
    expected = everything(machine)
    pruner = Pruner(sweep=machine.sweep(**POLICY))
    before = (machine.store.dump(), sorted(machine.runs.rglob("*")))

    asked = await pruner.prune(dry_run=True)
    assert (machine.store.dump(), sorted(machine.runs.rglob("*"))) == before
    removed = await pruner.prune(dry_run=False)

    assert without_zeros(asked) == without_zeros(removed) == without_zeros(expected)
    assert (asked.done, removed.done) == (True, True)
    assert without_zeros(await pruner.prune(dry_run=True))["counts"] == dict.fromkeys(
        expected.counts, 0
    )


async def test_a_dry_run_counts_the_folders_of_unknown_runs(machine: Machine) -> None:
    machine.ended(2)
    for name in ("1001", "1002", "20260101x"):
        (machine.runs / name).mkdir()

    pruned = await Pruner(sweep=machine.sweep(ended_runs=DAY_S)).prune(dry_run=True)

    assert pruned.unknown_folders == 2


async def test_a_kind_without_an_age_is_not_named(machine: Machine) -> None:
    machine.ended(2)
    machine.age(DAY_S)

    pruned = await Pruner(sweep=machine.sweep(max_ended_runs=1)).prune(dry_run=True)

    assert dict(pruned.counts) == {RetentionKind.RUNS: 1}


async def test_a_call_is_bounded_and_says_that_there_is_more(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "BATCH", 1)
    monkeypatch.setattr(prune_module, "PRUNE_S", 12.5)
    machine.ended(5)
    machine.age(DAY_S)
    seconds = iter(range(1000))
    monkeypatch.setattr(sweep_module, "monotonic", lambda: float(next(seconds)))
    pruner = Pruner(sweep=machine.sweep(ended_runs=60.0))

    found: list[PruneResult] = []
    while not found or not found[-1].done:
        found.append(await pruner.prune(dry_run=False))
        monkeypatch.setattr(prune_module, "PRUNE_S", 1000.0)

    assert [result.done for result in found] == [False, True]
    assert sum(result.counts[RetentionKind.RUNS] for result in found) == 5
    assert 0 < found[0].counts[RetentionKind.RUNS] < 5


async def test_a_prune_continues_when_its_caller_stops_waiting(machine: Machine) -> None:
    machine.ended(3)
    machine.age(DAY_S)
    sweep = machine.sweep(ended_runs=60.0)
    call = asyncio.create_task(Pruner(sweep=sweep).prune(dry_run=False))
    await asyncio.sleep(0)  # it begins
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    await sweep.stop()  # waits for it

    assert machine.rows in ([], ["1", "2", "3"])  # stopped between two batches
    assert set(machine.folders) <= set(machine.rows)
