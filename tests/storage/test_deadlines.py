"""Stored deadlines pass on time whatever the wall clock does, and are carried out once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from runrecovery_service.domain.errors import Fenced, InteractionSuperseded, RunNotWaiting
from runrecovery_service.domain.run import InteractionState, Profile, Run, RunStatus
from runrecovery_service.domain.steady_time import DueKind
from runrecovery_service.storage import interactions, passed_deadlines
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.passed_deadlines import PassedDeadline
from runrecovery_service.storage.sql_dialects import DatabaseKind
from storage.service_store import QUESTION, REOPEN_S, WAIT_S, ServiceStore

from bench import seed

STEPS = [timedelta(days=10), timedelta(days=-10)]
RUN_S = 600.0


def passed(store: ServiceStore) -> list[PassedDeadline]:
    return passed_deadlines.find(store.db, store.owner, steady=store.steady, limit=100)


def rearm(store: ServiceStore) -> int:
    return passed_deadlines.move_to_clock(store.db, store.owner, now=store.now, steady=store.steady)


def end_wait(store: ServiceStore, run: Run) -> Run | None:
    given: dict[str, Any] = {"owner": store.owner, "now": store.now, "steady": store.steady}
    return passed_deadlines.end_wait(store.db, run.key, **given)


def end_run(store: ServiceStore, run: Run) -> Run | None:
    given: dict[str, Any] = {"owner": store.owner, "now": store.now, "steady": store.steady}
    return passed_deadlines.end_run(store.db, run.key, **given)


def armed(store: ServiceStore) -> Run:
    """Return a waiting run that is decided automatically at its deadline."""
    return store.waiting(require_user_reply=False)


# -- the clocks --------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS, ids=["ahead", "back"])
@pytest.mark.parametrize("restarts", [False, True], ids=["while up", "over a restart"])
def test_a_step_of_the_wall_clock_moves_no_deadline(
    store: ServiceStore, *, step: timedelta, restarts: bool
) -> None:
    run = armed(store)
    store.step_wall_clock(step)
    if restarts:
        store.recover()
        rearm(store)

    store.advance(WAIT_S / 2)
    early = (passed(store), end_wait(store, run))
    store.advance(WAIT_S / 2)

    assert early == ([], None)
    assert passed(store) == [PassedDeadline(run.key, DueKind.WAIT)]


def test_after_a_reboot_the_wall_clock_tells_how_much_time_is_left(store: ServiceStore) -> None:
    run = armed(store)
    store.reboot(100)
    store.recover()

    assert rearm(store) == 1
    store.advance(WAIT_S - 200)
    early = passed(store)
    store.advance(200)

    assert early == []
    assert passed(store) == [PassedDeadline(run.key, DueKind.WAIT)]


def test_a_deadline_that_passed_during_a_reboot_has_passed(store: ServiceStore) -> None:
    run = armed(store)
    store.reboot(WAIT_S + 60)
    store.recover()
    rearm(store)

    assert passed(store) == [PassedDeadline(run.key, DueKind.WAIT)]


def test_deadlines_of_an_earlier_boot_do_not_pass_before_they_are_rearmed(
    store: ServiceStore,
) -> None:
    run = armed(store)
    store.reboot(60)
    store.advance(10 * WAIT_S)
    store.steady_us += 10**15  # a time of another clock than that of the row

    assert end_wait(store, run) is None


def test_rearming_twice_changes_nothing(store: ServiceStore) -> None:
    armed(store)
    store.reboot(5)
    store.recover()
    rearm(store)
    before = store.dump()

    assert rearm(store) == 0
    assert store.dump() == before


# -- waits -------------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", list(Profile))
def test_a_wait_without_a_required_reply_is_decided_automatically_at_its_deadline(
    store: ServiceStore, profile: Profile
) -> None:
    run = store.waiting(profile=profile, require_user_reply=False)
    store.advance(WAIT_S)

    decided = end_wait(store, run)

    goes_on = RunStatus.QUEUED if profile is Profile.RESUMABLE else RunStatus.RUNNING
    assert decided is not None
    assert (decided.status, decided.auto_decided_count) == (goes_on, 1)
    asked = interactions.find(store.db, run.key, 1)
    assert asked is not None
    assert (asked.state, asked.auto_decided) == (InteractionState.ANSWERED, True)
    assert (asked.response, asked.replied_at) == (None, store.now)
    assert passed(store) == []


def test_a_wait_is_decided_automatically_once(store: ServiceStore) -> None:
    run = armed(store)
    store.advance(WAIT_S)
    end_wait(store, run)
    before = store.dump()

    assert end_wait(store, run) is None
    assert store.dump() == before


def test_a_reply_after_the_automatic_decision_is_refused(store: ServiceStore) -> None:
    run = armed(store)
    store.advance(WAIT_S)
    end_wait(store, run)

    with pytest.raises(InteractionSuperseded):
        store.reply(run, "too late")


def test_a_reply_before_the_deadline_is_kept(store: ServiceStore) -> None:
    run = armed(store)
    store.reply(run, "in time")
    store.advance(WAIT_S)

    assert (passed(store), end_wait(store, run)) == ([], None)
    assert store.get(run).auto_decided_count == 0


def test_the_deadline_of_an_answered_question_does_not_end_the_next_wait(
    store: ServiceStore,
) -> None:
    run = armed(store)
    stale = PassedDeadline(run.key, DueKind.WAIT)
    store.advance(WAIT_S)
    assert passed(store) == [stale]
    store.reply(run)  # after the deadline was found passed, before it is carried out
    turn = store.take()
    assert turn is not None
    from runrecovery_service.domain.turn import Asked

    store.end(turn, Asked(QUESTION))

    assert end_wait(store, run) is None
    assert passed(store) == []
    store.advance(WAIT_S)
    assert passed(store) == [stale]


def test_an_accepted_cancel_wins_over_an_automatic_decision(store: ServiceStore) -> None:
    run = store.waiting(profile=Profile.STICKY_PROCESS, require_user_reply=False)
    store.cancel(run)
    store.advance(WAIT_S)

    assert end_wait(store, run) is None
    assert store.get(run).auto_decided_count == 0
    assert passed(store) == []  # it is not reported again


def test_a_resumable_run_that_requires_a_reply_waits_for_ever(store: ServiceStore) -> None:
    store.waiting()
    store.advance(10**9)

    assert passed(store) == []


def test_a_sticky_run_that_requires_a_reply_is_not_decided_at_its_deadline(
    store: ServiceStore,
) -> None:
    run = store.waiting(profile=Profile.STICKY_PROCESS, require_user_reply=True)
    store.advance(WAIT_S)

    after = end_wait(store, run)

    assert after is not None
    assert (after.status, after.auto_decided_count) == (RunStatus.WAITING_USER, 0)
    assert store.rows("SELECT state FROM interaction") == [("CLOSED",)]


def test_an_automatic_decision_survives_a_restart(store: ServiceStore) -> None:
    run = armed(store)
    store.advance(WAIT_S)
    end_wait(store, run)
    store.recover()

    turn = store.take()
    assert turn is not None
    assert turn.reply is not None
    assert (turn.reply.interaction_id, turn.reply.auto_decided) == (1, True)


def test_a_superseded_epoch_decides_nothing(store: ServiceStore) -> None:
    run, old = armed(store), store.owner
    store.recover()
    store.advance(WAIT_S)

    with pytest.raises(Fenced):
        passed_deadlines.end_wait(store.db, run.key, owner=old, now=store.now, steady=store.steady)
    assert store.get(run).status is RunStatus.WAITING_USER


def test_a_reply_that_is_accepted_between_check_and_write_wins_over_the_deadline(
    store: ServiceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reply is accepted after the deadline was found passed and before the question closes."""
    if store.db.dialect.kind is DatabaseKind.SQLITE:
        pytest.skip("a transaction of SQLite excludes every other writer")
    run = store.waiting(profile=Profile.STICKY_PROCESS)
    store.advance(WAIT_S)
    look, replies = passed_deadlines._has_passed, iter([partial(store.reply, run, "just in time")])

    def reply_after_the_look(*args: Any) -> bool:
        answer = look(*args)
        for reply in replies:
            elsewhere(store, reply)
        return answer

    monkeypatch.setattr(passed_deadlines, "_has_passed", reply_after_the_look)

    assert end_wait(store, run) is None
    assert store.get(run).status is RunStatus.RUNNING
    assert store.rows("SELECT state, response FROM interaction") == [("ANSWERED", '"just in time"')]


def elsewhere(store: ServiceStore, do: Callable[[], object]) -> None:
    """Call a function in another thread, and so on another connection; wait for its end."""

    def work() -> None:
        try:
            do()
        finally:
            store.db.close()

    with ThreadPoolExecutor(1) as other:
        other.submit(work).result(30)


def test_a_superseded_epoch_closes_no_question_and_removes_no_deadline(store: ServiceStore) -> None:
    run, old = store.waiting(profile=Profile.STICKY_PROCESS), store.owner
    store.restart()
    store.set(run, owner_epoch=store.owner.epoch)
    store.advance(WAIT_S)
    before = store.dump()

    with pytest.raises(Fenced):
        passed_deadlines.end_wait(store.db, run.key, owner=old, now=store.now, steady=store.steady)
    with pytest.raises(Fenced):
        passed_deadlines.end_reopening(store.db, [run.key], owner=old, steady=store.steady)
    assert store.dump() == before


def test_a_deadline_without_a_wall_clock_time_has_passed(store: ServiceStore) -> None:
    run = armed(store)
    store.db.execute("UPDATE interaction SET wait_deadline_at = NULL")
    store.reboot(5)
    store.recover()
    rearm(store)

    assert passed(store) == [PassedDeadline(run.key, DueKind.WAIT)]


def test_deadlines_that_passed_first_come_first(
    store: ServiceStore,
) -> None:
    later, middle, first = armed(store), armed(store), armed(store)
    for run, seconds in ((first, 1), (middle, 2), (later, 3)):
        store.set(run, wait_due_us=store.steady_us + seconds)
    store.advance(10)

    found = passed_deadlines.find(store.db, store.owner, steady=store.steady, limit=2)

    assert [one.run_key for one in found] == [first.key, middle.key]


# -- whole runs --------------------------------------------------------------------------------


def test_the_time_of_a_run_begins_with_its_first_launch(store: ServiceStore) -> None:
    run = store.create(max_run_s=RUN_S)
    store.advance(RUN_S)
    queued = (passed(store), store.get(run).run_deadline_at)
    store.take()
    store.advance(RUN_S - 2)
    running = passed(store)
    store.advance(2)

    assert (queued, running) == (([], None), [])
    assert passed(store) == [PassedDeadline(run.key, DueKind.RUN)]


def test_a_run_without_a_process_fails_at_its_deadline(store: ServiceStore) -> None:
    run = store.waiting(max_run_s=RUN_S)
    store.advance(RUN_S)

    ended = end_run(store, run)

    assert ended is not None
    assert ended.status is RunStatus.FAILED
    assert ended.error is not None
    assert ended.error.code == "RUN_TIMEOUT"
    assert (ended.session, passed(store)) == (None, [])
    with pytest.raises(RunNotWaiting):
        store.reply(run)


def test_a_run_with_a_process_is_listed_until_its_process_has_ended(store: ServiceStore) -> None:
    turn = store.running(max_run_s=RUN_S)
    store.advance(RUN_S)

    ended = [end_run(store, turn.run) for _ in range(2)]

    assert [run.status for run in ended if run is not None] == [RunStatus.RUNNING] * 2
    assert passed(store) == [PassedDeadline(turn.run.key, DueKind.RUN)]


def test_the_deadline_of_a_run_survives_restarts_and_new_attempts(store: ServiceStore) -> None:
    from runrecovery_service.domain.run import RestartPolicy

    turn = store.running(max_run_s=RUN_S, restart_policy=RestartPolicy.REQUEUE, max_attempts=3)
    deadline = store.get(turn.run).run_deadline_at
    store.advance(RUN_S / 2)
    store.recover()
    again = store.take()

    assert again is not None
    assert (again.run.attempt, again.run.run_deadline_at) == (2, deadline)
    store.advance(RUN_S / 2)
    assert passed(store) == [PassedDeadline(turn.run.key, DueKind.RUN)]


def test_a_canceled_run_has_no_deadline(store: ServiceStore) -> None:
    turn = store.running(max_run_s=RUN_S)
    store.cancel(turn.run)
    store.advance(RUN_S)

    assert end_run(store, turn.run) is None
    assert passed(store) == []


def test_a_run_that_is_out_of_time_is_not_launched_again(store: ServiceStore) -> None:
    from runrecovery_service.domain.run import RestartPolicy

    turn = store.running(max_run_s=RUN_S, restart_policy=RestartPolicy.REQUEUE, max_attempts=3)
    store.recover()
    store.advance(RUN_S)

    assert store.take() is None
    ended = end_run(store, turn.run)
    assert ended is not None
    assert (ended.status, ended.attempt) == (RunStatus.FAILED, 1)


# -- sessions that are kept to reopen a run ----------------------------------------------------


@pytest.mark.parametrize("step", STEPS, ids=["ahead", "back"])
def test_a_session_is_kept_until_its_reopen_deadline(store: ServiceStore, step: timedelta) -> None:
    run = store.waiting()
    store.set(run, session_verdict="INVALID")
    store.recover()
    store.step_wall_clock(step)
    store.advance(REOPEN_S - 100)
    early = passed(store)
    store.advance(100)

    assert early == []
    assert passed(store) == [PassedDeadline(run.key, DueKind.REOPEN)]
    passed_deadlines.end_reopening(store.db, [run.key], owner=store.owner, steady=store.steady)
    assert passed(store) == []
    assert store.rows("SELECT retired_value, session_value FROM run") == [(None, None)]


def test_a_session_is_not_forgotten_by_the_clock_of_another_boot(store: ServiceStore) -> None:
    run = store.waiting()
    store.set(run, session_verdict="INVALID")
    store.recover()
    kept = store.rows("SELECT retired_value FROM run")
    store.reboot(60)
    store.steady_us += 10**15  # a time of another clock than that of the row

    passed_deadlines.end_reopening(store.db, [run.key], owner=store.owner, steady=store.steady)

    assert store.rows("SELECT retired_value FROM run") == kept != [(None,)]


def test_a_batch_of_a_takeover_reads_only_the_deadlines_of_its_own_runs(
    shared: ServiceStore,
) -> None:
    plan: list[str] = []

    class Explaining(Database):
        def execute(self, sql: str, params: Sequence[object] = ()) -> Any:
            if "due_clock = ?" in sql:
                plan.extend(row[0] for row in super().execute(f"EXPLAIN {sql}", params))
            return super().execute(sql, params)

    seed.fill(shared.db, shared.owner, seed.Seeding(runs=6000, mix={"waiting": 1}), now=shared.now)
    shared.db.execute("UPDATE run SET reopen_due_us = 1 WHERE id BETWEEN 1 AND 2000")
    shared.db.execute("ANALYZE run")

    passed_deadlines.move_range(
        Explaining(shared.db.peewee, shared.db.dialect, shared.db.name),
        shared.owner,
        first=1,
        last=200,
        now=shared.now,
        steady=shared.steady,
    )

    assert [line for line in plan if "run_pkey" in line] != []
    assert [line for line in plan if "_due" in line and "Index Scan" in line] == []
