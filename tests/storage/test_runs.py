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
from runrecovery_service.domain.usage import Budget
from runrecovery_service.storage import instances, run_pages, runs
from runrecovery_service.storage.database import Stale
from storage.service_store import ServiceStore, boot, receipt

FAILED = Failed(RunError(code="ENGINE_FAILED", message="m"))


def test_a_created_run_is_read_back_as_it_was_given(store: ServiceStore) -> None:
    run = store.create(
        run_id="mine",
        engine="codex",
        labels={"a": "ä"},
        profile=Profile.STICKY_PROCESS,
        restart_policy=RestartPolicy.REQUEUE,
        max_attempts=3,
        session_timeout_s=1.00000049,
        require_user_reply=False,
        max_run_s=7.00000051,
        max_resumes=2,
        budget=Budget(max_tokens=5, max_cost_nanos=6),
        input={"n": [1, 2.5, None, {"deep": True}], "quote'?%s": "%"},
        created_by="ann",
        traceparent="00-trace",
    )

    assert run == runs.get(store.db, "mine")
    assert (run.session_timeout_s, run.max_run_s, run.max_resumes) == (1.0, 7.000001, 2)
    assert (run.require_user_reply, run.budget) == (False, Budget(max_tokens=5, max_cost_nanos=6))
    assert (run.created_by, run.traceparent) == ("ann", "00-trace")
    assert (run.status, run.engine, run.labels) == (RunStatus.QUEUED, "codex", {"a": "ä"})
    assert run.input == {"n": [1, 2.5, None, {"deep": True}], "quote'?%s": "%"}
    assert (run.profile, run.restart_policy) == (Profile.STICKY_PROCESS, RestartPolicy.REQUEUE)
    assert (run.attempt, run.turn, run.max_attempts, run.version) == (0, 0, 3, 1)
    assert run.created_at == run.updated_at == store.now
    assert (run.owner, run.owner_epoch) == ("default", 1)


def test_an_unknown_run_is_not_found(store: ServiceStore) -> None:
    with pytest.raises(RunNotFound):
        runs.get(store.db, "nobody")


def test_a_taken_run_id_is_refused_and_changes_nothing(store: ServiceStore) -> None:
    store.create(run_id="mine")
    before = store.dump()

    with pytest.raises(RunAlreadyExists):
        store.create(run_id="mine", engine="other", with_receipt=receipt())

    assert before == store.dump()


def test_a_repeated_request_returns_the_same_run_as_it_is_now(store: ServiceStore) -> None:
    first = store.create(with_receipt=receipt())
    store.cancel(first)

    again = store.create(run_id="ignored", with_receipt=receipt())

    assert again == store.get(first)
    assert again.status is RunStatus.CANCELED


@pytest.mark.parametrize(
    "other", [receipt(payload=b"other"), receipt(method="Other")], ids=["payload", "method"]
)
def test_a_request_id_with_another_request_is_refused(store: ServiceStore, other: object) -> None:
    store.create(with_receipt=receipt())
    before = store.dump()

    with pytest.raises(RequestIdReused):
        store.create(with_receipt=other)  # type: ignore[arg-type]

    assert before == store.dump()


def test_request_ids_of_different_callers_are_independent(store: ServiceStore) -> None:
    first = store.create(with_receipt=receipt(caller="a"))
    other = store.create(with_receipt=receipt(caller="b", payload=b"other"))

    assert store.create(with_receipt=receipt(caller="a")) == first
    assert store.create(with_receipt=receipt(caller="b", payload=b"other")) == other
    assert first.run_id != other.run_id


def test_a_request_id_that_was_used_before_there_were_callers_counts_for_each(
    store: ServiceStore,
) -> None:
    first = store.create(with_receipt=receipt())

    assert store.create(with_receipt=receipt(caller="a")) == first
    with pytest.raises(RequestIdReused):
        store.create(with_receipt=receipt(caller="a", payload=b"other"))


def test_a_callers_own_request_id_counts_before_one_without_a_caller(store: ServiceStore) -> None:
    own = store.create(with_receipt=receipt(caller="a"))
    without = store.create(with_receipt=receipt(payload=b"other"))

    assert store.create(with_receipt=receipt(caller="a")) == own
    assert store.create(with_receipt=receipt(payload=b"other")) == without


def test_fifty_callers_with_one_request_id_create_one_run(store: ServiceStore) -> None:
    uses = [partial(store.create, run_id=f"r{n}", with_receipt=receipt()) for n in range(50)]

    results = store.all_at_once(uses, threads=50)

    runs_made = {result.run_id for result in results if isinstance(result, Run)}
    errors = [result for result in results if isinstance(result, Exception)]
    assert len(store.dump("run")["run"]) == len(runs_made) == 1
    assert errors == []


def test_fifty_callers_with_one_request_id_and_run_id_get_one_run(store: ServiceStore) -> None:
    use = partial(store.create, run_id="one", with_receipt=receipt())

    results = store.all_at_once([use] * 50, threads=50)

    assert [r.run_id if isinstance(r, Run) else repr(r) for r in results] == ["one"] * 50


def test_fifty_callers_with_one_run_id_create_one_run(store: ServiceStore) -> None:
    results = store.all_at_once([partial(store.create, run_id="one")] * 50, threads=50)

    assert sum(isinstance(result, Run) for result in results) == 1
    assert {type(r) for r in results if not isinstance(r, Run)} == {RunAlreadyExists}


def test_the_queue_is_bounded(store: ServiceStore) -> None:
    store.create(max_queued=2)
    store.create(max_queued=2)

    with pytest.raises(Overloaded):
        store.create(max_queued=2)

    store.take()
    assert store.create(max_queued=2).status is RunStatus.QUEUED


def test_a_repeated_create_is_answered_when_the_queue_is_full(store: ServiceStore) -> None:
    run = store.create(max_queued=1, with_receipt=receipt())

    assert run == store.create(max_queued=1, with_receipt=receipt())


def test_pages_are_newest_first_and_not_disturbed_by_new_runs(store: ServiceStore) -> None:
    ids = [store.create().run_id for _ in range(7)]
    page = partial(run_pages.page, store.db, RunFilter(), limit=3)

    first = page(after=None)
    store.create()
    second = page(after=first.after)
    store.create()
    third = page(after=second.after)

    seen = [run.run_id for part in (first, second, third) for run in part.rows]
    assert list(reversed(ids)) == seen
    assert third.after is None


def test_a_full_last_page_has_no_next_page(store: ServiceStore) -> None:
    for _ in range(3):
        store.create()

    page = run_pages.page(store.db, RunFilter(), after=None, limit=3)

    assert (len(page.rows), page.after) == (3, None)


def test_pages_filter_by_status_and_engine(store: ServiceStore) -> None:
    running = store.running(engine="a").run
    queued = store.create(engine="b")
    both = frozenset({RunStatus.RUNNING, RunStatus.QUEUED})

    def listed(statuses: frozenset[RunStatus], engine: str | None) -> list[str]:
        wanted = RunFilter(statuses=statuses, engine=engine)
        page = run_pages.page(store.db, wanted, after=None, limit=9)
        return [run.run_id for run in page.rows]

    assert [running.run_id] == listed(frozenset({RunStatus.RUNNING}), None)
    assert [queued.run_id] == listed(both, "b")
    assert listed(frozenset({RunStatus.FAILED}), None) == []
    assert [queued.run_id, running.run_id] == listed(frozenset(), None)


def test_quarantined_runs_do_not_count_towards_the_queue(store: ServiceStore) -> None:
    for _ in range(3):
        store.set(store.create(), recovery_state="QUARANTINED")

    made = store.create(max_queued=1)

    assert made.status is RunStatus.QUEUED
    with pytest.raises(Overloaded):
        store.create(max_queued=1)


def test_runs_of_another_instance_do_not_count_towards_the_queue(store: ServiceStore) -> None:
    other = instances.claim(store.db, boot("other"), now=store.now)
    for _ in range(2):
        store.create(max_queued=2, owner=other)

    made = [store.create(max_queued=2) for _ in range(2)]

    assert [(run.owner, run.status) for run in made] == [("default", RunStatus.QUEUED)] * 2
    for owner in (store.owner, other):
        with pytest.raises(Overloaded):
            store.create(max_queued=2, owner=owner)


def test_a_quarantined_run_is_listed_under_no_status(store: ServiceStore) -> None:
    run = store.create()
    store.set(run, recovery_state="QUARANTINED")

    waits = RunFilter(statuses=frozenset({RunStatus.QUEUED}))
    queued = run_pages.page(store.db, waits, after=None, limit=9)
    every = run_pages.page(store.db, RunFilter(), after=None, limit=9)

    assert (queued.rows, [row.status for row in every.rows]) == ((), [None])


# -- cancel ------------------------------------------------------------------------------------


def test_a_change_of_a_row_that_has_changed_since_it_was_read_is_stale(
    store: ServiceStore,
) -> None:
    turn = store.running()
    read = store.get(turn.run)
    store.keep_session(turn)  # another version with the same status

    with pytest.raises(Stale), store.db.transaction():
        runs.change(store.db, read, owner=store.owner, now=store.tick(), output="'lost'")

    assert store.get(turn.run).session is not None
    assert store.column(turn.run, "output") is None


def test_a_queued_run_is_canceled_at_once(store: ServiceStore) -> None:
    run = store.cancel(store.create())

    assert (run.status, run.cancel_requested) == (RunStatus.CANCELED, True)
    assert run.ended_at == store.now


def test_a_running_run_is_canceled_when_its_process_ends(store: ServiceStore) -> None:
    turn = store.running()

    asked = store.cancel(turn.run)
    ended = store.end(turn, Succeeded({"x": 1}))

    assert (asked.status, asked.cancel_requested) == (RunStatus.RUNNING, True)
    assert (ended.status, ended.output) == (RunStatus.CANCELED, None)


def test_a_waiting_run_without_a_process_is_canceled_with_its_question(store: ServiceStore) -> None:
    run = store.cancel(store.waiting())

    assert (run.status, run.pending, run.session) == (RunStatus.CANCELED, None, None)
    assert store.rows("SELECT state FROM interaction") == [("CLOSED",)]


def test_a_waiting_sticky_run_is_canceled_when_its_process_ends(store: ServiceStore) -> None:
    run = store.cancel(store.waiting(profile=Profile.STICKY_PROCESS))

    assert (run.status, run.cancel_requested) == (RunStatus.WAITING_USER, True)


def test_a_second_cancel_changes_nothing(store: ServiceStore) -> None:
    run = store.cancel(store.create())

    assert run == store.cancel(run)
    assert run == store.cancel(run, etag="stale")


@pytest.mark.parametrize("end", [Succeeded({}), FAILED], ids=["succeeded", "failed"])
def test_an_ended_run_cannot_be_canceled(store: ServiceStore, end: Succeeded | Failed) -> None:
    turn = store.running()
    store.end(turn, end)
    before = store.dump()

    with pytest.raises(RunAlreadyTerminal):
        store.cancel(turn.run, receipt=receipt())

    assert before == store.dump()


def test_a_cancel_with_an_old_etag_is_refused(store: ServiceStore) -> None:
    turn = store.running()
    etag = turn.run.etag
    store.keep_session(turn)

    with pytest.raises(EtagMismatch) as refused:
        store.cancel(turn.run, etag=etag)

    assert store.get(turn.run).etag == refused.value.current_etag
    assert store.cancel(turn.run, etag=refused.value.current_etag).cancel_requested


def test_a_cancel_of_an_unknown_or_quarantined_run_is_refused(store: ServiceStore) -> None:
    run = store.create()
    store.set(run, recovery_state="QUARANTINED")

    with pytest.raises(RunQuarantined):
        store.cancel(run)
    with pytest.raises(RunNotFound):
        store.cancel(replace(run, run_id="nobody"))


def test_a_repeated_cancel_is_answered_from_its_receipt(store: ServiceStore) -> None:
    run = store.create()

    first = store.cancel(run, receipt=receipt())

    assert first == store.cancel(run, receipt=receipt())
    with pytest.raises(RequestIdReused):
        store.cancel(run, receipt=receipt(payload=b"other"))


def test_of_many_cancels_and_creates_at_once_none_is_lost(store: ServiceStore) -> None:
    made = [store.create() for _ in range(20)]
    uses = [partial(store.cancel, run) for run in made for _ in range(3)]

    results = store.all_at_once(uses, threads=8)

    assert {RunStatus.CANCELED} == {result.status for result in results if isinstance(result, Run)}
    assert len(results) == 60
    assert store.rows("SELECT version, count(*) FROM run GROUP BY version") == [(2, 20)]


# -- fencing -----------------------------------------------------------------------------------


def test_a_superseded_epoch_may_not_create(store: ServiceStore) -> None:
    old = store.owner
    store.restart()
    before = store.dump()

    with pytest.raises(Fenced):
        store.create(owner=old)

    assert before == store.dump()


def test_a_superseded_epoch_may_not_write_a_run_that_a_newer_one_has_taken_over(
    store: ServiceStore,
) -> None:
    waiting, queued = store.waiting(), store.create()
    old = store.owner
    store.restart()
    store.set(waiting, owner_epoch=2)
    store.set(queued, owner_epoch=2)
    before = store.dump()

    with pytest.raises(Fenced):
        store.cancel(waiting, owner=old)
    with pytest.raises(Fenced):
        store.reply(waiting, owner=old)
    assert store.take(owner=old) is None

    assert before == store.dump()


def test_a_forbidden_transition_is_not_written(store: ServiceStore) -> None:
    turn = store.running()
    run = store.end(turn, Succeeded({}))

    for status in RunStatus:
        with pytest.raises(ValueError, match="may not become"), store.db.transaction():
            runs.change(store.db, run, owner=store.owner, now=store.now, status=status)

    assert run == store.get(run)
