"""Stale trust entries are removed while the service runs, and failures are logged once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import structlog
from runrecovery_service.agents.trust_keeper import LEFT
from runrecovery_service.domain.reconciliation import TrustClearing, TrustRemoval
from runrecovery_service.execution import trust_sweep
from runrecovery_service.execution.trust_sweep import TrustSweep
from runrecovery_service.steady_thread_pool import SteadyThreadPool
from runrecovery_service.stop_signal import StopSignal

from .conftest import until


@dataclass
class FakeTrustKeeper:
    """A trust keeper whose files `stale` have stale entries; it fails for those in `broken`."""

    stale: list[str]
    broken: set[str] = field(default_factory=set)
    away: dict[str, tuple[str, ...]] = field(default_factory=dict)
    cleared: list[str] = field(default_factory=list)
    should_stop: Callable[[], bool] = bool

    def stale_files(self) -> list[str]:
        """See `TrustKeeper`."""
        return sorted(self.stale)

    def remove_stale_in(
        self, file: str, *, lock_wait_s: float, should_stop: Callable[[], bool]
    ) -> TrustClearing:
        """See `TrustKeeper`."""
        self.cleared.append(file)
        self.should_stop = should_stop
        if file in self.away:
            return TrustClearing(kept=self.away.pop(file))
        if file in self.broken:
            return TrustClearing(failures=(f"{file}: broken",))
        self.stale.remove(file)
        return TrustClearing(
            removals=(TrustRemoval(run_id="r", file=file, folder="/w", outcome="removed"),)
        )


@pytest.fixture
def sweep_of() -> Iterator[Callable[[FakeTrustKeeper], TrustSweep]]:
    """A function that creates sweeps with a fake keeper."""
    with SteadyThreadPool(1, "trust") as threads:

        def make(keeper: Any) -> TrustSweep:
            return TrustSweep(keeper=keeper, threads=threads, stop_signal=StopSignal())

        yield make


SweepOf = Callable[[FakeTrustKeeper], TrustSweep]


async def test_a_broken_file_is_retried_with_growing_pauses_and_logged_once(
    sweep_of: SweepOf,
) -> None:
    keeper = FakeTrustKeeper(stale=["/bad"], broken={"/bad"})
    sweep, now = sweep_of(keeper), [1000.0]
    sweep.time = lambda: now[0]
    looks = []

    with structlog.testing.capture_logs() as logged:
        for _ in range(300):
            before = len(keeper.cleared)
            await sweep.sweep()
            if len(keeper.cleared) > before:
                looks.append(now[0] - 1000.0)
            now[0] += 1.0

    assert looks == [0.0, 4.0, 12.0, 28.0, 60.0, 120.0, 180.0, 240.0]
    assert [line["event"] for line in logged] == ["trust.entry_kept"]


async def test_kept_entries_are_logged_and_delay_no_other_in_their_file(
    sweep_of: SweepOf,
) -> None:
    keeper = FakeTrustKeeper(stale=["/f"], away={"/f": ("one", "two", LEFT)})
    sweep = sweep_of(keeper)

    with structlog.testing.capture_logs() as logged:
        await sweep.sweep()
        await sweep.sweep()

    assert [line["reason"] for line in logged] == ["one", "two"]
    assert keeper.stale == []


async def test_a_stop_ends_the_edits_of_a_file(
    sweep_of: SweepOf,
) -> None:
    keeper = FakeTrustKeeper(stale=["/f"])
    sweep = sweep_of(keeper)
    await sweep.sweep()
    before = keeper.should_stop()

    await sweep.stop()

    assert (before, keeper.should_stop()) == (False, True)


async def test_a_broken_file_does_not_keep_others_from_being_cleared(
    sweep_of: SweepOf,
) -> None:
    keeper = FakeTrustKeeper(stale=["/bad", "/good"], broken={"/bad"})
    sweep = sweep_of(keeper)

    await sweep.sweep()
    keeper.stale.append("/later")
    await sweep.sweep()

    assert keeper.cleared == ["/bad", "/good", "/later"]
    assert keeper.stale == ["/bad"]


async def test_a_repaired_file_is_logged_again_when_it_breaks_again(
    sweep_of: SweepOf,
) -> None:
    keeper = FakeTrustKeeper(stale=["/f"], broken={"/f"})
    sweep = sweep_of(keeper)

    with structlog.testing.capture_logs() as logged:
        await sweep.sweep()
        keeper.stale.clear()  # someone else has removed the entry
        await sweep.sweep()
        keeper.stale.append("/f")
        await sweep.sweep()

    assert [line["event"] for line in logged] == ["trust.entry_kept"] * 2


async def test_the_sweep_continues_after_a_failure(
    sweep_of: SweepOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust_sweep, "SWEEP_INTERVAL_S", 0.01)
    keeper = FakeTrustKeeper(stale=["/f"])
    sweep, failures = sweep_of(keeper), iter(range(3))

    def fail_first() -> list[str]:
        if next(failures, None) is not None:
            raise MemoryError
        return list(keeper.stale)

    monkeypatch.setattr(keeper, "stale_files", fail_first)

    async def cleared() -> bool:
        return not keeper.stale

    with structlog.testing.capture_logs() as logged:
        sweep.start()
        await until(cleared)
        await sweep.stop()

    assert [line["event"] for line in logged] == ["trust.sweep_failed"]
