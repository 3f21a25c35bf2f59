"""A turn writes only its own run, even if lost commits have given the run's key to another run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from runrecovery_service.domain.errors import Fenced, RunGone
from runrecovery_service.domain.run import Profile, RunError, Session
from runrecovery_service.domain.turn import Asked, Failed, Interrupted, Succeeded, TurnEnd
from runrecovery_service.storage import launch_records, trust, turn_ends, turn_starts, turns
from runrecovery_service.storage.trust import TrustEntry
from runrecovery_service.storage.turns import Turn
from storage.service_store import GONE, QUESTION, ServiceStore

ROWS = ("run_event", "run_label", "interaction", "process_lease", "run")


def give_key_away(store: ServiceStore, turn: Turn) -> None:
    """Delete the run and its launch, and give their keys to a run and launch of another caller."""
    other = store.running(profile=Profile.STICKY_PROCESS, run_id="of another caller")
    with store.db.transaction():
        for table in ROWS:
            column = "id" if table == "run" else "run"
            store.db.execute(f"DELETE FROM {table} WHERE {column} = ?", (turn.run.key,))  # noqa: S608
        for table in reversed(ROWS):
            column = "id" if table == "run" else "run"
            store.db.execute(
                f"UPDATE {table} SET {column} = ? WHERE {column} = ?",  # noqa: S608
                (turn.run.key, other.run.key),
            )
        store.db.execute(
            "UPDATE process_lease SET id = ? WHERE id = ?", (turn.launch.key, other.launch.key)
        )


def lose(store: ServiceStore, turn: Turn) -> None:
    with store.db.transaction():
        for table in ROWS:
            column = "id" if table == "run" else "run"
            store.db.execute(f"DELETE FROM {table} WHERE {column} = ?", (turn.run.key,))  # noqa: S608


def create_again(store: ServiceStore, turn: Turn) -> None:
    """Delete the run, and let its caller create it again by the same request."""
    lose(store, turn)
    again = store.running(profile=Profile.STICKY_PROCESS, run_id=turn.run.run_id)
    assert (again.run.key, again.run.attempt) == (again.launch.run_key, 1)
    store.set(again.run, id=turn.run.key)
    store.db.execute("UPDATE process_lease SET run = ?", (turn.run.key,))


LOSSES = [give_key_away, lose, create_again]
ENDS: list[TurnEnd] = [
    Asked(QUESTION),
    Succeeded({"x": 1}),
    Failed(RunError(code="ENGINE_FAILED", message="broke")),
    Interrupted("The service stood still."),
]


@pytest.mark.parametrize("happens", LOSSES)
def test_a_turn_whose_run_was_lost_writes_nothing(
    store: ServiceStore, happens: Callable[[ServiceStore, Turn], None]
) -> None:
    turn = store.running(profile=Profile.STICKY_PROCESS)
    happens(store, turn)
    before = store.dump()
    owner, now, due = store.owner, store.now, store.due_in(1)
    session = Session(type="demo", handle="h", turn=1)
    writes: list[Callable[[], object]] = [
        partial(turns.record_session, store.db, turn, owner=owner, session=session, now=now),
        partial(turns.record_delivered, store.db, turn, owner=owner, number=1),
        partial(
            turns.record_sticky_question, store.db, turn, owner=owner, number=1, question=QUESTION,
            due=due, now=now,
        ),
        partial(
            launch_records.record_gated, store.db, turn.launch, owner=owner, pid=1, start_ticks=1
        ),
        partial(launch_records.record_running, store.db, turn.launch, owner=owner),
        *(
            partial(
                turn_ends.record_end, store.db, turn, owner=owner, end=end, ended=GONE, due=due,
                due_in=store.due_in, now=now,
            )
            for end in ENDS
        ),
    ]  # fmt: skip

    for write in writes:
        with pytest.raises(RunGone) as gone:
            write()
        assert str(gone.value).startswith("the database no longer has ")
        assert str(gone.value).endswith("; it lost a commit")

    assert before == store.dump()


@pytest.mark.parametrize("happens", LOSSES)
def test_the_end_of_a_lost_launch_is_recorded_for_no_other_launch(
    store: ServiceStore, happens: Callable[[ServiceStore, Turn], None]
) -> None:
    turn = store.running(profile=Profile.STICKY_PROCESS)
    happens(store, turn)
    store.db.execute("UPDATE process_lease SET state = 'CLOSED'")
    before = store.dump()

    launch_records.close(store.db, turn.launch, GONE, now=store.now)
    launch_records.record_late_end(store.db, [(turn.launch, GONE)], now=store.now)
    launch_records.close_all(store.db, [(turn.launch, GONE)], now=store.now, reconciliation_key=9)

    assert before == store.dump()
    assert not launch_records.is_over(store.db, turn.launch)


@pytest.mark.parametrize("happens", [give_key_away, lose])
def test_a_turn_whose_run_was_lost_records_no_trust_entry(
    store: ServiceStore, happens: Callable[[ServiceStore, Turn], None]
) -> None:
    turn = store.running(profile=Profile.STICKY_PROCESS)
    happens(store, turn)
    entry = TrustEntry(
        file="/f", folder="/d", place="p", cli="codex", run_key=turn.run.key,
        run_id=turn.run.run_id, attempt=1, added="{}",
    )  # fmt: skip

    with pytest.raises(Fenced):
        trust.record_entry(store.db, entry, host_id="host", owner=store.owner, now=store.now)

    assert store.rows("SELECT count(*) FROM trust_entry") == [(0,)]


def test_a_trust_entry_is_found_by_the_run_that_has_it(store: ServiceStore) -> None:
    turn = store.running(profile=Profile.STICKY_PROCESS)
    entry = TrustEntry(
        file="/f", folder="/d", place="p", cli="codex", run_key=turn.run.key,
        run_id=turn.run.run_id, attempt=1, added="{}",
    )  # fmt: skip
    trust.record_entry(store.db, entry, host_id="host", owner=store.owner, now=store.now)
    store.set(turn.run, run_id="of another caller")

    found = [
        [one.folder for one in trust.entries_of_run(store.db, "host", run_id, owner=store.owner)]
        for run_id in (turn.run.run_id, "of another caller")
    ]

    assert found == [[], ["/d"]]


def test_a_supervised_launch_is_identified_by_its_cookie_when_lost_takes_are_undone(
    store: ServiceStore,
) -> None:
    followed = store.running()
    give_key_away(store, followed)

    count = turn_starts.requeue_unlaunched(
        store.db, owner=store.owner, held=[followed.launch.cookie], now=store.now
    )

    assert count == 1
    assert store.rows("SELECT run_id, status FROM run") == [("of another caller", "QUEUED")]


def test_a_take_that_is_undone_counts_neither_as_an_attempt_nor_as_a_turn(
    store: ServiceStore,
) -> None:
    store.running()
    turn_starts.requeue_unlaunched(store.db, owner=store.owner, held=[], now=store.tick())

    assert store.rows("SELECT status, attempt, turn FROM run") == [("QUEUED", 0, 0)]


def test_a_canceled_run_is_not_queued_again_when_its_lost_take_is_undone(
    store: ServiceStore,
) -> None:
    turn = store.running()
    store.cancel(turn.run)

    count = turn_starts.requeue_unlaunched(store.db, owner=store.owner, held=[], now=store.now)

    assert count == 1
    assert store.rows("SELECT status FROM run") == [("CANCELED",)]
    assert store.rows("SELECT kind FROM run_event ORDER BY no DESC LIMIT 1") == [("CANCELED",)]
    assert store.rows("SELECT count(*) FROM process_lease") == [(0,)]


def test_a_run_whose_claim_was_lost_is_not_reported_as_superseded(store: ServiceStore) -> None:
    store.restart()
    turn = store.running()
    store.set(turn.run, owner_epoch=1)

    with pytest.raises(RunGone, match="this start's claim of run 'run-0001'"):
        turns.current_run(store.db, turn, owner=store.owner)
