"""PostgreSQL fails in the middle of a takeover or a hand-over: no run is lost or decided twice.

Each error is raised once, by a trigger, for the third run that changes its owner.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pytest
from replicas.dead_instance import AGAIN, Pair, set_lease
from runrecovery_service.metric_counters import Meters
from runrecovery_service.recovery.hand_over import HandOver
from runrecovery_service.recovery.takeover import TakeoverLoop
from runrecovery_service.stop_signal import StopSignal
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.takeover import Takeover
from structlog.testing import capture_logs

RUNS: Final = 5
CONFLICTS: Final = {"serialization failure": "40001", "deadlock": "40P01"}
FAULTS: Final = {
    "lock timeout": "55P03",
    "statement timeout": "57014",
    "disk full": "53100",
    "out of memory": "53200",
    "role without rights": "42501",
    "read-only server": "25006",
    "server stops": "57P01",
}
FAIL_ONCE: Final = (
    "CREATE SEQUENCE moves",
    """CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      IF NEW.owner <> OLD.owner AND nextval('moves') = 3 THEN
        RAISE 'third' USING ERRCODE = '{code}';
      END IF;
      RETURN NEW; END $$""",
    """CREATE TRIGGER fail_once BEFORE UPDATE OF owner ON run FOR EACH ROW
      EXECUTE FUNCTION fail_once()""",
)


def fail_once(pair: Pair, code: str) -> None:
    """Raise this SQLSTATE once. This uses a sequence, whose number is not rolled back."""
    for statement in FAIL_ONCE:
        pair.dead.db.execute(statement.replace("{code}", code))


def failed(pair: Pair) -> bool:
    """Return whether the error was raised."""
    return bool(pair.dead.rows("SELECT last_value >= 3 FROM moves")[0][0])


@pytest.fixture
def storage(pair: Pair) -> Iterator[Storage]:
    made = Storage(pair.db)
    yield made
    made.close()


@pytest.mark.parametrize("fault", [*CONFLICTS, *FAULTS])
async def test_a_takeover_that_meets_an_error_is_completed_by_the_next_search(
    pair: Pair, storage: Storage, fault: str
) -> None:
    for _ in range(RUNS):
        pair.dead.running(**AGAIN)
    pair.keep_history()
    pair.expire()
    fail_once(pair, (CONFLICTS | FAULTS)[fault])
    loop = TakeoverLoop(
        storage=storage,
        rules=pair.rules,
        recovery=pair.recovery(Takeover(dead=pair.dead.owner, host_lost=False), batch_rows=2),
        engines=lambda: ("demo",),
        is_here=lambda _: False,
        on_taken=lambda: None,
        meters=Meters(),
        stop_signal=StopSignal(),
    )

    with capture_logs() as logs:
        await loop.search()
        await loop.search()

    assert failed(pair)
    assert [(owner, status) for _, owner, _, status in pair.owners()] == [("b", "QUEUED")] * RUNS
    assert pair.dead.rows("SELECT count(*) FROM recovery_event GROUP BY run") == [(1,)] * RUNS
    assert pair.stale_writes() == []
    searches = [line["event"] for line in logs if line["event"].startswith("takeover.")]
    assert searches[-1] == "takeover.completed"
    if fault in FAULTS:
        assert searches.count("takeover.failed") == 1


@pytest.mark.parametrize("fault", [*CONFLICTS, *FAULTS])
def test_a_hand_over_that_meets_an_error_leaves_each_run_with_one_owner(
    pair: Pair, fault: str
) -> None:
    runs = [pair.dead.create() for _ in range(RUNS)]
    set_lease(pair.dead.db, "a", 60_000_000)
    set_lease(pair.dead.db, "b", 60_000_000)
    pair.dead.db.execute("UPDATE instance SET engines = '[\"demo\"]', max_running = 4")
    pair.keep_history()
    fail_once(pair, (CONFLICTS | FAULTS)[fault])
    hand_over = HandOver(
        owner=pair.dead.owner, clock=pair.dead.ticking_clock, shares_workspaces=False
    )

    with capture_logs() as logs:
        hand_over.run(pair.dead.db)
    after_error = {owner for _, owner, _, _ in pair.owners()}
    hand_over.run(pair.dead.db)  # as after the decisions of the stop

    assert failed(pair)
    assert after_error == ({"b"} if fault in CONFLICTS else {"a"})
    events = [line["event"] for line in logs if line["event"].startswith("handover.")]
    assert events == ["handover.done" if fault in CONFLICTS else "handover.failed"]
    assert pair.owners() == [(run.key, "b", pair.owner.epoch, "QUEUED") for run in runs]
    assert pair.stale_writes() == []
