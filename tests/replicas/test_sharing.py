"""Queued runs move to idle instances and away from one that stops, and never have two owners."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any, Final

import pytest
from replicas.dead_instance import Pair, set_lease
from runrecovery_service.domain.errors import Fenced, StorageUnavailable
from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.domain.run import Profile, Run
from runrecovery_service.recovery.hand_over import HandOver
from runrecovery_service.storage import hand_over, instances, reports, work_stealing
from runrecovery_service.storage.hand_over import Peer, Spread, spread
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.work_stealing import Taker
from storage.service_store import Crash, ServiceStore, boot
from structlog.testing import capture_logs

ONE_DEADLOCK: Final = (
    "CREATE SEQUENCE moves",
    """CREATE FUNCTION fail_once() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
      IF nextval('moves') = 1 THEN RAISE 'first' USING ERRCODE = 'deadlock_detected'; END IF;
      RETURN NEW; END $$""",
    """CREATE TRIGGER fail_once BEFORE UPDATE OF owner ON run FOR EACH ROW
      EXECUTE FUNCTION fail_once()""",
)
"""The first move of a run to another owner is rolled back as by a deadlock. (A sequence is not.)"""


@pytest.fixture
def idle(pair: Pair) -> Pair:
    """Instance `a`, which lives and is busy, and `b`, which is idle."""
    set_lease(pair.dead.db, "a", 60_000_000)
    set_lease(pair.dead.db, "b", 60_000_000)
    pair.dead.db.execute("UPDATE instance SET engines = '[\"demo\"]', max_running = 4")
    return pair


def taker(pair: Pair, *, owner: Owner | None = None, **changes: Any) -> Taker:
    """Return how `b` takes runs."""
    given: dict[str, Any] = {"engines": ("demo",), "shares_workspaces": False} | changes
    return Taker(owner=owner or pair.owner, **given)


def take(pair: Pair, *, now: datetime | None = None, **changes: Any) -> str | None:
    """Search for a peer with a run to take, and take it."""
    wanted, now = taker(pair, **changes), now or pair.dead.now
    peer = work_stealing.find_peer(pair.db, wanted, now=now)
    if peer is None:
        return None
    return work_stealing.take_from(pair.db, wanted, peer, now=now, steady=pair.dead.steady)


def take_and_close(pair: Pair, *, now: datetime) -> str | None:
    """Take a run of a peer in a thread of its own."""
    try:
        return take(pair, now=now)
    finally:
        pair.db.close()


def late(pair: Pair, **changes: Any) -> Run:
    """Create a run of `a` that has been queued for longer than its owner has time for."""
    run = pair.dead.create(**changes)
    pair.dead.advance(2)
    return run


def owner_of(pair: Pair, run: Run) -> tuple[str, int]:
    now = pair.dead.get(run)
    return now.owner, now.owner_epoch


def stopping(pair: Pair, *, owner: Owner | None = None, shares_workspaces: bool = False) -> None:
    """Let an instance, `a` by default, hand over, as a planned stop does."""
    HandOver(
        owner=owner or pair.dead.owner,
        clock=pair.dead.ticking_clock,
        shares_workspaces=shares_workspaces,
    ).run(pair.dead.db)


# -- an idle instance takes ----------------------------------------------------------------------


def test_an_idle_instance_takes_the_run_that_waits_longest_and_starts_it(idle: Pair) -> None:
    idle.keep_history()
    first, second = late(idle), late(idle)

    assert take(idle) == first.run_id

    assert owner_of(idle, first) == ("b", idle.owner.epoch)
    assert owner_of(idle, second) == ("a", idle.dead.owner.epoch)
    turn = ServiceStore(db=idle.db, owner=idle.owner, now=idle.dead.now).take()
    assert turn is not None
    assert turn.run.run_id == first.run_id
    assert idle.stale_writes() == []


def test_a_run_that_has_moved_has_been_in_the_queue_since_its_create(idle: Pair) -> None:
    taken = late(idle)
    assert take(idle) == taken.run_id
    handed = idle.dead.create()
    stopping(idle)

    turns = [idle.dead.take(owner=idle.owner) for _ in range(2)]

    assert [turn and (turn.run.key, turn.queued_at) for turn in turns] == [
        (taken.key, taken.created_at),
        (handed.key, handed.created_at),
    ]


def test_a_run_is_left_to_its_owner_at_first(idle: Pair) -> None:
    idle.dead.create()

    assert work_stealing.find_peer(idle.db, taker(idle), now=idle.dead.now) is None


@pytest.mark.parametrize("ahead_s", [-3600, -600, -2.5, -1.5, -0.5, 0, 0.5, 1.5, 600, 3600])
def test_a_run_is_left_to_its_owner_for_two_seconds_at_most_whatever_clock_a_peer_has(
    idle: Pair, ahead_s: float
) -> None:
    idle.dead.create()
    clock = idle.dead.now + timedelta(seconds=ahead_s)

    searches = [
        work_stealing.find_peer(idle.db, taker(idle), now=clock + timedelta(seconds=0.5 * number))
        for number in range(5)
    ]

    assert "a" in searches


@pytest.mark.parametrize(
    "spoil",
    [
        "UPDATE run SET status = 'RUNNING'",
        "UPDATE run SET recovery_state = 'QUARANTINED'",
        "UPDATE run SET engine = 'other'",
        "UPDATE run SET restart_policy = 'NEWER'",
        "UPDATE run SET owner_epoch = owner_epoch - 1",
        "UPDATE run SET resume_due_us = 1",
        "UPDATE run SET interrupted_at = 1, session_value = 'secret'",
        "UPDATE instance SET lease_until = 1 WHERE name = 'a'",
        "UPDATE instance SET taken_over_by = 'c', stopped_at = 1 WHERE name = 'a'",
    ],
)
def test_only_runs_that_can_start_here_are_taken_from_a_peer_that_gives_them(
    idle: Pair, spoil: str
) -> None:
    run = late(idle)
    idle.dead.db.execute(spoil)

    assert take(idle) is None
    # Also when the peer was found before that.
    moved = work_stealing.take_from(
        idle.db, taker(idle), "a", now=idle.dead.now, steady=idle.dead.steady
    )
    assert moved is None
    assert idle.dead.rows("SELECT owner FROM run") == [("a",)]
    assert run.owner == "a"


def test_a_run_is_not_taken_while_an_earlier_process_of_it_may_live(idle: Pair) -> None:
    turn = idle.dead.running()
    idle.dead.advance(2)
    idle.dead.db.execute("UPDATE run SET status = 'QUEUED'")
    assert take(idle) is None

    idle.dead.db.execute("UPDATE process_lease SET state = 'CLOSED'")
    assert take(idle) == turn.run.run_id


def test_an_accepted_reply_moves_only_where_workspaces_are_shared(idle: Pair) -> None:
    run = idle.dead.reply(idle.dead.waiting())
    idle.dead.advance(2)

    assert take(idle) is None
    assert take(idle, shares_workspaces=True) == run.run_id


def test_runs_that_cannot_be_taken_do_not_hide_those_behind_them(idle: Pair) -> None:
    for _ in range(3):
        late(idle, engine="other")
    run = late(idle)

    assert take(idle) == run.run_id


def test_the_queue_of_a_stopped_peer_is_taken_at_once(idle: Pair) -> None:
    run = idle.dead.create()
    instances.resign(idle.dead.db, idle.dead.owner)

    assert take(idle) == run.run_id


def test_a_taken_run_keeps_the_time_that_is_left_until_its_deadline(idle: Pair) -> None:
    run = late(idle)
    idle.dead.db.execute(
        "UPDATE run SET run_deadline_at = ?, run_due_us = 5, due_clock = 'of a'",
        (round(idle.dead.due_in(30).at.timestamp() * 1e6),),
    )

    assert take(idle) == run.run_id

    assert idle.dead.rows("SELECT run_due_us, due_clock FROM run") == [
        (idle.dead.steady_us + 30_000_000, "boot-1")
    ]


def test_events_that_are_not_delivered_move_with_the_run(idle: Pair) -> None:
    run, stays = late(idle), late(idle)
    for one in (run, stays):
        idle.dead.db.execute(
            "INSERT INTO webhook_delivery (webhook, instance, run, run_id, engine, sequence, event,"
            " status, created_at) VALUES ('w', 'a', ?, ?, 'demo', 1, 'CREATED', 'QUEUED', 1)",
            (one.key, one.run_id),
        )

    take(idle)

    assert idle.dead.rows("SELECT run, instance FROM webhook_delivery ORDER BY run") == [
        (run.key, "b"),
        (stays.key, "a"),
    ]


def test_a_fenced_instance_takes_nothing(idle: Pair) -> None:
    late(idle)
    instances.claim(idle.dead.db, boot("b"), now=idle.dead.tick())

    with pytest.raises(Fenced):
        take(idle)

    assert idle.dead.rows("SELECT owner FROM run") == [("a",)]


def test_a_run_that_several_instances_want_gets_one_owner_and_none_is_lost(idle: Pair) -> None:
    runs, takers = 60, 4
    for _ in range(runs):
        late(idle)
    idle.keep_history()
    now = idle.dead.now  # the clock of the test moves on with every start
    rivals = [idle, *(idle.third(f"rival-{number}") for number in range(takers - 1))]
    for rival in rivals:
        set_lease(idle.dead.db, rival.owner.instance, 60_000_000)

    def take_all(rival: Pair) -> list[str]:
        taken = []
        while work_stealing.find_peer(rival.db, taker(rival), now=now) is not None:
            run_id = take(rival, now=now)  # None: all that it found were locked by others
            taken += [] if run_id is None else [run_id]
        rival.db.close()
        return taken

    def start_all() -> list[str]:
        started = []
        while (turn := idle.dead.take()) is not None:
            started.append(turn.run.run_id)
        idle.dead.db.close()
        return started

    with ThreadPoolExecutor(takers + 1) as threads:
        started = threads.submit(start_all)
        taken = [threads.submit(take_all, rival) for rival in rivals]
        names = [*started.result(), *(name for one in taken for name in one.result())]

    assert sorted(names) == sorted(set(names))
    assert len(names) == runs
    moves = idle.dead.rows(
        "SELECT run, count(*) FROM owner_history WHERE owner_before <> owner_after GROUP BY run"
    )
    assert all(count <= takers for _, count in moves)


# -- an instance that stops hands over -----------------------------------------------------------


def test_a_stop_hands_queued_runs_over_to_a_peer_that_knows_the_engine(idle: Pair) -> None:
    run, foreign = idle.dead.create(), idle.dead.create(engine="other")

    with capture_logs() as logs:
        stopping(idle)

    assert owner_of(idle, run) == ("b", idle.owner.epoch)
    assert owner_of(idle, foreign) == ("a", idle.dead.owner.epoch)
    assert [(line["event"], line["runs"], line["peers"]) for line in logs] == [
        ("handover.done", 1, {"b": 1})
    ]


def test_a_run_that_is_being_handed_over_is_not_taken_from_the_stopping_instance_too(
    idle: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, third = late(idle), idle.third()
    set_lease(idle.dead.db, "c", 60_000_000)
    taken: list[str | None] = []

    def take_meanwhile(*given: Any) -> Spread:
        with ThreadPoolExecutor(1) as other:
            taken.append(other.submit(take_and_close, third, now=idle.dead.now).result())
        return spread(*given)

    idle.dead.db.execute("UPDATE instance SET engines = '[]' WHERE name = 'c'")
    monkeypatch.setattr(hand_over, "spread", take_meanwhile)

    stopping(idle)

    assert taken == [None]
    assert owner_of(idle, run) == ("b", idle.owner.epoch)


def test_a_stop_keeps_its_runs_where_no_peer_lives(idle: Pair) -> None:
    run = idle.dead.create()
    set_lease(idle.dead.db, "b", -1)

    stopping(idle)

    assert owner_of(idle, run) == ("a", idle.dead.owner.epoch)


def test_a_stop_hands_nothing_over_to_a_peer_that_stops_too(idle: Pair) -> None:
    stopping(idle, owner=idle.owner)
    run = idle.dead.create()

    stopping(idle)

    assert owner_of(idle, run) == ("a", idle.dead.owner.epoch)


def test_a_stop_hands_nothing_over_to_a_peer_in_safe_mode(idle: Pair) -> None:
    run = idle.dead.create()
    reports.open_report(
        idle.db,
        idle.owner,
        reconciliation_id="of b",
        cause=Cause.STARTUP,
        safe_mode=True,
        now=idle.dead.tick(),
    )

    stopping(idle)
    assert owner_of(idle, run) == ("a", idle.dead.owner.epoch)

    set_lease(idle.dead.db, "b", -1)
    again = instances.claim(idle.dead.db, boot("b"), now=idle.dead.tick())  # a normal start
    idle.dead.db.execute("UPDATE instance SET engines = '[\"demo\"]' WHERE name = 'b'")
    stopping(idle)
    assert owner_of(idle, run) == ("b", again.epoch)


def test_waiting_runs_are_handed_over_only_where_workspaces_are_shared(idle: Pair) -> None:
    waiting = idle.dead.waiting(require_user_reply=False)
    sticky = idle.dead.waiting(profile=Profile.STICKY_PROCESS)
    idle.keep_history()

    stopping(idle)
    assert owner_of(idle, waiting)[0] == "a"

    stopping(idle, shares_workspaces=True)
    assert owner_of(idle, waiting) == ("b", idle.owner.epoch)
    assert owner_of(idle, sticky)[0] == "a"  # its process ends with the stop
    assert idle.stale_writes() == []
    # The peer does not know this host's clock, so it sets the deadline anew.
    deadlines = "SELECT wait_due_us, due_clock FROM run WHERE id = ?"
    assert idle.dead.rows(deadlines.replace("?", str(waiting.key))) == [(0, None)]


def test_a_stop_hands_over_every_page_and_spreads_it_by_free_slots(idle: Pair) -> None:
    for _ in range(7):
        idle.dead.create(engine="other")
    for _ in range(9):
        idle.dead.create()
    third = idle.third()
    set_lease(idle.dead.db, "c", 60_000_000)
    idle.dead.db.execute(
        "UPDATE instance SET engines = '[\"demo\"]', max_running = 2 WHERE name = 'c'"
    )

    handed = hand_over.hand_over(
        idle.dead.db, idle.dead.owner, shares_workspaces=False, now=idle.dead.now, rows=2
    )

    assert handed == {"b": 6, "c": 3}
    assert idle.dead.rows("SELECT owner, count(*) FROM run GROUP BY owner ORDER BY owner") == [
        ("a", 7),
        ("b", 6),
        ("c", 3),
    ]
    assert third.owner.instance == "c"


def test_a_peer_that_starts_again_meanwhile_gets_nothing_under_its_old_epoch(
    idle: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = idle.dead.create()
    seen = hand_over.living_peers(idle.dead.db, idle.dead.owner)
    assert [(peer.name, peer.epoch) for peer in seen] == [("b", idle.owner.epoch)]
    set_lease(idle.dead.db, "b", -1)
    instances.claim(idle.dead.db, boot("b"), now=idle.dead.tick())
    monkeypatch.setattr(hand_over, "living_peers", lambda *_: seen)

    handed = hand_over.hand_over(
        idle.dead.db, idle.dead.owner, shares_workspaces=False, now=idle.dead.now
    )
    assert handed == {}

    assert owner_of(idle, run) == ("a", idle.dead.owner.epoch)


def test_a_hand_over_that_fails_prevents_no_stop_but_a_fenced_one_does(
    idle: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(error: Exception) -> Callable[..., None]:
        def raise_it(*_: object, **__: object) -> None:
            raise error

        return raise_it

    idle.dead.create()
    monkeypatch.setattr(hand_over, "hand_over", fail(Crash()))
    with capture_logs() as logs:
        stopping(idle)
    (line,) = logs
    assert (line["event"], line["log_level"], line["exc_info"]) == (
        "handover.failed",
        "error",
        True,
    )

    monkeypatch.setattr(hand_over, "hand_over", fail(StorageUnavailable()))
    with capture_logs() as logs:
        stopping(idle)
    (line,) = logs
    assert (line["log_level"], line["exc_info"]) == ("error", False)

    monkeypatch.setattr(hand_over, "hand_over", fail(Fenced("a")))
    with pytest.raises(Fenced):
        stopping(idle)


def test_a_conflict_with_another_transaction_does_not_end_a_hand_over(idle: Pair) -> None:
    run = idle.dead.create()
    for statement in ONE_DEADLOCK:
        idle.dead.db.execute(statement)

    stopping(idle)

    assert idle.dead.rows("SELECT last_value FROM moves") == [(2,)]
    assert owner_of(idle, run) == ("b", idle.owner.epoch)


def test_the_least_busy_peer_that_has_the_engine_gets_the_next_run() -> None:
    peers = [
        Peer(name="large", epoch=1, engines=frozenset({"x"}), slots=4, load=4),
        Peer(name="small", epoch=1, engines=frozenset({"x", "y"}), slots=1, load=0),
    ]

    result = hand_over.spread([(1, "x"), (2, "x"), (3, "y"), (5, "z")], peers)

    assert result.keys == {"small": [1, 3], "large": [2]}
    assert result.after == 5
    assert [peer.load for peer in peers] == [5, 2]


def test_the_load_of_peers_is_counted_in_the_index_of_live_runs(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, tuple[Any, ...]]] = []

    def note(sql: str, params: tuple[Any, ...]) -> list[tuple[Any, ...]]:
        asked.append((sql, params))
        return []

    monkeypatch.setattr(pair.db, "fetch_all", note)
    hand_over.living_peers(pair.db, pair.owner)
    monkeypatch.undo()

    (sql, params), *_ = asked
    with pair.db.transaction():
        pair.db.execute("SET LOCAL enable_seqscan = off")
        plan = "\n".join(line for (line,) in pair.db.fetch_all(f"EXPLAIN {sql}", params))

    assert "run_live" in plan
