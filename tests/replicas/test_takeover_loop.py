"""The loop that takes over dead instances: one failure delays no other takeover."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from replicas.dead_instance import Pair, deliver, set_lease
from runrecovery_service.domain.errors import StorageBusy
from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.metric_counters import Meters
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.recovery.takeover import TakeoverLoop
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage import instances, newer_words
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.takeover import Takeover
from storage.service_store import Crash, boot
from structlog.testing import capture_logs
from support.recovery import FakeLaunchEnder

AGAIN: dict[str, Any] = {"restart_policy": "REQUEUE", "max_attempts": 2}


@pytest.fixture
async def new_loop(pair: Pair) -> AsyncIterator[Callable[..., TakeoverLoop]]:
    """Make loops of the successor."""
    storage = Storage(pair.db)

    def make(*, engines: tuple[str, ...] = ("demo",), **changes: Any) -> TakeoverLoop:
        template = pair.recovery(Takeover(dead=pair.dead.owner, host_lost=False), **changes)
        assert template.cause is Cause.TAKEOVER
        return TakeoverLoop(
            storage=storage,
            rules=pair.rules,
            recovery=template,
            engines=lambda: engines,
            is_here=lambda _: True,
            on_taken=lambda: taken.append(True),
            meters=Meters(),
            stop_signal=StopSignal(),
        )

    taken: list[bool] = []
    yield make
    storage.close()


def owners(pair: Pair) -> list[str]:
    """Return the owner of each run."""
    return [owner for (owner,) in pair.dead.rows("SELECT owner FROM run ORDER BY id")]


async def test_the_failure_of_one_takeover_is_counted_and_delays_no_other(
    pair: Pair, new_loop: Callable[..., TakeoverLoop]
) -> None:
    def crash(_: object) -> Any:
        raise Crash

    pair.dead.running()  # its launch is to be ended, which fails
    other = instances.claim(pair.dead.db, boot("d"), now=pair.dead.now)
    pair.dead.create(owner=other)
    pair.expire()
    set_lease(pair.dead.db, "d", -1)
    loop = new_loop(launches=FakeLaunchEnder(crash))

    with capture_logs() as logs:
        await loop.search()

    assert owners(pair) == ["a", "b"]
    assert loop.meters.takeovers.values == {
        ("completed",): 1, ("failed",): 1, ("fenced",): 0,
    }  # fmt: skip
    assert loop.meters.takeover_runs.values == {("queued_interrupted",): 1}
    failed = [one for one in logs if one["event"] == "takeover.failed"]
    assert [(one["recovered_instance"], one["error"]) for one in failed] == [("a", "Crash")]


async def test_an_instance_with_an_unknown_engine_is_left_to_another_and_logged_once(
    pair: Pair, new_loop: Callable[..., TakeoverLoop]
) -> None:
    pair.dead.create(engine="other")
    pair.expire()
    loop = new_loop()

    with capture_logs() as logs:
        await loop.search()
        await loop.search()

    refused = [one for one in logs if one["event"] == "takeover.refused"]
    assert [one["engines"] for one in refused] == [["other"]]
    assert owners(pair) == ["a"]
    await new_loop(engines=("demo", "other")).search()
    assert owners(pair) == ["b"]


async def test_a_refusal_after_a_time_without_one_is_logged_again(
    pair: Pair, new_loop: Callable[..., TakeoverLoop]
) -> None:
    pair.dead.create(engine="other")
    pair.expire()
    loop = new_loop()

    with capture_logs() as logs:
        await loop._can_decide("a")
        loop.engines = lambda: ("demo", "other")
        await loop._can_decide("a")
        loop.engines = lambda: ("demo",)
        await loop._can_decide("a")

    assert [one["event"] for one in logs] == ["takeover.refused"] * 2


async def test_a_service_that_is_to_stop_takes_nothing_over(
    pair: Pair, new_loop: Callable[..., TakeoverLoop]
) -> None:
    pair.dead.create()
    pair.expire()
    loop = new_loop()
    loop.stop_signal.request()

    await loop.search()

    assert owners(pair) == ["a"]


async def test_a_takeover_that_is_fenced_is_counted_and_the_service_goes_on(
    pair: Pair, new_loop: Callable[..., TakeoverLoop]
) -> None:
    def restart(launches: Any) -> Any:
        pair.dead.restart()
        return {one.key: Ending(found=0, ended=0, gone=True) for one in launches}

    pair.dead.running()
    pair.expire()
    loop = new_loop(launches=FakeLaunchEnder(restart))

    await loop.search()

    assert loop.meters.takeovers.values[("fenced",)] == 1
    assert loop.stop_signal.failure is None
    assert pair.dead.rows("SELECT state FROM reconciliation") == [("FAILED",)]


async def test_runs_that_only_a_newer_version_can_read_are_left_to_it(
    pair: Pair, new_loop: Callable[..., TakeoverLoop], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(newer_words, "is_newer", lambda _: True)
    pair.dead.set(pair.dead.create(), status="PAUSED")
    pair.dead.create()
    pair.expire()

    await new_loop().search()

    assert owners(pair) == ["a", "a"]


async def test_deliveries_that_cannot_be_taken_delay_no_takeover(
    pair: Pair, new_loop: Callable[..., TakeoverLoop]
) -> None:
    run = pair.dead.waiting()
    pair.expire()
    pair.take_over()
    deliver(pair, run, 1)
    other = instances.claim(pair.dead.db, boot("d"), now=pair.dead.now)
    pair.dead.create(owner=other)
    set_lease(pair.dead.db, "d", -1)
    for statement in (
        """CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
          IF OLD.instance = 'a' THEN RAISE 'no' USING ERRCODE = 'lock_not_available'; END IF;
          RETURN NEW; END $$""",
        """CREATE TRIGGER refuse BEFORE UPDATE ON webhook_delivery FOR EACH ROW
          EXECUTE FUNCTION refuse()""",
    ):
        pair.dead.db.execute(statement)

    with pytest.raises(StorageBusy):
        await new_loop().search()

    assert owners(pair) == ["a", "b"]
