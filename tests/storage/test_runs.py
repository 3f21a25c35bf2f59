"""Runs are created, read, listed and canceled, alike on both databases."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
from runrecovery_service.domain.errors import (
    EtagMismatch,
    Fenced,
    Overloaded,
    RequestIdReused,
    RunAlreadyExists,
    RunAlreadyTerminal,
    RunNotFound,
    RunOfAnotherInstance,
    RunQuarantined,
)
from runrecovery_service.domain.run import (
    Profile,
    RestartPolicy,
    Run,
    RunError,
    RunFilter,
    RunStatus,
)
from runrecovery_service.domain.turn import Failed, Succeeded
from runrecovery_service.storage import instances, runs

from .conftest import World, boot, receipt

FAILED = Failed(RunError(code="ENGINE_FAILED", message="m"))


def test_a_created_run_is_read_back_as_it_was_given(world: World) -> None:
    run = world.create(
        run_id="mine",
        engine="codex",
        labels={"a": "ä"},
        profile=Profile.STICKY_PROCESS,
        restart_policy=RestartPolicy.REQUEUE,
        max_attempts=3,
        input={"n": [1, 2.5, None, {"deep": True}], "quote'?%s": "%"},
    )

    assert run == runs.get(world.db, "mine")
    assert (run.status, run.engine, run.labels) == (RunStatus.QUEUED, "codex", {"a": "ä"})
    assert run.input == {"n": [1, 2.5, None, {"deep": True}], "quote'?%s": "%"}
    assert (run.profile, run.restart_policy) == (Profile.STICKY_PROCESS, RestartPolicy.REQUEUE)
    assert (run.attempt, run.turn, run.max_attempts, run.version) == (0, 0, 3, 1)
    assert run.created_at == run.updated_at == world.now
    assert (run.owner, run.owner_epoch) == ("default", 1)


def test_a_run_that_is_not_there_is_not_found(world: World) -> None:
    with pytest.raises(RunNotFound):
        runs.get(world.db, "nobody")


def test_a_taken_run_id_is_refused_and_changes_nothing(world: World) -> None:
    world.create(run_id="mine")
    before = world.dump()

    with pytest.raises(RunAlreadyExists):
        world.create(run_id="mine", engine="other", with_receipt=receipt())

    assert before == world.dump()


def test_the_same_receipt_gives_the_same_run_as_it_is_now(world: World) -> None:
    first = world.create(with_receipt=receipt())
    world.cancel(first)

    again = world.create(run_id="ignored", with_receipt=receipt())

    assert again == world.get(first)
    assert again.status is RunStatus.CANCELED


@pytest.mark.parametrize(
    "other", [receipt(payload=b"other"), receipt(method="Other")], ids=["payload", "method"]
)
def test_a_receipt_with_another_request_is_refused(world: World, other: object) -> None:
    world.create(with_receipt=receipt())
    before = world.dump()

    with pytest.raises(RequestIdReused):
        world.create(with_receipt=other)  # type: ignore[arg-type]

    assert before == world.dump()


def test_fifty_callers_with_one_request_make_one_run(world: World) -> None:
    uses = [partial(world.create, run_id=f"r{n}", with_receipt=receipt()) for n in range(50)]

    results = world.all_at_once(uses, threads=50)

    runs_made = {result.run_id for result in results if isinstance(result, Run)}
    errors = [result for result in results if isinstance(result, Exception)]
    assert len(world.dump("run")["run"]) == len(runs_made) == 1
    assert errors == []


def test_fifty_callers_with_one_request_and_run_id_get_one_run(world: World) -> None:
    use = partial(world.create, run_id="one", with_receipt=receipt())

    results = world.all_at_once([use] * 50, threads=50)

    assert [r.run_id if isinstance(r, Run) else repr(r) for r in results] == ["one"] * 50


def test_fifty_callers_with_one_run_id_make_one_run(world: World) -> None:
    results = world.all_at_once([partial(world.create, run_id="one")] * 50, threads=50)

    assert sum(isinstance(result, Run) for result in results) == 1
    assert {type(r) for r in results if not isinstance(r, Run)} == {RunAlreadyExists}


def test_the_queue_is_bounded(world: World) -> None:
    world.create(max_queued=2)
    world.create(max_queued=2)

    with pytest.raises(Overloaded):
        world.create(max_queued=2)

    world.take()
    assert world.create(max_queued=2).status is RunStatus.QUEUED


def test_a_receipt_is_answered_even_when_the_queue_is_full(world: World) -> None:
    run = world.create(max_queued=1, with_receipt=receipt())

    assert run == world.create(max_queued=1, with_receipt=receipt())


def test_pages_are_newest_first_and_hold_against_new_rows(world: World) -> None:
    ids = [world.create().run_id for _ in range(7)]
    page = partial(runs.page, world.db, RunFilter(), limit=3)

    first = page(after=None)
    world.create()
    second = page(after=first.after)
    world.create()
    third = page(after=second.after)

    seen = [run.run_id for part in (first, second, third) for run in part.rows]
    assert list(reversed(ids)) == seen
    assert third.after is None


def test_a_full_last_page_says_that_it_is_the_last(world: World) -> None:
    for _ in range(3):
        world.create()

    page = runs.page(world.db, RunFilter(), after=None, limit=3)

    assert (len(page.rows), page.after) == (3, None)


def test_pages_filter_by_status_and_engine(world: World) -> None:
    running = world.running(engine="a").run
    queued = world.create(engine="b")
    both = frozenset({RunStatus.RUNNING, RunStatus.QUEUED})

    def listed(statuses: frozenset[RunStatus], engine: str | None) -> list[str]:
        wanted = RunFilter(statuses=statuses, engine=engine)
        page = runs.page(world.db, wanted, after=None, limit=9)
        return [run.run_id for run in page.rows]

    assert [running.run_id] == listed(frozenset({RunStatus.RUNNING}), None)
    assert [queued.run_id] == listed(both, "b")
    assert listed(frozenset({RunStatus.FAILED}), None) == []
    assert [queued.run_id, running.run_id] == listed(frozenset(), None)


def test_quarantined_runs_take_no_room_in_the_queue(world: World) -> None:
    for _ in range(3):
        world.set(world.create(), recovery_state="QUARANTINED")

    made = world.create(max_queued=1)

    assert made.status is RunStatus.QUEUED
    with pytest.raises(Overloaded):
        world.create(max_queued=1)


def test_runs_of_another_instance_take_no_room_in_the_queue(world: World) -> None:
    other = instances.claim(world.db, boot("other"), now=world.now)
    for _ in range(2):
        world.create(max_queued=2, owner=other)

    made = [world.create(max_queued=2) for _ in range(2)]

    assert [(run.owner, run.status) for run in made] == [("default", RunStatus.QUEUED)] * 2
    for owner in (world.owner, other):
        with pytest.raises(Overloaded):
            world.create(max_queued=2, owner=owner)


def test_a_quarantined_run_is_listed_under_no_status(world: World) -> None:
    run = world.create()
    world.set(run, recovery_state="QUARANTINED")

    waits = RunFilter(statuses=frozenset({RunStatus.QUEUED}))
    queued = runs.page(world.db, waits, after=None, limit=9)
    every = runs.page(world.db, RunFilter(), after=None, limit=9)

    assert (queued.rows, [row.status for row in every.rows]) == ((), [None])


# -- cancel ------------------------------------------------------------------------------------


def test_a_queued_run_is_canceled_at_once(world: World) -> None:
    run = world.cancel(world.create())

    assert (run.status, run.cancel_requested) == (RunStatus.CANCELED, True)
    assert run.ended_at == world.now


def test_a_running_run_is_canceled_when_its_process_ends(world: World) -> None:
    turn = world.running()

    asked = world.cancel(turn.run)
    ended = world.end(turn, Succeeded({"x": 1}))

    assert (asked.status, asked.cancel_requested) == (RunStatus.RUNNING, True)
    assert (ended.status, ended.output) == (RunStatus.CANCELED, None)


def test_a_waiting_run_without_a_process_is_canceled_with_its_question(world: World) -> None:
    run = world.cancel(world.waiting())

    assert (run.status, run.pending, run.session) == (RunStatus.CANCELED, None, None)
    assert world.rows("SELECT state FROM interaction") == [("CLOSED",)]


def test_a_waiting_sticky_run_is_canceled_when_its_process_ends(world: World) -> None:
    run = world.cancel(world.waiting(profile=Profile.STICKY_PROCESS))

    assert (run.status, run.cancel_requested) == (RunStatus.WAITING_USER, True)


def test_a_cancel_again_changes_nothing(world: World) -> None:
    run = world.cancel(world.create())

    assert run == world.cancel(run)
    assert run == world.cancel(run, etag="stale")


@pytest.mark.parametrize("end", [Succeeded({}), FAILED], ids=["succeeded", "failed"])
def test_an_ended_run_cannot_be_canceled(world: World, end: Succeeded | Failed) -> None:
    turn = world.running()
    world.end(turn, end)
    before = world.dump()

    with pytest.raises(RunAlreadyTerminal):
        world.cancel(turn.run, receipt=receipt())

    assert before == world.dump()


def test_a_cancel_with_an_old_etag_is_refused(world: World) -> None:
    turn = world.running()
    etag = turn.run.etag
    world.keep_session(turn)

    with pytest.raises(EtagMismatch) as refused:
        world.cancel(turn.run, etag=etag)

    assert world.get(turn.run).etag == refused.value.current_etag
    assert world.cancel(turn.run, etag=refused.value.current_etag).cancel_requested


def test_a_cancel_of_nobody_and_of_a_quarantined_run_is_refused(world: World) -> None:
    run = world.create()
    world.set(run, recovery_state="QUARANTINED")

    with pytest.raises(RunQuarantined):
        world.cancel(run)
    with pytest.raises(RunNotFound):
        world.cancel(replace(run, run_id="nobody"))


def test_a_cancel_is_answered_from_its_receipt(world: World) -> None:
    run = world.create()

    first = world.cancel(run, receipt=receipt())

    assert first == world.cancel(run, receipt=receipt())
    with pytest.raises(RequestIdReused):
        world.cancel(run, receipt=receipt(payload=b"other"))


def test_of_many_cancels_and_creates_at_once_none_is_lost(world: World) -> None:
    made = [world.create() for _ in range(20)]
    uses = [partial(world.cancel, run) for run in made for _ in range(3)]

    results = world.all_at_once(uses, threads=8)

    assert {RunStatus.CANCELED} == {result.status for result in results if isinstance(result, Run)}
    assert len(results) == 60
    assert world.rows("SELECT version, count(*) FROM run GROUP BY version") == [(2, 20)]


# -- fencing -----------------------------------------------------------------------------------


def test_an_older_epoch_may_not_create(world: World) -> None:
    old = world.owner
    world.restart()
    before = world.dump()

    with pytest.raises(Fenced):
        world.create(owner=old)

    assert before == world.dump()


def test_an_older_epoch_may_not_write_what_a_newer_one_took_over(world: World) -> None:
    waiting, queued = world.waiting(), world.create()
    old = world.owner
    world.restart()
    world.set(waiting, owner_epoch=2)
    world.set(queued, owner_epoch=2)
    before = world.dump()

    with pytest.raises(Fenced):
        world.cancel(waiting, owner=old)
    with pytest.raises(Fenced):
        world.reply(waiting, owner=old)
    assert world.take(owner=old) is None

    assert before == world.dump()


def test_another_instance_may_not_write(world: World) -> None:
    run = world.waiting()
    other = instances.claim(world.db, boot("other"), now=world.now)

    for refused in (world.cancel, world.reply):
        with pytest.raises(RunOfAnotherInstance, match="belongs to instance 'default'"):
            refused(run, owner=other)


def test_a_status_that_may_not_follow_is_never_written(world: World) -> None:
    turn = world.running()
    run = world.end(turn, Succeeded({}))

    for status in RunStatus:
        with pytest.raises(ValueError, match="may not become"), world.db.transaction():
            runs.change(world.db, run, owner=world.owner, now=world.now, status=status)

    assert run == world.get(run)
