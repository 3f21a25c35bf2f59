"""A restart decides every run once, in batches that may be cut off anywhere."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.run import RecoveryState, RestartPolicy, Run, RunFilter, RunStatus
from runrecovery_service.domain.session_check import SessionReason
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.engines.sessions.lines import FOUND
from runrecovery_service.storage import decisions, instances, recovery_apply, runs, session_checks
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.recovery_apply import Batch, Tally
from runrecovery_service.storage.rows import EPOCH
from runrecovery_service.storage.sql_dialects import DatabaseKind

from .conftest import (
    DECIDED,
    REASONS,
    CutDatabase,
    PowerCut,
    World,
    boot,
    one_of_each,
    reasons,
)


@pytest.mark.parametrize("rows", [1, 2, 3, 1000])
def test_every_live_run_is_decided_once_whatever_the_batch(world: World, rows: int) -> None:
    made = one_of_each(world)

    tally = world.recover(rows=rows)

    assert reasons(world, made) == REASONS
    assert world.rows("SELECT count(*) FROM recovery_event") == [(10,)]
    assert world.rows("SELECT count(DISTINCT run) FROM recovery_event") == [(10,)]
    assert (tally.scanned, tally.unchanged, tally.quarantined) == (10, 0, 0)
    assert sum(tally.decisions.values()) == 10
    assert (tally.slots, tally.questions, tally.sessions) == (4, 2, 1)
    assert (
        world.rows(
            "SELECT id FROM run WHERE owner_epoch <> ? AND ended_at IS NULL", world.owner.epoch
        )
        == []
    )


def test_a_decision_is_told_with_what_was_before(world: World) -> None:
    run = world.running().run
    world.recover()

    got = world.get(run)

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


def test_a_second_restart_decides_only_what_changed(world: World) -> None:
    one_of_each(world)
    world.recover()
    world.db.execute("DELETE FROM run WHERE recovery_state = 'RECOVERED_QUEUED'")
    before = world.dump(*DECIDED)

    tally = world.recover()

    after = world.dump(*DECIDED)
    for row in (*before["run"], *after["run"]):
        del row["owner_epoch"]
    assert before == after
    assert (tally.scanned, tally.unchanged, tally.decisions) == (1, 1, {})


def test_converging_again_in_one_epoch_finds_nothing(world: World) -> None:
    one_of_each(world)
    world.recover()
    before = world.dump(*DECIDED)

    tally = world.converge()

    assert (before, Tally()) == (world.dump(*DECIDED), tally)


def test_a_kept_run_keeps_its_etag_and_takes_the_reply_that_was_prepared(world: World) -> None:
    run = world.waiting()

    world.recover()

    kept = world.get(run)
    assert (run.etag, run.updated_at) == (kept.etag, kept.updated_at)
    assert (run.session, run.pending) == (kept.session, kept.pending)
    assert RunStatus.QUEUED is world.reply(run, etag=run.etag).status


def test_a_changed_run_gets_a_new_etag(world: World) -> None:
    running = world.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=2).run
    made = [running, world.create()]

    world.recover()

    assert [run.version + 1 for run in made] == [world.get(run).version for run in made]


def test_a_run_that_waits_anew_is_decided_anew(world: World) -> None:
    run = world.waiting()
    world.recover()
    world.reply(run)
    turn = world.take()
    assert turn is not None
    world.keep_session(turn)

    tally = world.recover()

    assert tally.decisions == {"accepted_reply_redriven": 1}
    assert sorted(info.recovery_count for info in decisions.history(world.db, run.run_id)) == [1, 2]


def test_the_accepted_reply_is_given_to_the_next_turn(world: World) -> None:
    run = world.waiting()
    world.reply(run, {"a": 1})
    world.take()
    world.recover()

    turn = world.take()

    assert turn is not None
    assert turn.reply is not None
    assert (run.key, {"a": 1}, 3) == (turn.run.key, turn.reply.response, turn.run.turn)


def test_processes_that_were_ended_are_counted_in_the_history(world: World) -> None:
    turn = world.running()
    world.restart()
    scope = world.begin()
    with world.db.transaction():
        world.db.execute(
            "UPDATE process_lease SET state = 'CLOSED', ended_by = ?, processes_ended = 3",
            (scope.reconciliation_key,),
        )
    batch = recovery_apply.next_batch(world.db, scope, after=0, rows=10)
    assert batch is not None

    recovery_apply.apply_batch(world.db, scope, batch, report=lambda db, tally: None)

    (info,) = decisions.history(world.db, turn.run.run_id)
    assert info.processes_ended == 3


# -- what must not be touched ------------------------------------------------------------------


def test_runs_of_others_of_this_epoch_and_ended_ones_are_untouched(world: World) -> None:
    turn = world.running()
    world.end(turn, Succeeded({}))
    other = instances.claim(world.db, boot("other"), now=world.now)
    world.create(owner=other)
    world.restart()
    world.create()
    before = world.dump(*DECIDED)

    tally = world.converge()

    assert (before, Tally()) == (world.dump(*DECIDED), tally)
    assert recovery_apply.count_runs(world.db, world.scope()) == 0


def test_one_batch_does_not_reach_beyond_its_keys(world: World) -> None:
    made = [world.create() for _ in range(5)]
    world.restart()
    scope = world.begin()

    recovery_apply.apply_batch(
        world.db, scope, Batch(made[1].key, made[3].key, 3), report=lambda db, tally: None
    )

    assert [r and "x" for r in reasons(world, made)] == [None, "x", "x", "x", None]
    assert recovery_apply.count_runs(world.db, world.scope()) == 2


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
def test_a_damaged_record_is_set_aside_as_it_is(
    world: World, columns: dict[str, str], damage: str
) -> None:
    sound, damaged = world.waiting(), world.waiting()
    world.set(damaged, **columns)

    tally = world.recover()

    assert reasons(world, [sound, damaged]) == ["resumable_waiting_preserved", "record_damaged"]
    assert (1, ((damaged.run_id, damage),)) == (
        tally.quarantined, tally.damaged
    )  # fmt: skip
    assert [(damaged.key, damage)] == world.rows("SELECT run, reason FROM quarantine")
    got = world.get(damaged)
    assert (None, True, damaged.etag) == (got.status, got.quarantined, got.etag)
    for name, value in columns.items():
        assert value == world.column(damaged, name)
    assert world.column(damaged, "session_value") == "secret"
    assert world.rows("SELECT state, count(*) FROM interaction GROUP BY state") == [("OPEN", 2)]


def test_a_quarantined_run_is_not_looked_at_again(world: World) -> None:
    run = world.create()
    world.set(run, status="HIBERNATING")
    world.recover()
    before = world.dump(*DECIDED)

    assert Tally() == world.recover()
    assert before == world.dump(*DECIDED)


@pytest.mark.parametrize("columns", [{"options": "[{"}, {"kind": "telepathy"}])
def test_a_damaged_question_is_a_lost_question(world: World, columns: dict[str, str]) -> None:
    run = world.waiting()
    world.set_question(run, **columns)

    world.recover()

    assert reasons(world, [run]) == ["pending_interaction_lost"]
    assert world.rows("SELECT state FROM interaction") == [("CLOSED",)]


def test_a_damaged_answer_cannot_be_given_again(world: World) -> None:
    run = world.waiting()
    world.reply(run)
    world.set_question(run, response="{")

    world.recover()

    assert reasons(world, [run]) == ["queued_interrupted"]


@pytest.mark.parametrize("word", [None, "TELEPATHIC"])
def test_a_missing_profile_is_told(world: World, word: str | None) -> None:
    run = world.waiting()
    world.set(run, profile=word)

    world.recover()

    assert reasons(world, [run]) == ["profile_missing"]


@pytest.mark.parametrize(
    "columns",
    [{"session_verdict": "INVALID"}, {"session_verdict": "UNKNOWN_REFUSED"}, {"session_type": ""}],
)
def test_a_session_that_failed_its_check_is_lost(world: World, columns: dict[str, str]) -> None:
    run = world.waiting()
    world.set(run, **columns)

    world.recover()

    assert reasons(world, [run]) == ["session_handle_lost"]


def forge_decision(world: World, run: Run) -> None:
    """Take the place in the history that the next decision needs."""
    with world.db.transaction():
        world.db.execute(
            "INSERT INTO recovery_event (run, no, reconciliation, rule, facts, status_before,"
            " status_after, recovery_state, recovered_at) VALUES (?, 1, 0, 'x', 0, 'RUNNING',"
            " 'RUNNING', 'NONE', 0)",
            (run.key,),
        )


def test_one_row_that_the_database_refuses_among_600_is_set_aside_alone(world: World) -> None:
    with world.db.transaction():
        made = [world.create() for _ in range(600)]
    spoiled = made[417]
    forge_decision(world, spoiled)
    told: list[Tally] = []

    tally = world.recover(report=lambda db, tally: told.append(tally))

    assert (
        tally.scanned, tally.quarantined, tally.decisions["queued_interrupted"]
    ) == (600, 1, 599)  # fmt: skip
    assert tally == told[-1]
    assert ((spoiled.run_id, "convergence_refused"),) == tally.damaged
    assert world.rows("SELECT count(*) FROM run WHERE status = 'FAILED'") == [(599,)]
    got = world.get(spoiled)
    assert got.quarantined
    ((reason, detail),) = world.rows("SELECT reason, detail FROM quarantine")
    assert reason == "convergence_refused"
    assert detail == "IntegrityError"  # the kind only: its text may quote the row


@pytest.mark.parametrize("at", [0, 1, 5, 9])
def test_every_place_of_a_refused_row_is_isolated(world: World, at: int) -> None:
    made = [world.create() for _ in range(10)]
    forge_decision(world, made[at])

    tally = world.recover(rows=4)

    assert (tally.scanned, tally.quarantined) == (10, 1)
    assert reasons(world, made)[at] == "record_damaged"


# -- interruptions -----------------------------------------------------------------------------


STABLE = {
    "recovered_at", "ended_at", "updated_at", "reconciliation", "owner_epoch", "facts",
    "reopenable_until", "reopen_due_us",
}  # fmt: skip


def outcome(world: World) -> str:
    """What a finished recovery left, without the times and epochs that its tries differ in."""
    dump = world.dump(*DECIDED)
    for row in (row for rows in dump.values() for row in rows):
        for name in STABLE | {"id", "quarantined_at", "detail"}:
            row.pop(name, None)
    return json.dumps({name: sorted(map(str, rows)) for name, rows in dump.items()})


@pytest.fixture
def new_world(new_database_url: Callable[[], str], tmp_path: Path) -> Callable[[], World]:
    """Make stores that all begin alike."""
    counted = iter(range(1000))

    def make() -> World:
        place = tmp_path / str(next(counted))
        place.mkdir()
        db = open_database(new_database_url(), place)
        world = World(db=db, owner=instances.claim(db, boot(), now=World.now))
        made = one_of_each(world)
        world.set(made[-1], input="{")
        forge_decision(world, made[-2])
        return world

    return make


def test_a_recovery_that_is_cut_off_anywhere_is_finished_by_the_next(
    new_world: Callable[[], World],
) -> None:
    calm = new_world()
    calm.recover(rows=4)
    expected = outcome(calm)
    calm.db.close()
    world = new_world()
    seed = world.db

    cuts = 0
    while True:
        world.db = CutDatabase(seed, at=cuts)
        world.restart_with(seed)
        try:
            world.converge(rows=4)
        except PowerCut:
            cuts += 1
        else:
            break
    world.db = seed

    assert cuts > 10
    assert expected == outcome(world)
    assert world.rows("SELECT run FROM recovery_event GROUP BY run HAVING count(*) > 1"
                            " AND min(reconciliation) > 0") == []  # fmt: skip
    seed.close()


def test_a_report_that_cannot_be_written_takes_its_batch_back(world: World) -> None:
    made = one_of_each(world)
    world.restart()
    before = world.dump(*DECIDED)

    def fail(db: Database, tally: Tally) -> None:
        raise PowerCut

    with pytest.raises(PowerCut):
        world.converge(report=fail)

    assert before == world.dump(*DECIDED)
    world.recover()
    assert reasons(world, made) == REASONS


class Meddling(Database):
    """Calls `meddle` once, in the middle of a batch: right after it has been decided."""

    meddle: Callable[[], None] | None = None

    def execute(self, sql: str, params: Sequence[object] = ()) -> Any:
        result = super().execute(sql, params)
        if self.meddle and sql.startswith("INSERT INTO recovery_event"):
            meddle, self.meddle = self.meddle, None
            meddle()
        return result


def test_a_stale_writer_in_the_middle_of_a_batch_is_fenced(world: World) -> None:
    if world.db.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("a transaction of SQLite excludes every other writer")
    turn, stale = world.running(), replace(world)
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
        while writer.is_alive() and not world.rows("SELECT 1 FROM pg_locks WHERE NOT granted"):
            writer.join(timeout=0.01)

    world.restart()
    meddling = Meddling(world.db.peewee, world.db.dialect, world.db.name)
    meddling.meddle, world.db = meddle, meddling
    world.converge()
    writer.join()

    assert [Fenced] == [type(answer) for answer in met]
    assert reasons(world, [turn.run]) == ["running_interrupted"]
    assert world.get(turn.run).status is RunStatus.FAILED


# -- bindings, sessions, reach -----------------------------------------------------------------


def test_what_ended_runs_hold_behind_our_back_is_cleared(world: World) -> None:
    ended, alive = world.cancel(world.waiting()), world.waiting()
    world.set(ended, session_value="left", session_type="demo")
    world.db.execute("UPDATE interaction SET state = 'OPEN'")

    tally = recovery_apply.clear_stale_bindings(world.db, world.owner)

    assert (tally.sessions, tally.questions) == (1, 1)
    assert world.get(alive) == alive
    assert None is world.column(ended, "session_value")
    assert Tally() == recovery_apply.clear_stale_bindings(world.db, world.owner)


def test_sessions_to_check_are_paged_by_engine_and_verdicts_hold(world: World) -> None:
    made = [world.waiting(engine=engine) for engine in ("a", "b", "a", "a")]
    world.restart()
    scope = world.scope()

    first = session_checks.sessions_to_check(world.db, scope, engine="a", after=0, limit=2)
    rest = session_checks.sessions_to_check(
        world.db, scope, engine="a", after=first[-1].run_key, limit=2
    )
    found = {made[0].key: FOUND[SessionReason.MISSING], made[2].key: FOUND[SessionReason.WHOLE]}
    session_checks.record_findings(world.db, scope, found)
    world.converge()

    assert [made[0].key, made[2].key, made[3].key] == [s.run_key for s in (*first, *rest)]
    assert {"secret"} == {session.handle for session in first}
    assert ["session_handle_lost", *["resumable_waiting_preserved"] * 3] == reasons(world, made)


def test_decisions_are_told_to_the_log_up_to_a_limit(world: World) -> None:
    made = one_of_each(world)
    world.restart()
    scope = world.begin()
    batch = recovery_apply.next_batch(world.db, scope, after=0, rows=1000)
    assert batch is not None
    recovery_apply.apply_batch(world.db, scope, batch, report=lambda db, tally: None)

    told = recovery_apply.decisions_of_batch(world.db, scope.reconciliation_key, batch, limit=3)

    assert [(run.run_id, rule) for run, rule in zip(made, REASONS, strict=True)][:3] == [
        (row[0], row[1]) for row in told
    ]
    assert (
        recovery_apply.decisions_of_batch(world.db, scope.reconciliation_key, batch, limit=0) == []
    )


def test_few_live_runs_among_many_ended_ones_are_found_by_index(world: World) -> None:
    if world.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL plans by its statistics")
    plans: list[str] = []

    class Explaining(Database):
        def execute(self, sql: str, params: Sequence[object] = ()) -> Any:
            if sql.split(maxsplit=1)[0] in {"SELECT", "UPDATE", "INSERT"}:
                plans.extend(row[3] for row in super().execute(f"EXPLAIN QUERY PLAN {sql}", params))
            return super().execute(sql, params)

    first = world.create()
    world.db.execute("UPDATE run SET id = 1000000 WHERE id = ?", (first.key,))
    second = replace(world.create(), key=1)
    world.db.execute("UPDATE run SET id = 1 WHERE run_id = ?", (second.run_id,))
    world.restart()
    world.db = Explaining(world.db.peewee, world.db.dialect, world.db.name)

    world.converge()
    recovery_apply.clear_stale_bindings(world.db, world.owner)

    tables = "run|r|interaction|i|recovery_event|e|process_lease"
    walk = re.compile(rf"SCAN ({tables})\b|SEARCH (run|r) USING INTEGER PRIMARY KEY \(rowid>")
    walks = [plan for plan in plans if walk.match(plan)]
    assert walks == []
    assert any("run_live" in plan for plan in plans)
    assert RecoveryState.FAILED_RECONCILED.value == world.column(second, "recovery_state")


async def test_text_that_is_no_utf8_stops_neither_recovery_nor_lists(world: World) -> None:
    if world.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL stores no such text")
    sound, damaged = world.waiting(), world.waiting()
    world.db.execute(
        "UPDATE run SET session_value = CAST(x'ff41ff' AS TEXT) WHERE id = ?", (damaged.key,)
    )
    world.restart()
    scope = world.scope()
    storage = Storage(world.db)

    sessions = await storage.run_exclusive(
        lambda db: session_checks.sessions_to_check(db, scope, engine="demo", after=0, limit=10)
    )
    await storage.run_exclusive(lambda _: world.converge())
    one = await storage.read_row(runs.get, damaged.run_id)
    page = await storage.read(runs.page, RunFilter(), after=None, limit=10)
    storage.close()

    assert [session.run_key for session in sessions] == [sound.key, damaged.key]
    assert one.run_id == damaged.run_id
    assert {run.run_id for run in page.rows} == {sound.run_id, damaged.run_id}


def test_a_time_that_no_calendar_has_fails_nobody(world: World) -> None:
    run = world.create()
    world.set(run, created_at=2**62)

    assert world.get(run).created_at == EPOCH
