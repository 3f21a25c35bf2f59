"""Questions are answered once, and nothing that was accepted is lost."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from runrecovery_service.domain.errors import (
    EtagMismatch,
    InteractionSuperseded,
    RequestIdReused,
    RunNotFound,
    RunNotWaiting,
    RunQuarantined,
)
from runrecovery_service.domain.run import (
    Interaction,
    InteractionState,
    JsonValue,
    Profile,
    Run,
    RunStatus,
)
from runrecovery_service.domain.turn import Asked
from runrecovery_service.storage import interactions, turns

from .conftest import QUESTION, World, receipt


def latest(world: World, run: Run) -> Interaction:
    found = interactions.find(world.db, run.key, world.get(run).interaction_count)
    assert found is not None
    return found


def test_a_waiting_run_shows_its_question(world: World) -> None:
    run = world.waiting()

    assert run.pending is not None
    assert (1, QUESTION.prompt) == (run.pending.interaction_id, run.pending.prompt)
    assert (QUESTION.kind, QUESTION.options) == (run.pending.kind, run.pending.options)
    assert InteractionState.OPEN is run.pending.state


@pytest.mark.parametrize(
    ("profile", "becomes"),
    [(Profile.RESUMABLE, RunStatus.QUEUED), (Profile.STICKY_PROCESS, RunStatus.RUNNING)],
)
def test_a_reply_moves_the_run_on(world: World, profile: Profile, becomes: RunStatus) -> None:
    run = world.waiting(profile=profile)

    replied = world.reply(run, {"answer": [1, "ä"]})

    assert (becomes, None, run.version + 1) == (replied.status, replied.pending, replied.version)
    asked = latest(world, run)
    assert (asked.state, asked.response) == (InteractionState.ANSWERED, {"answer": [1, "ä"]})
    assert world.now == asked.replied_at


@pytest.mark.parametrize("response", [None, False, 0, "", [], {}])
def test_an_empty_answer_is_an_answer(world: World, response: JsonValue) -> None:
    run = world.waiting()

    assert world.reply(run, response) == world.reply(run, response)
    assert response == latest(world, run).response


def test_the_same_answer_again_changes_nothing(world: World) -> None:
    run = world.waiting()
    first = world.reply(run, {"a": 1}, etag=run.etag)

    assert first == world.reply(run, {"a": 1}, etag=run.etag)


def test_another_answer_is_superseded(world: World) -> None:
    run = world.waiting()
    first = world.reply(run, "yes")

    with pytest.raises(InteractionSuperseded):
        world.reply(run, "no", receipt=receipt())

    assert (first, []) == (world.get(run), world.rows("SELECT * FROM request_receipt"))


def test_an_answer_to_an_old_or_future_question_is_superseded(world: World) -> None:
    run = world.waiting()
    world.reply(run, "yes")
    turn = world.take()
    assert turn is not None
    world.end(turn, Asked(QUESTION))

    with pytest.raises(InteractionSuperseded):
        world.reply(run, "no", no=1)
    with pytest.raises(InteractionSuperseded):
        world.reply(run, "no", no=3)
    assert RunStatus.WAITING_USER is world.reply(run, "yes", no=1).status


def test_only_a_waiting_run_takes_a_reply(world: World) -> None:
    queued = world.create()
    canceled = world.cancel(queued)
    running = world.running().run

    for run in (canceled, running):
        with pytest.raises(RunNotWaiting):
            world.reply(run)
    with pytest.raises(RunNotFound):
        world.reply(replace(running, run_id="nobody"))


def test_a_sticky_run_whose_cancel_was_accepted_takes_no_reply(world: World) -> None:
    run = world.cancel(world.waiting(profile=Profile.STICKY_PROCESS))

    with pytest.raises(RunNotWaiting):
        world.reply(run)


def test_a_reply_with_an_old_etag_is_refused(world: World) -> None:
    run = world.waiting()
    before = world.dump()

    with pytest.raises(EtagMismatch):
        world.reply(run, etag="other", receipt=receipt())

    assert before == world.dump()


def test_a_quarantined_run_takes_no_reply(world: World) -> None:
    run = world.waiting()
    world.set(run, recovery_state="QUARANTINED")

    with pytest.raises(RunQuarantined):
        world.reply(run)


def test_a_reply_is_answered_from_its_receipt(world: World) -> None:
    run = world.waiting()
    world.reply(run, "yes", receipt=receipt())
    turn = world.take()

    assert turn is not None
    assert turn.run == world.reply(run, "yes", receipt=receipt())
    with pytest.raises(RequestIdReused):
        world.reply(run, "yes", receipt=receipt(payload=b"other"))


def test_of_many_different_answers_at_once_one_is_accepted(world: World) -> None:
    run = world.waiting()

    results = world.all_at_once([partial(world.reply, run, n) for n in range(16)], threads=16)

    accepted = [n for n, result in enumerate(results) if isinstance(result, Run)]
    assert [latest(world, run).response] == accepted
    assert {type(r) for r in results if not isinstance(r, Run)} == {InteractionSuperseded}


def test_of_a_reply_and_a_cancel_at_once_both_or_the_cancel_hold(world: World) -> None:
    made = [world.waiting() for _ in range(10)]
    uses = [use for run in made for use in (partial(world.reply, run), partial(world.cancel, run))]

    results = world.all_at_once(uses, threads=8)

    assert {Run, RunNotWaiting} >= {type(result) for result in results}
    assert {RunStatus.CANCELED} == {world.get(run).status for run in made}
    assert world.rows("SELECT state, count(*) FROM interaction GROUP BY state") == [("CLOSED", 10)]


def test_questions_are_listed_oldest_first_in_pages(world: World) -> None:
    run = world.waiting()
    for number in range(1, 5):
        world.reply(run, number, no=number)
        turn = world.take()
        assert turn is not None
        turns.record_delivered(world.db, turn, owner=world.owner)
        world.end(turn, Asked(QUESTION))

    first = interactions.page(world.db, run.run_id, after=None, limit=3)
    last = interactions.page(world.db, run.run_id, after=first.after, limit=3)

    listed = [*first.rows, *last.rows]
    assert [row.interaction_id for row in listed] == [1, 2, 3, 4, 5]
    assert [row.response for row in listed] == [1, 2, 3, 4, None]
    assert [row.state for row in listed] == ["DELIVERED"] * 4 + ["OPEN"]
    assert last.after is None
    with pytest.raises(RunNotFound):
        interactions.page(world.db, "nobody", after=None, limit=3)
