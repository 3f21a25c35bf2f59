"""A restart decides on every run once, in batches, even if it is killed at any statement."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.run import RecoveryState, RestartPolicy, Run, RunFilter, RunStatus
from runrecovery_service.domain.session_check import SessionReason
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.engines.sessions.lines import FOUND
from runrecovery_service.storage import (
    decisions,
    instances,
    recovery_apply,
    run_pages,
    runs,
    session_checks,
    stale_bindings,
)
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.recovery_apply import Batch, Tally
from runrecovery_service.storage.rows import EPOCH
from runrecovery_service.storage.sql_dialects import DatabaseKind
from storage.service_store import (
    DECIDED,
    REASONS,
    Crash,
    CrashingDatabase,
    ServiceStore,
    boot,
    one_of_each,
    reasons,
)

from bench import seed


@pytest.mark.parametrize("rows", [1, 2, 3, 1000])
def test_every_live_run_is_decided_once_for_every_batch_size(
    store: ServiceStore, rows: int
) -> None:
    made = one_of_each(store)

    tally = store.recover(rows=rows)

    assert reasons(store, made) == REASONS
    assert store.rows("SELECT count(*) FROM recovery_event") == [(10,)]
    assert store.rows("SELECT count(DISTINCT run) FROM recovery_event") == [(10,)]
    assert (tally.scanned, tally.unchanged, tally.quarantined) == (10, 0, 0)
    assert sum(tally.decisions.values()) == 10
    assert (tally.slots, tally.questions, tally.sessions) == (4, 2, 1)
    assert (
        store.rows(
            "SELECT id FROM run WHERE owner_epoch <> ? AND ended_at IS NULL", store.owner.epoch
        )
        == []
    )


def test_a_decision_is_recorded_with_the_status_before_and_after(store: ServiceStore) -> None:
    run = store.running().run
    store.recover()

    got = store.get(run)

    assert got.recovery is not None
    assert (
        got.recovery.status_before, got.recovery.status_after
    ) == (RunStatus.RUNNING, RunStatus.FAILED)  # fmt: skip
    assert (
        got.recovery.instance, got.recovery.epoch, got.recovery.recovery_count
    ) == ("default", 2, 1)  # fmt: skip
    assert got.error is not None
    assert "ORCHESTRATOR_RESTART_INTERRUPTED" == got.error.code == got.recovery.error_code
    assert got.recovery.recovered_at == got.ended_at == got.updated_at


def test_a_second_restart_decides_only_what_changed(store: ServiceStore) -> None:
    one_of_each(store)
    store.recover()
    store.db.execute("DELETE FROM run WHERE recovery_state = 'RECOVERED_QUEUED'")
    before = store.dump(*DECIDED)

    tally = store.recover()

    after = store.dump(*DECIDED)
    for row in (*before["run"], *after["run"]):
        del row["owner_epoch"]
    assert before == after
    assert (tally.scanned, tally.unchanged, tally.decisions) == (1, 1, {})


def test_a_second_recovery_in_one_epoch_finds_no_run(store: ServiceStore) -> None:
    one_of_each(store)
    store.recover()
    before = store.dump(*DECIDED)

    tally = store.apply_recovery()

    assert (before, Tally()) == (store.dump(*DECIDED), tally)


def test_a_kept_run_accepts_a_reply_with_the_etag_from_before_the_restart(
    store: ServiceStore,
) -> None:
    run = store.waiting()

    store.recover()

    kept = store.get(run)
    assert (run.etag, run.updated_at) == (kept.etag, kept.updated_at)
    assert (run.session, run.pending) == (kept.session, kept.pending)
    assert RunStatus.QUEUED is store.reply(run, etag=run.etag).status


def test_a_changed_run_gets_a_new_etag(store: ServiceStore) -> None:
    running = store.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=2).run
    made = [running, store.create()]

    store.recover()

    assert [run.version + 1 for run in made] == [store.get(run).version for run in made]


def test_a_run_that_was_resumed_since_gets_a_second_decision(store: ServiceStore) -> None:
    run = store.waiting()
    store.recover()
    store.reply(run)
    turn = store.take()
    assert turn is not None
    store.keep_session(turn)

    tally = store.recover()

    assert tally.decisions == {"accepted_reply_redriven": 1}
    assert sorted(info.recovery_count for info in decisions.history(store.db, run.run_id)) == [1, 2]


def test_an_accepted_reply_is_delivered_by_the_next_turn(store: ServiceStore) -> None:
    run = store.waiting()
    store.reply(run, {"a": 1})
    store.take()
    store.recover()

    turn = store.take()

    assert turn is not None
    assert turn.reply is not None
    assert (run.key, {"a": 1}, 3) == (turn.run.key, turn.reply.response, turn.run.turn)


def test_the_history_counts_the_processes_that_were_killed(store: ServiceStore) -> None:
    turn = store.running()
    store.restart()
    scope = store.open_report()
    with store.db.transaction():
        store.db.execute(
            "UPDATE process_lease SET state = 'CLOSED', ended_by = ?, processes_ended = 3",
            (scope.reconciliation_key,),
        )
    batch = recovery_apply.next_batch(store.db, scope, after=0, rows=10)
    assert batch is not None

    recovery_apply.apply_batch(store.db, scope, batch, report=lambda db, tally: None)

    (info,) = decisions.history(store.db, turn.run.run_id)
    assert info.processes_ended == 3


# -- runs out of scope -------------------------------------------------------------------------


def test_ended_runs_and_runs_of_this_epoch_or_other_instances_are_not_changed(
    store: ServiceStore,
) -> None:
    turn = store.running()
    store.end(turn, Succeeded({}))
    other = instances.claim(store.db, boot("other"), now=store.now)
    store.create(owner=other)
    store.restart()
    store.create()
    before = store.dump(*DECIDED)

    tally = store.apply_recovery()

    assert (before, Tally()) == (store.dump(*DECIDED), tally)
    assert recovery_apply.count_runs(store.db, store.scope()) == 0


def test_a_batch_decides_only_the_runs_of_its_key_range(store: ServiceStore) -> None:
    made = [store.create() for _ in range(5)]
    store.restart()
    scope = store.open_report()

    recovery_apply.apply_batch(
        store.db, scope, Batch(made[1].key, made[3].key, 3), report=lambda db, tally: None
    )

    assert [r and "x" for r in reasons(store, made)] == [None, "x", "x", "x", None]
    assert recovery_apply.count_runs(store.db, store.scope()) == 2


# -- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "damage"),
    [
        ({"status": "HIBERNATING"}, "status_unknown"),
        ({"labels": "{"}, "labels_unreadable"),
        ({"input": ""}, "input_unreadable"),
        ({"output": "{]"}, "output_unreadable"),
        ({"restart_policy": "MAYBE"}, "restart_policy_unknown"),
    ],
)
def test_a_damaged_run_is_quarantined_unchanged(
    store: ServiceStore, columns: dict[str, str], damage: str
) -> None:
    sound, damaged = store.waiting(), store.waiting()
    store.set(damaged, **columns)

    tally = store.recover()

    assert reasons(store, [sound, damaged]) == ["resumable_waiting_preserved", "record_damaged"]
    assert (1, ((damaged.run_id, damage),)) == (
        tally.quarantined, tally.damaged
    )  # fmt: skip
    assert [(damaged.key, damage)] == store.rows("SELECT run, reason FROM quarantine")
    got = store.get(damaged)
    assert (None, True, damaged.etag) == (got.status, got.quarantined, got.etag)
    for name, value in columns.items():
        assert value == store.column(damaged, name)
    assert store.column(damaged, "session_value") == "secret"
    assert store.rows("SELECT state, count(*) FROM interaction GROUP BY state") == [("OPEN", 2)]


def test_a_quarantined_run_is_not_decided_again(store: ServiceStore) -> None:
    run = store.create()
    store.set(run, status="HIBERNATING")
    store.recover()
    before = store.dump(*DECIDED)

    assert Tally() == store.recover()
    assert before == store.dump(*DECIDED)


@pytest.mark.parametrize("columns", [{"options": "[{"}, {"kind": "telepathy"}])
def test_a_run_with_a_damaged_question_fails_with_pending_interaction_lost(
    store: ServiceStore, columns: dict[str, str]
) -> None:
    run = store.waiting()
    store.set_question(run, **columns)

    store.recover()

    assert reasons(store, [run]) == ["pending_interaction_lost"]
    assert store.rows("SELECT state FROM interaction") == [("CLOSED",)]


def test_a_run_with_a_damaged_accepted_answer_is_interrupted(store: ServiceStore) -> None:
    run = store.waiting()
    store.reply(run)
    store.set_question(run, response="{")

    store.recover()

    assert reasons(store, [run]) == ["queued_interrupted"]


@pytest.mark.parametrize("word", [None, "TELEPATHIC"])
def test_a_run_with_an_unknown_profile_fails_with_profile_missing(
    store: ServiceStore, word: str | None
) -> None:
    run = store.waiting()
    store.set(run, profile=word)

    store.recover()

    assert reasons(store, [run]) == ["profile_missing"]


@pytest.mark.parametrize(
    "columns",
    [{"session_verdict": "INVALID"}, {"session_verdict": "UNKNOWN_REFUSED"}, {"session_type": ""}],
)
def test_a_run_whose_session_failed_its_check_fails_with_session_handle_lost(
    store: ServiceStore, columns: dict[str, str]
) -> None:
    run = store.waiting()
    store.set(run, **columns)

    store.recover()

    assert reasons(store, [run]) == ["session_handle_lost"]


def forge_decision(store: ServiceStore, run: Run) -> None:
    """Use up the number of the run's next decision, so that the database refuses the decision."""
    with store.db.transaction():
        store.db.execute(
            "INSERT INTO recovery_event (run, no, reconciliation, rule, facts, status_before,"
            " status_after, recovery_state, recovered_at) VALUES (?, 1, 0, 'x', 0, 'RUNNING',"
            " 'RUNNING', 'NONE', 0)",
            (run.key,),
        )


def test_of_600_runs_only_the_one_that_the_database_refuses_is_quarantined(
    store: ServiceStore,
) -> None:
    with store.db.transaction():
        made = [store.create() for _ in range(600)]
    spoiled = made[417]
    forge_decision(store, spoiled)
    written: list[Tally] = []

    tally = store.recover(report=lambda db, tally: written.append(tally))

    assert (
        tally.scanned, tally.quarantined, tally.decisions["queued_interrupted"]
    ) == (600, 1, 599)  # fmt: skip
    assert tally == sum(written, Tally())
    assert ((spoiled.run_id, "convergence_refused"),) == tally.damaged
    assert store.rows("SELECT count(*) FROM run WHERE status = 'FAILED'") == [(599,)]
    got = store.get(spoiled)
    assert got.quarantined
    ((reason, detail),) = store.rows("SELECT reason, detail FROM quarantine")
    assert reason == "convergence_refused"
    assert detail == "IntegrityError"  # only the kind, because the text may quote the row


@pytest.mark.parametrize("at", [0, 1, 5, 9])
def test_a_refused_run_is_quarantined_alone_at_every_position_of_its_batch(
    store: ServiceStore, at: int
) -> None:
    made = [store.create() for _ in range(10)]
    forge_decision(store, made[at])

    tally = store.recover(rows=4)

    assert (tally.scanned, tally.quarantined) == (10, 1)
    assert reasons(store, made)[at] == "record_damaged"


# -- interruptions -----------------------------------------------------------------------------


def fill(store: ServiceStore) -> ServiceStore:
    """Add runs of many kinds, a damaged one, and one whose decision the database refuses."""
    made = one_of_each(store)
    store.set(made[-1], input="{")
    forge_decision(store, made[-2])
    return store


def test_a_recovery_that_is_cut_off_at_any_statement_is_completed_by_the_next(
    new_store: Callable[[], ServiceStore],
) -> None:
    undisturbed, store = fill(new_store()), fill(new_store())
    undisturbed.recover(rows=4)
    seed = store.db

    cuts = 0
    while True:
        store.db = CrashingDatabase(seed, at=cuts)
        store.restart_with(seed)
        try:
            store.apply_recovery(rows=4)
        except Crash:
            cuts += 1
        else:
            break
    store.db = seed

    assert cuts > 10
    assert store.decided() == undisturbed.decided()
    assert store.rows("SELECT run FROM recovery_event GROUP BY run HAVING count(*) > 1"
                            " AND min(reconciliation) > 0") == []  # fmt: skip


def test_a_batch_is_rolled_back_when_its_report_cannot_be_written(store: ServiceStore) -> None:
    made = one_of_each(store)
    store.restart()
    before = store.dump(*DECIDED)

    def fail(db: Database, tally: Tally) -> None:
        raise Crash

    with pytest.raises(Crash):
        store.apply_recovery(report=fail)

    assert before == store.dump(*DECIDED)
    store.recover()
    assert reasons(store, made) == REASONS


class Meddling(Database):
    """Calls `meddle` once in the middle of a batch, right after the batch was decided."""

    meddle: Callable[[], None] | None = None

    def execute(self, sql: str, params: Sequence[object] = ()) -> Any:
        result = super().execute(sql, params)
        if self.meddle and sql.startswith("INSERT INTO recovery_event"):
            meddle, self.meddle = self.meddle, None
            meddle()
        return result


def test_a_stale_writer_in_the_middle_of_a_batch_is_fenced(store: ServiceStore) -> None:
    if store.db.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("a transaction of SQLite excludes every other writer")
    turn, stale = store.running(), replace(store)
    met: list[object] = []

    def write() -> None:
        try:
            met.append(stale.end(turn, Succeeded({})))
        except Fenced as error:
            met.append(error)
        finally:
            stale.db.close()

    writer = threading.Thread(target=write)

    def meddle() -> None:
        writer.start()
        while writer.is_alive() and not store.rows("SELECT 1 FROM pg_locks WHERE NOT granted"):
            writer.join(timeout=0.01)

    store.restart()
    meddling = Meddling(store.db.peewee, store.db.dialect, store.db.name)
    meddling.meddle, store.db = meddle, meddling
    store.apply_recovery()
    writer.join()

    assert [Fenced] == [type(answer) for answer in met]
    assert reasons(store, [turn.run]) == ["running_interrupted"]
    assert store.get(turn.run).status is RunStatus.FAILED


# -- stale bindings, sessions, indexes ---------------------------------------------------------


def test_sessions_and_questions_of_ended_runs_are_cleared(store: ServiceStore) -> None:
    ended, alive = store.cancel(store.waiting()), store.waiting()
    store.set(ended, session_value="left", session_type="demo")
    store.db.execute("UPDATE interaction SET state = 'OPEN'")

    tally = stale_bindings.clear_stale_bindings(store.db, store.owner)

    assert (tally.sessions, tally.questions) == (1, 1)
    assert store.get(alive) == alive
    assert None is store.column(ended, "session_value")
    assert Tally() == stale_bindings.clear_stale_bindings(store.db, store.owner)


def test_sessions_to_check_are_paged_by_engine_and_their_verdicts_decide(
    store: ServiceStore,
) -> None:
    made = [store.waiting(engine=engine) for engine in ("a", "b", "a", "a")]
    store.restart()
    scope = store.scope()

    first = session_checks.sessions_to_check(store.db, scope, engine="a", after=0, limit=2)
    rest = session_checks.sessions_to_check(
        store.db, scope, engine="a", after=first[-1].run_key, limit=2
    )
    found = {made[0].key: FOUND[SessionReason.MISSING], made[2].key: FOUND[SessionReason.WHOLE]}
    session_checks.record_findings(store.db, scope, found)
    store.apply_recovery()

    assert [made[0].key, made[2].key, made[3].key] == [s.run_key for s in (*first, *rest)]
    assert {"secret"} == {session.handle for session in first}
    assert ["session_handle_lost", *["resumable_waiting_preserved"] * 3] == reasons(store, made)


def test_decisions_of_a_batch_are_listed_up_to_a_limit(store: ServiceStore) -> None:
    made = one_of_each(store)
    store.restart()
    scope = store.open_report()
    batch = recovery_apply.next_batch(store.db, scope, after=0, rows=1000)
    assert batch is not None
    recovery_apply.apply_batch(store.db, scope, batch, report=lambda db, tally: None)

    listed = decisions.decisions_of_batch(store.db, scope.reconciliation_key, batch, limit=3)

    assert [(run.run_id, rule) for run, rule in zip(made, REASONS, strict=True)][:3] == [
        (row[0], row[1]) for row in listed
    ]
    assert decisions.decisions_of_batch(store.db, scope.reconciliation_key, batch, limit=0) == []


def test_live_runs_are_found_by_an_index_without_a_table_scan(store: ServiceStore) -> None:
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL plans by its statistics")
    plans: list[str] = []

    class Explaining(Database):
        def execute(self, sql: str, params: Sequence[object] = ()) -> Any:
            if sql.split(maxsplit=1)[0] in {"SELECT", "UPDATE", "INSERT"}:
                plans.extend(row[3] for row in super().execute(f"EXPLAIN QUERY PLAN {sql}", params))
            return super().execute(sql, params)

    first = store.create()
    store.db.execute("UPDATE run SET id = 1000000 WHERE id = ?", (first.key,))
    second = replace(store.create(), key=1)
    store.db.execute("UPDATE run SET id = 1 WHERE run_id = ?", (second.run_id,))
    store.restart()
    store.db = Explaining(store.db.peewee, store.db.dialect, store.db.name)

    store.apply_recovery()
    stale_bindings.clear_stale_bindings(store.db, store.owner)

    tables = "run|r|interaction|i|recovery_event|e|process_lease"
    walk = re.compile(rf"SCAN ({tables})\b|SEARCH (run|r) USING INTEGER PRIMARY KEY \(rowid>")
    walks = [plan for plan in plans if walk.match(plan)]
    assert walks == []
    assert any("run_live" in plan for plan in plans)
    assert RecoveryState.FAILED_RECONCILED.value == store.column(second, "recovery_state")


def test_a_batch_reads_only_the_questions_of_its_own_runs(store: ServiceStore) -> None:
    if store.db.dialect.kind is DatabaseKind.SQLITE:
        pytest.skip("SQLite reads each question by its key")
    plan: list[str] = []

    class Explaining(Database):
        def execute(self, sql: str, params: Sequence[object] = ()) -> Any:
            if sql.startswith("INSERT INTO recovery_event"):
                plan.extend(row[0] for row in super().execute(f"EXPLAIN {sql}", params))
            return super().execute(sql, params)

    seed.fill(store.db, store.owner, seed.Seeding(runs=6000, mix={"waiting": 1}), now=store.now)
    store.restart()
    scope = store.open_report()
    batch = recovery_apply.next_batch(store.db, scope, after=0, rows=2000)
    assert batch is not None

    recovery_apply.apply_batch(
        Explaining(store.db.peewee, store.db.dialect, store.db.name),
        scope,
        batch,
        report=lambda db, tally: None,
    )

    assert [line for line in plan if "on interaction" in line] != []
    assert [line for line in plan if "Seq Scan on interaction" in line] == []


async def test_text_that_is_not_utf8_stops_neither_recovery_nor_lists(store: ServiceStore) -> None:
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL stores no such text")
    sound, damaged = store.waiting(), store.waiting()
    store.db.execute(
        "UPDATE run SET session_value = CAST(x'ff41ff' AS TEXT) WHERE id = ?", (damaged.key,)
    )
    store.restart()
    scope = store.scope()
    storage = Storage(store.db)

    sessions = await storage.run_exclusive(
        lambda db: session_checks.sessions_to_check(db, scope, engine="demo", after=0, limit=10)
    )
    await storage.run_exclusive(lambda _: store.apply_recovery())
    one = await storage.read_row(runs.get, damaged.run_id)
    page = await storage.read(run_pages.page, RunFilter(), after=None, limit=10)
    storage.close()

    assert [session.run_key for session in sessions] == [sound.key, damaged.key]
    assert one.run_id == damaged.run_id
    assert {run.run_id for run in page.rows} == {sound.run_id, damaged.run_id}


def test_a_stored_time_out_of_range_reads_as_the_epoch(store: ServiceStore) -> None:
    run = store.create()
    store.set(run, created_at=2**62)

    assert store.get(run).created_at == EPOCH
