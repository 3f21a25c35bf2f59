"""Questions are answered once, and nothing that was accepted is lost."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from runrecovery_service.domain.errors import (
    EtagMismatch,
    InteractionSuperseded,
    InvalidFields,
    RequestIdReused,
    RunNotFound,
    RunNotWaiting,
    RunQuarantined,
)
from runrecovery_service.domain.run import (
    Interaction,
    InteractionKind,
    InteractionState,
    JsonObject,
    JsonValue,
    Profile,
    Question,
    Run,
    RunStatus,
    ToolCall,
)
from runrecovery_service.domain.turn import Asked
from runrecovery_service.storage import interactions, turns
from storage.service_store import QUESTION, ServiceStore, receipt


def latest(store: ServiceStore, run: Run) -> Interaction:
    found = interactions.find(store.db, run.key, store.get(run).interaction_count)
    assert found is not None
    return found


def test_a_waiting_run_shows_its_question(store: ServiceStore) -> None:
    run = store.waiting()

    assert run.pending is not None
    assert (1, QUESTION.prompt) == (run.pending.interaction_id, run.pending.prompt)
    assert (QUESTION.kind, QUESTION.options) == (run.pending.kind, run.pending.options)
    assert InteractionState.OPEN is run.pending.state


@pytest.mark.parametrize(
    ("profile", "becomes"),
    [(Profile.RESUMABLE, RunStatus.QUEUED), (Profile.STICKY_PROCESS, RunStatus.RUNNING)],
)
def test_a_reply_queues_a_resumable_run_and_continues_a_sticky_one(
    store: ServiceStore, profile: Profile, becomes: RunStatus
) -> None:
    run = store.waiting(profile=profile)

    replied = store.reply(run, {"answer": [1, "ä"]})

    assert (becomes, None, run.version + 1) == (replied.status, replied.pending, replied.version)
    asked = latest(store, run)
    assert (asked.state, asked.response) == (InteractionState.ANSWERED, {"answer": [1, "ä"]})
    assert store.now == asked.replied_at


def test_a_permission_question_keeps_its_call_and_takes_only_an_answer(
    store: ServiceStore,
) -> None:
    given: JsonObject = {"command": "rm \0 ä", "n": 2**60}
    call = ToolCall(id="toolu_1", tool="Bash", input=given, workspace="/w", pattern="*")
    question = Question(kind=InteractionKind.RISK_ACK, prompt="May I?", tool_call=call)
    turn = store.running()
    store.keep_session(turn)
    run = store.end(turn, Asked(question))

    assert run.pending is not None
    assert run.pending.tool_call == call
    for response in ("yes", True, {"decision": "perhaps"}):
        with pytest.raises(InvalidFields) as refused:
            store.reply(run, response)
        assert [each.field for each in refused.value.violations] == ["response"]
        assert store.get(run) == run
    answer: JsonValue = {"decision": "allow", "input": {"command": "ls"}}
    assert store.reply(run, answer).status is RunStatus.QUEUED
    assert (latest(store, run).response, latest(store, run).tool_call) == (answer, call)


@pytest.mark.parametrize("response", [None, False, 0, "", [], {}])
def test_an_empty_reply_is_accepted(store: ServiceStore, response: JsonValue) -> None:
    run = store.waiting()

    assert store.reply(run, response) == store.reply(run, response)
    assert response == latest(store, run).response


def test_the_same_reply_again_changes_nothing(store: ServiceStore) -> None:
    run = store.waiting()
    first = store.reply(run, {"a": 1}, etag=run.etag)

    assert first == store.reply(run, {"a": 1}, etag=run.etag)


def test_a_second_reply_is_superseded(store: ServiceStore) -> None:
    run = store.waiting()
    first = store.reply(run, "yes")

    with pytest.raises(InteractionSuperseded):
        store.reply(run, "no", receipt=receipt())

    assert (first, []) == (store.get(run), store.rows("SELECT * FROM request_receipt"))


def test_a_reply_to_an_old_or_future_question_is_superseded(store: ServiceStore) -> None:
    run = store.waiting()
    store.reply(run, "yes")
    turn = store.take()
    assert turn is not None
    store.end(turn, Asked(QUESTION))

    with pytest.raises(InteractionSuperseded):
        store.reply(run, "no", no=1)
    with pytest.raises(InteractionSuperseded):
        store.reply(run, "no", no=3)
    assert RunStatus.WAITING_USER is store.reply(run, "yes", no=1).status


def test_only_a_waiting_run_accepts_a_reply(store: ServiceStore) -> None:
    queued = store.create()
    canceled = store.cancel(queued)
    running = store.running().run

    for run in (canceled, running):
        with pytest.raises(RunNotWaiting):
            store.reply(run)
    with pytest.raises(RunNotFound):
        store.reply(replace(running, run_id="nobody"))


def test_a_sticky_run_with_an_accepted_cancel_accepts_no_reply(store: ServiceStore) -> None:
    run = store.cancel(store.waiting(profile=Profile.STICKY_PROCESS))

    with pytest.raises(RunNotWaiting):
        store.reply(run)


def test_a_reply_with_an_old_etag_is_refused(store: ServiceStore) -> None:
    run = store.waiting()
    before = store.dump()

    with pytest.raises(EtagMismatch):
        store.reply(run, etag="other", receipt=receipt())

    assert before == store.dump()


def test_a_quarantined_run_accepts_no_reply(store: ServiceStore) -> None:
    run = store.waiting()
    store.set(run, recovery_state="QUARANTINED")

    with pytest.raises(RunQuarantined):
        store.reply(run)


def test_a_repeated_reply_is_answered_from_its_receipt(store: ServiceStore) -> None:
    run = store.waiting()
    store.reply(run, "yes", receipt=receipt())
    turn = store.take()

    assert turn is not None
    assert turn.run == store.reply(run, "yes", receipt=receipt())
    with pytest.raises(RequestIdReused):
        store.reply(run, "yes", receipt=receipt(payload=b"other"))


def test_of_many_different_replies_at_once_one_is_accepted(store: ServiceStore) -> None:
    run = store.waiting()

    results = store.all_at_once([partial(store.reply, run, n) for n in range(16)], threads=16)

    accepted = [n for n, result in enumerate(results) if isinstance(result, Run)]
    assert [latest(store, run).response] == accepted
    assert {type(r) for r in results if not isinstance(r, Run)} == {InteractionSuperseded}


def test_after_a_reply_and_a_cancel_at_once_the_run_is_canceled(store: ServiceStore) -> None:
    made = [store.waiting() for _ in range(10)]
    uses = [use for run in made for use in (partial(store.reply, run), partial(store.cancel, run))]

    results = store.all_at_once(uses, threads=8)

    assert {Run, RunNotWaiting} >= {type(result) for result in results}
    assert {RunStatus.CANCELED} == {store.get(run).status for run in made}
    assert store.rows("SELECT state, count(*) FROM interaction GROUP BY state") == [("CLOSED", 10)]


def test_questions_are_listed_oldest_first_in_pages(store: ServiceStore) -> None:
    run = store.waiting()
    for number in range(1, 5):
        store.reply(run, number, no=number)
        turn = store.take()
        assert turn is not None
        turns.record_delivered(store.db, turn, owner=store.owner, number=number)
        store.end(turn, Asked(QUESTION))

    first = interactions.page(store.db, run.run_id, after=None, limit=3)
    last = interactions.page(store.db, run.run_id, after=first.after, limit=3)

    listed = [*first.rows, *last.rows]
    assert [row.interaction_id for row in listed] == [1, 2, 3, 4, 5]
    assert [row.response for row in listed] == [1, 2, 3, 4, None]
    assert [row.state for row in listed] == ["DELIVERED"] * 4 + ["OPEN"]
    assert last.after is None
    with pytest.raises(RunNotFound):
        interactions.page(store.db, "nobody", after=None, limit=3)
