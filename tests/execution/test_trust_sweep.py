"""What is left of trust entries is taken out while the service runs, and told of once."""

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
class Keeper:
    """Stands for the keeper: some files have something in them, and some of these are broken."""

    stale: list[str]
    broken: set[str] = field(default_factory=set)
    away: dict[str, tuple[str, ...]] = field(default_factory=dict)
    looked_at: list[str] = field(default_factory=list)
    should_stop: Callable[[], bool] = bool

    def stale_files(self) -> list[str]:
        """See `TrustKeeper`."""
        return sorted(self.stale)

    def remove_stale_in(
        self, file: str, *, lock_wait_s: float, should_stop: Callable[[], bool]
    ) -> TrustClearing:
        """See `TrustKeeper`."""
        self.looked_at.append(file)
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
def sweep_of() -> Iterator[Callable[[Keeper], TrustSweep]]:
    """Makes a sweep that asks this keeper."""
    with SteadyThreadPool(1, "trust") as threads:

        def make(keeper: Any) -> TrustSweep:
            return TrustSweep(keeper=keeper, threads=threads, stop_signal=StopSignal())

        yield make


SweepOf = Callable[[Keeper], TrustSweep]


async def test_a_broken_file_is_left_alone_for_longer_each_time_and_told_of_once(
    sweep_of: SweepOf,
) -> None:
    keeper = Keeper(stale=["/bad"], broken={"/bad"})
    sweep, now = sweep_of(keeper), [1000.0]
    sweep.time = lambda: now[0]
    looks = []

    with structlog.testing.capture_logs() as told:
        for _ in range(300):
            before = len(keeper.looked_at)
            await sweep.sweep()
            if len(keeper.looked_at) > before:
                looks.append(now[0] - 1000.0)
            now[0] += 1.0

    assert looks == [0.0, 4.0, 12.0, 28.0, 60.0, 120.0, 180.0, 240.0]
    assert [line["event"] for line in told] == ["trust.entry_kept"]


async def test_what_is_kept_is_told_and_delays_nothing_else_in_the_file(
    sweep_of: SweepOf,
) -> None:
    keeper = Keeper(stale=["/f"], away={"/f": ("one", "two", LEFT)})
    sweep = sweep_of(keeper)

    with structlog.testing.capture_logs() as told:
        await sweep.sweep()
        await sweep.sweep()

    assert [line["reason"] for line in told] == ["one", "two"]
    assert keeper.stale == []


async def test_a_stop_is_seen_between_edits_of_one_file(
    sweep_of: SweepOf,
) -> None:
    keeper = Keeper(stale=["/f"])
    sweep = sweep_of(keeper)
    await sweep.sweep()
    before = keeper.should_stop()

    await sweep.stop()

    assert (before, keeper.should_stop()) == (False, True)


async def test_a_broken_file_keeps_no_other_from_being_cleared(
    sweep_of: SweepOf,
) -> None:
    keeper = Keeper(stale=["/bad", "/good"], broken={"/bad"})
    sweep = sweep_of(keeper)

    await sweep.sweep()
    keeper.stale.append("/later")
    await sweep.sweep()

    assert keeper.looked_at == ["/bad", "/good", "/later"]
    assert keeper.stale == ["/bad"]


async def test_a_file_that_was_mended_is_told_of_again_when_it_breaks_again(
    sweep_of: SweepOf,
) -> None:
    keeper = Keeper(stale=["/f"], broken={"/f"})
    sweep = sweep_of(keeper)

    with structlog.testing.capture_logs() as told:
        await sweep.sweep()
        keeper.stale.clear()  # somebody else took it out
        await sweep.sweep()
        keeper.stale.append("/f")
        await sweep.sweep()

    assert [line["event"] for line in told] == ["trust.entry_kept"] * 2


async def test_it_goes_on_after_a_sweep_that_failed(
    sweep_of: SweepOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust_sweep, "SWEEP_INTERVAL_S", 0.01)
    keeper = Keeper(stale=["/f"])
    sweep, failures = sweep_of(keeper), iter(range(3))

    def fail_first() -> list[str]:
        if next(failures, None) is not None:
            raise MemoryError
        return list(keeper.stale)

    monkeypatch.setattr(keeper, "stale_files", fail_first)

    async def cleared() -> bool:
        return not keeper.stale

    with structlog.testing.capture_logs() as told:
        sweep.start()
        await until(cleared)
        await sweep.stop()

    assert [line["event"] for line in told] == ["trust.sweep_failed"]
