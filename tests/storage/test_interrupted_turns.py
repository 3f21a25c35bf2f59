"""A turn whose processes ended at the tree deadline gets the decision that a restart would make."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from itertools import product
from operator import or_

import pytest
from runrecovery_service.domain.recovery_matrix import NOTHING, Fact, Rule, decide
from runrecovery_service.domain.run import Profile, RestartPolicy, Run, RunStatus
from runrecovery_service.domain.turn import Interrupted
from runrecovery_service.storage import interactions
from runrecovery_service.storage.launch_records import LaunchEnd
from runrecovery_service.storage.turns import Turn
from storage.service_store import ServiceStore

BECAUSE = "The service stood still."
INTERRUPTED = Interrupted(BECAUSE)
QUESTIONS = {None: NOTHING, "OPEN": Fact.PENDING, "ANSWERED": Fact.REPLY, "DELIVERED": NOTHING}


def with_a_process() -> Iterator[tuple[RunStatus, Profile | None, Fact, str | None]]:
    """Yield every kind of run that can have a live process."""
    facts = (Fact.HANDLE, Fact.CANCEL, Fact.REQUEUE)
    for status, profile, question, *held in product(
        (RunStatus.RUNNING, RunStatus.WAITING_USER),
        (*Profile, None),
        QUESTIONS,
        *((NOTHING, fact) for fact in facts),
    ):
        if status is RunStatus.WAITING_USER and profile is Profile.RESUMABLE:
            continue  # the run waits without a process
        yield status, profile, reduce(or_, held, QUESTIONS[question]), question


def store_run(
    store: ServiceStore,
    status: RunStatus,
    profile: Profile | None,
    facts: Fact,
    question: str | None,
) -> Turn:
    """Bring a run with a live process into a state."""
    requeue = Fact.REQUEUE in facts
    turn = store.running(
        restart_policy=RestartPolicy.REQUEUE if requeue else RestartPolicy.FAIL,
        max_attempts=2 if requeue else 1,
    )
    handle = Fact.HANDLE in facts
    store.set(
        turn.run,
        status=status.value,
        profile=profile.value if profile else None,
        session_type="demo" if handle else None,
        session_value="handle" if handle else None,
        interaction_count=int(question is not None),
        cancel_requested_at=1 if Fact.CANCEL in facts else None,
    )
    if question is not None:
        with store.db.transaction():
            store.db.execute(
                "INSERT INTO interaction (run, no, kind, prompt, options, state, asked_at,"
                " replied_at, response) VALUES (?, 1, 'confirm', 'So', '[]', ?, 1, ?, ?)",
                (
                    turn.run.key,
                    question,
                    *((None, None) if question == "OPEN" else (2, '"yes"')),
                ),
            )
    return turn


def expected(rule: Rule, facts: Fact, question: str | None) -> tuple[object, ...]:
    """Return status, error, message, session and question of the run after a rule."""
    unfinished = question in {"OPEN", "ANSWERED"}
    return (
        rule.becomes,
        rule.error,
        BECAUSE if rule.error else None,
        "handle" if rule.keeps and Fact.HANDLE in facts else None,
        "CLOSED" if unfinished and not rule.keeps else question,
    )


def test_every_interrupted_turn_ends_as_the_matrix_says(store: ServiceStore) -> None:
    cases = list(with_a_process())
    stored = [store_run(store, *case) for case in cases]
    wrong = []
    for turn, (status, profile, facts, question) in zip(stored, cases, strict=True):
        rule = decide(status, profile, facts)

        run = store.end(turn, INTERRUPTED)

        asked = store.rows("SELECT state FROM interaction WHERE run = ?", run.key)
        became = (
            run.status,
            run.error.code if run.error else None,
            run.error.message if run.error else None,
            store.column(run, "session_value"),
            asked[0][0] if asked else None,
        )
        if became != expected(rule, facts, question):
            wrong.append((rule.name, status, profile, facts, question, became))

    assert wrong == []
    assert len(cases) == 5 * 4 * 8
    assert {decide(status, profile, facts).name for status, profile, facts, _ in cases} == {
        "cancel_completed", "accepted_reply_redriven", "sticky_process_lost", "profile_missing",
        "requeued", "accepted_reply_session_lost", "running_interrupted",
    }  # fmt: skip


def outcome(store: ServiceStore, run: Run) -> tuple[object, ...]:
    """Return status, error, session and question of the run."""
    asked = store.rows("SELECT state FROM interaction WHERE run = ?", run.key)
    return (
        run.status,
        run.error.code if run.error else None,
        store.column(run, "session_value"),
        asked[0][0] if asked else None,
    )


def test_an_interruption_applies_a_decision_as_a_restart_applies_it(store: ServiceStore) -> None:
    cases = list(with_a_process())
    interrupted = [store_run(store, *case) for case in cases]
    left = [store_run(store, *case).run for case in cases]

    ended = [store.end(turn, INTERRUPTED) for turn in interrupted]
    after_interruption = [outcome(store, run) for run in ended]
    store.recover()
    after_restart = [outcome(store, store.get(run)) for run in left]

    assert after_interruption == after_restart


def test_an_interruption_is_not_recorded_as_the_decision_of_a_restart(store: ServiceStore) -> None:
    run = store.end(store.running(), INTERRUPTED)

    assert run.recovery is None
    assert store.rows("SELECT count(*) FROM recovery_event") == [(0,)]


def test_a_restarted_run_queues_behind_runs_that_are_queued(store: ServiceStore) -> None:
    turn = store.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=2)
    store.keep_session(turn)
    first = store.create()
    store.end(turn, INTERRUPTED)

    taken = [store.take(), store.take()]

    assert [one.run.run_id for one in taken if one] == [first.run_id, turn.run.run_id]
    again = taken[1]
    assert again is not None
    assert (again.run.attempt, again.run.turn, again.run.session) == (2, 1, None)


def test_a_run_without_attempts_left_does_not_start_over(store: ServiceStore) -> None:
    turn = store.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=2)
    store.end(turn, INTERRUPTED)
    again = store.take()
    assert again is not None

    run = store.end(again, INTERRUPTED)

    assert run.status is RunStatus.FAILED
    assert run.error is not None
    assert run.error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"


def test_an_accepted_reply_is_delivered_to_the_next_process(store: ServiceStore) -> None:
    waiting = store.waiting()
    store.reply(waiting, {"a": 1})
    turn = store.take()
    assert turn is not None
    store.end(turn, INTERRUPTED)

    again = store.take()

    assert again is not None
    assert (again.run.attempt, again.run.turn) == (1, 3)
    assert again.run.session == waiting.session
    assert again.reply is not None
    assert again.reply.response == {"a": 1}


def test_an_interrupted_run_is_not_launched_before_its_processes_have_ended(
    store: ServiceStore,
) -> None:
    turn = store.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=2)

    run = store.end(
        turn, INTERRUPTED, ended=LaunchEnd(exit_code=None, processes_ended=0, gone=False)
    )

    assert run.status is RunStatus.QUEUED
    assert store.take() is None
    with store.db.transaction():
        store.db.execute("UPDATE process_lease SET state = 'CLOSED'")
    assert store.take() is not None


@pytest.mark.parametrize("policy", list(RestartPolicy))
def test_recording_an_interruption_twice_changes_nothing(
    store: ServiceStore, policy: RestartPolicy
) -> None:
    turn = store.running(restart_policy=policy, max_attempts=2)
    store.end(turn, INTERRUPTED)
    store.take()
    before = store.dump()

    store.end(turn, INTERRUPTED)

    assert store.dump() == before
    assert interactions.find(store.db, turn.run.key, 1) is None
