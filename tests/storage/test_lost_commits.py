"""Where commits were lost, integer keys belong to others: a turn writes by what stays its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from runrecovery_service.domain.errors import Fenced, RunGone
from runrecovery_service.domain.run import Profile, RunError, Session
from runrecovery_service.domain.turn import Asked, Failed, Interrupted, Succeeded, TurnEnd
from runrecovery_service.storage import launch_records, trust, turns
from runrecovery_service.storage.trust import TrustEntry
from runrecovery_service.storage.turns import Turn

from .conftest import GONE, QUESTION, World

ROWS = ("run_event", "run_label", "interaction", "process_lease", "run")


def give_key_away(world: World, turn: Turn) -> None:
    """Lose the run and its launch, and give their keys to those of another caller."""
    other = world.running(profile=Profile.STICKY_PROCESS, run_id="of another caller")
    with world.db.transaction():
        for table in ROWS:
            column = "id" if table == "run" else "run"
            world.db.execute(f"DELETE FROM {table} WHERE {column} = ?", (turn.run.key,))  # noqa: S608
        for table in reversed(ROWS):
            column = "id" if table == "run" else "run"
            world.db.execute(
                f"UPDATE {table} SET {column} = ? WHERE {column} = ?",  # noqa: S608
                (turn.run.key, other.run.key),
            )
        world.db.execute(
            "UPDATE process_lease SET id = ? WHERE id = ?", (turn.launch.key, other.launch.key)
        )


def lose(world: World, turn: Turn) -> None:
    with world.db.transaction():
        for table in ROWS:
            column = "id" if table == "run" else "run"
            world.db.execute(f"DELETE FROM {table} WHERE {column} = ?", (turn.run.key,))  # noqa: S608


def create_again(world: World, turn: Turn) -> None:
    """Lose the run, and have its caller create it anew by the same request."""
    lose(world, turn)
    again = world.running(profile=Profile.STICKY_PROCESS, run_id=turn.run.run_id)
    assert (again.run.key, again.run.attempt) == (again.launch.run_key, 1)
    world.set(again.run, id=turn.run.key)
    world.db.execute("UPDATE process_lease SET run = ?", (turn.run.key,))


LOSSES = [give_key_away, lose, create_again]
ENDS: list[TurnEnd] = [
    Asked(QUESTION),
    Succeeded({"x": 1}),
    Failed(RunError(code="ENGINE_FAILED", message="broke")),
    Interrupted("The service stood still."),
]


@pytest.mark.parametrize("happens", LOSSES)
def test_a_turn_whose_run_was_lost_writes_nothing(
    world: World, happens: Callable[[World, Turn], None]
) -> None:
    turn = world.running(profile=Profile.STICKY_PROCESS)
    happens(world, turn)
    before = world.dump()
    owner, now, due = world.owner, world.now, world.due_in(1)
    session = Session(type="demo", handle="h", turn=1)
    writes: list[Callable[[], object]] = [
        partial(turns.record_session, world.db, turn, owner=owner, session=session, now=now),
        partial(turns.record_delivered, world.db, turn, owner=owner),
        partial(
            turns.record_sticky_question, world.db, turn, owner=owner, number=1, question=QUESTION,
            due=due, now=now,
        ),
        partial(
            launch_records.record_gated, world.db, turn.launch, owner=owner, pid=1, start_ticks=1
        ),
        partial(launch_records.record_running, world.db, turn.launch, owner=owner),
        *(
            partial(
                turns.record_end, world.db, turn, owner=owner, end=end, ended=GONE, due=due, now=now
            )
            for end in ENDS
        ),
    ]  # fmt: skip

    for write in writes:
        with pytest.raises(RunGone) as gone:
            write()
        assert str(gone.value).startswith("the database no longer has ")
        assert str(gone.value).endswith("; it lost a commit")

    assert before == world.dump()


@pytest.mark.parametrize("happens", LOSSES)
def test_what_became_of_a_lost_launch_is_written_onto_no_other(
    world: World, happens: Callable[[World, Turn], None]
) -> None:
    turn = world.running(profile=Profile.STICKY_PROCESS)
    happens(world, turn)
    world.db.execute("UPDATE process_lease SET state = 'CLOSED'")
    before = world.dump()

    launch_records.close(world.db, turn.launch, GONE, now=world.now)
    launch_records.record_late_end(world.db, [(turn.launch, GONE)], now=world.now)
    launch_records.close_all(world.db, [(turn.launch, GONE)], now=world.now, reconciliation_key=9)

    assert before == world.dump()
    assert not launch_records.is_over(world.db, turn.launch)


@pytest.mark.parametrize("happens", [give_key_away, lose])
def test_a_lost_run_gets_no_trust_and_takes_none_away(
    world: World, happens: Callable[[World, Turn], None]
) -> None:
    turn = world.running(profile=Profile.STICKY_PROCESS)
    happens(world, turn)
    entry = TrustEntry(
        file="/f", folder="/d", place="p", cli="codex", run_key=turn.run.key,
        run_id=turn.run.run_id, attempt=1, added="{}",
    )  # fmt: skip

    with pytest.raises(Fenced):
        trust.record_entry(world.db, entry, host_id="host", owner=world.owner, now=world.now)

    assert world.rows("SELECT count(*) FROM trust_entry") == [(0,)]


def test_an_entry_is_found_by_the_run_that_has_it(world: World) -> None:
    turn = world.running(profile=Profile.STICKY_PROCESS)
    entry = TrustEntry(
        file="/f", folder="/d", place="p", cli="codex", run_key=turn.run.key,
        run_id=turn.run.run_id, attempt=1, added="{}",
    )  # fmt: skip
    trust.record_entry(world.db, entry, host_id="host", owner=world.owner, now=world.now)
    world.set(turn.run, run_id="of another caller")

    found = [
        [one.folder for one in trust.entries_of_run(world.db, "host", run_id, owner=world.owner)]
        for run_id in (turn.run.run_id, "of another caller")
    ]

    assert found == [[], ["/d"]]


def test_a_launch_that_is_followed_is_known_by_its_cookie_when_takes_are_undone(
    world: World,
) -> None:
    followed = world.running()
    give_key_away(world, followed)

    count = turns.requeue_unlaunched(
        world.db, owner=world.owner, held=[followed.launch.cookie], now=world.now
    )

    assert count == 1
    assert world.rows("SELECT run_id, status FROM run") == [("of another caller", "QUEUED")]


def test_a_run_whose_claim_was_lost_is_not_called_a_newer_epochs(world: World) -> None:
    world.restart()
    turn = world.running()
    world.set(turn.run, owner_epoch=1)

    with pytest.raises(RunGone, match="this start's claim of run 'run-0001'"):
        turns.current_run(world.db, turn, owner=world.owner)
