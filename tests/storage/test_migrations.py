"""A store of the first version is migrated without a loss."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, TypeAlias

import peewee as pw
import pytest
from runrecovery_service.domain.reconciliation import Cause, ReconciliationState
from runrecovery_service.domain.run import RunEventKind, RunFilter, RunStatus
from runrecovery_service.storage import (
    events,
    instances,
    launch_records,
    migrate,
    reports,
    run_pages,
    runs,
)
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchEnd
from runrecovery_service.storage.migrate import NEW_SQLITE_STORE, applied_migrations
from runrecovery_service.storage.opening import open_database
from storage.service_store import ServiceStore, boot
from support.new_store import contents, migrate_step_by_step, new_store_script

CHECKSUMS = Path(__file__).with_name("migration_checksums.txt")
LEASE_STATES = ("INTENT", "RUNNING", "KILL_PENDING", "CLOSED")
LABELS = ('"no object"', '{"team": "red", "n": 1}', '{"a": "1", "a": "1"}', "{}")
"""Only damage can produce the first and the third; they must not prevent a start."""
FIRST_LEASE: dict[str, Any] = {
    "attempt": 1, "turn": 1, "instance": "default", "epoch": 1, "host_id": "host",
    "boot_id": "boot", "pid_namespace": 7, "pid": 4242, "start_ticks": 99, "exit_code": -9,
    "ended_by": 1, "processes_ended": 3, "created_at": 10,
}  # fmt: skip
RUN: dict[str, Any] = {
    "engine": "demo", "labels": "{}", "input": "{}", "profile": "RESUMABLE",
    "restart_policy": "FAIL", "max_attempts": 1, "attempt": 1, "turn": 1, "interaction_count": 1,
    "session_type": "demo", "session_value": "handle", "owner": "default", "owner_epoch": 1,
    "version": 2, "queued_at": 1, "created_at": 1, "updated_at": 1,
}  # fmt: skip
INTERACTION: dict[str, Any] = {
    "no": 1, "kind": "confirm", "prompt": "Go on?", "options": "[]", "state": "OPEN", "asked_at": 5
}  # fmt: skip
REPORT: dict[str, Any] = {
    "reconciliation_id": "first", "instance": "default", "epoch": 1, "state": "COMPLETED",
    "started_at": 1, "finished_at": 2, "phases": '[["orphans", 0.5]]',
    "decisions": '{"requeued": 4}', "orphans": '{"found": 2}', "bindings": '{"slots": 1}',
    "warnings": '["w"]', "quarantined": 0, "runs_scanned": 4, "runs_total": 4,
    "runs_unchanged": 0, "safe_mode": 0,
}  # fmt: skip
First: TypeAlias = tuple[str, dict[str, list[dict[str, Any]]]]
"""The URL of a store, and the content of the store."""
TABLES = ("run", "interaction", "reconciliation", "process_lease")


def insert(db: Database, table: str, row: dict[str, Any]) -> int:
    """Add a row and return its id (or the run's, where a table has none)."""
    marks = ", ".join("?" for _ in row)
    key = "run" if table == "interaction" else "id"
    found = db.fetch_one(
        f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks}) RETURNING {key}",  # noqa: S608
        tuple(row.values()),
    )
    assert found is not None
    return int(found[0])


def fill(db: Database) -> None:
    """Store rows as a killed service of the first version leaves them: a launch in every state."""
    with db.transaction():
        insert(db, "reconciliation", REPORT)
        for at, (state, labels) in enumerate(zip(LEASE_STATES, LABELS, strict=True)):
            status = "WAITING_USER" if state == "CLOSED" else "RUNNING"
            given = {"run_id": f"run-{at}", "status": status, "labels": labels}
            run = insert(db, "run", RUN | given)
            insert(db, "interaction", {**INTERACTION, "run": run})
            ended = {"closed_at": 20} if state == "CLOSED" else {}
            lease = {**FIRST_LEASE, "run": run, "cookie": f"{at:032x}", "state": state, **ended}
            insert(db, "process_lease", lease)


@pytest.fixture
def first(empty_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> First:
    """A closed store of the first version with rows in it: its URL and its content."""
    only = tmp_path / "migrations"
    only.mkdir()
    shutil.copy(migrate.MIGRATIONS / "0001_initial.py", only)
    with monkeypatch.context() as patch:
        patch.setattr(migrate, "MIGRATIONS", only)
        db = open_database(empty_database_url, tmp_path)
        assert applied_migrations(db) == ["0001_initial"]
        with db.transaction():
            db.execute(
                "INSERT INTO instance (name, epoch, boot_token, host_id, data_dir, pid,"
                " lease_until, started_at) VALUES ('default', 1, 't', 'host', '/d', 7, 0, 1)"
            )
        store = ServiceStore(db=db, owner=Owner("default", 1, "t"))
        fill(db)
        content = store.dump(*TABLES)
        db.close()
    return empty_database_url, content


@pytest.fixture
def store(first: First, tmp_path: Path) -> Iterator[ServiceStore]:
    """The same store, opened by this version, in its next epoch."""
    db = open_database(first[0], tmp_path)
    store = ServiceStore(db=db, owner=instances.claim(db, boot(), now=ServiceStore.now))
    yield store
    db.close()


ADDED: Final = {
    ("interaction", "wait_deadline_at", None),
    ("reconciliation", "cause", "STARTUP"),
    ("reconciliation", "containment", None),
    ("reconciliation", "recovered_instance", None),
    ("reconciliation", "trust_removals", None),
    *(
        ("process_lease", name, None)
        for name in ("watermark", "cgroup", "user_us", "system_us", "max_rss_kib", "orphans")
    ),
    ("interaction", "auto_decided", 0),
    ("interaction", "tool_call", None),
    ("interaction", "replied_by", None),
    ("run", "created_by", None),
    ("run", "canceled_by", None),
    ("run", "traceparent", None),
    ("run", "event_count", 1),
    ("run", "auto_decided_count", 0),
    ("run", "max_resumes", 0),
    ("run", "resume_count", 0),
    ("run", "questions_before", 0),
    ("run", "resume_due_us", None),
    ("run", "input_tokens", 0),
    ("run", "cached_input_tokens", 0),
    ("run", "cache_write_input_tokens", 0),
    ("run", "output_tokens", 0),
    ("run", "reasoning_output_tokens", 0),
    ("run", "cost_nanos", None),
    ("run", "model", None),
    ("run", "session_usage", None),
    ("run", "max_tokens", None),
    ("run", "max_cost_nanos", None),
    ("process_lease", "usage", None),
    ("run", "resume_at", None),
    ("run", "interrupted_at", None),
    ("run", "interrupted_by", None),
    *(
        ("run", name, None)
        for name in (
            "session_timeout_us",
            "require_user_reply",
            "max_run_us",
            "run_deadline_at",
            "reopenable_until",
            "retired_type",
            "retired_value",
            "wait_due_us",
            "run_due_us",
            "reopen_due_us",
            "due_clock",
            "session_mark",
            "session_reason",
        )
    ),
}
"""The columns that later versions have added, with their value in migrated rows."""


def test_a_migration_keeps_everything_that_the_first_version_stored(
    first: First, store: ServiceStore
) -> None:
    _, before = first
    after = store.dump(*TABLES)

    kept = {
        table: [{name: row[name] for name in before[table][0]} for row in rows]
        for table, rows in after.items()
    }
    added = {
        (table, name, row[name])
        for table, rows in after.items()
        for row in rows
        for name in row.keys() - before[table][0].keys()
    }

    assert kept == before
    assert {table: len(rows) for table, rows in after.items()} == {
        "run": 4, "interaction": 4, "reconciliation": 1, "process_lease": 4
    }  # fmt: skip
    assert added == ADDED
    assert applied_migrations(store.db) == sorted(migrate.known_migrations())


def test_an_epoch_of_the_first_version_is_followed_by_the_next_one(store: ServiceStore) -> None:
    assert store.rows("SELECT name, epoch FROM instance") == [("default", 2)]
    assert store.rows("SELECT name, epoch FROM instance_epoch") == [("default", 2)]


def test_a_living_service_of_the_first_version_is_current_after_a_migration(
    first: First, tmp_path: Path
) -> None:
    db = open_database(first[0], tmp_path)
    try:
        with db.transaction():
            instances.demand_current(db, Owner("default", 1, ""))
    finally:
        db.close()


def test_runs_of_the_first_version_are_found_by_label(store: ServiceStore) -> None:
    found = run_pages.page(store.db, RunFilter(labels={"team": "red"}), after=None, limit=9)

    assert [run.run_id for run in found.rows] == ["run-1"]
    keys = store.rows("SELECT run, key FROM run_label ORDER BY run")
    assert keys == [(found.rows[0].key, "team"), (found.rows[0].key + 1, "a")]


def test_a_run_of_the_first_version_has_a_created_event(store: ServiceStore) -> None:
    run = runs.get(store.db, "run-3")

    found = events.events_after(store.db, run, 0)

    assert [(event.sequence, event.kind) for event in found] == [(1, RunEventKind.CREATED)]


def test_a_report_of_the_first_version_reads_as_the_report_of_a_start(store: ServiceStore) -> None:
    report = reports.get_report(store.db, "first")

    assert (report.cause, report.containment) == (Cause.STARTUP, None)
    assert (report.state, report.orphans.found) == (ReconciliationState.COMPLETED, 2)
    assert report.decisions[0].count == 4


def test_an_open_question_of_the_first_version_keeps_waiting(store: ServiceStore) -> None:
    store.apply_recovery()

    ((run_id,),) = store.rows("SELECT run_id FROM run WHERE status = 'WAITING_USER'")
    run = runs.get(store.db, run_id)

    assert run.status is RunStatus.WAITING_USER
    assert run.pending is not None
    assert run.pending.wait_deadline_at is None


def test_open_launches_of_the_first_version_are_orphans_without_a_watermark(
    store: ServiceStore,
) -> None:
    leases = launch_records.unclosed_launches(store.db, store.owner, before=store.owner.epoch)

    assert [(lease.watermark, lease.cgroup, lease.pid) for lease in leases] == [
        (None, None, 4242)
    ] * 3
    assert [lease.cookie for lease in leases] == [f"{at:032x}" for at in range(3)]
    assert [lease.unended for lease in leases] == [False, False, True]


def test_open_launches_of_the_first_version_are_closed_and_their_runs_decided(
    store: ServiceStore,
) -> None:
    scope = store.open_report()
    leases = launch_records.unclosed_launches(store.db, store.owner, before=store.owner.epoch)
    gone = LaunchEnd(exit_code=None, processes_ended=1, gone=True)
    launch_records.close_all(
        store.db,
        [(lease, gone) for lease in leases],
        now=store.tick(),
        reconciliation_key=scope.reconciliation_key,
    )
    tally = store.apply_recovery()

    assert launch_records.unclosed_launches(store.db, store.owner, before=store.owner.epoch) == []
    assert tally.decisions == {"running_interrupted": 3, "resumable_waiting_preserved": 1}
    assert store.rows(
        "SELECT DISTINCT state, exit_code, processes_ended FROM process_lease WHERE id <="
        " (SELECT max(id) - 1 FROM process_lease)"
    ) == [("CLOSED", -9, 4)]


def test_new_launches_get_new_keys_and_can_be_gated(store: ServiceStore) -> None:
    (old,) = store.rows("SELECT max(id) FROM process_lease")
    turn = store.running()
    launch_records.record_gated(store.db, turn.launch, owner=store.owner, pid=1, start_ticks=1)

    assert turn.launch.key > old[0]
    assert store.rows("SELECT state FROM process_lease WHERE id = ?", turn.launch.key) == [
        ("GATED",)
    ]


def test_an_unknown_launch_state_is_refused_after_a_migration(store: ServiceStore) -> None:
    with pytest.raises((pw.IntegrityError, pw.InternalError)), store.db.transaction():
        store.db.execute("UPDATE process_lease SET state = 'ASLEEP'")


def test_a_second_launch_of_one_turn_is_refused_after_a_migration(store: ServiceStore) -> None:
    with pytest.raises(pw.IntegrityError), store.db.transaction():
        insert(
            store.db,
            "process_lease",
            {**FIRST_LEASE, "run": 1, "cookie": "x", "state": "INTENT"},
        )


def test_a_first_start_creates_the_same_tables_as_the_steps(tmp_path: Path) -> None:
    open_database("", tmp_path).close()
    by_steps = tmp_path / "by_steps"
    migrate_step_by_step(by_steps)

    tables, rows = contents(tmp_path / "runrecovery.db")
    expected_tables, expected_rows = contents(by_steps)

    assert tables.pop("migration_checksum") is not None
    assert tables.pop("sqlite_autoindex_migration_checksum_1") is None
    assert tables == expected_tables
    assert {name: checksum for name, checksum in rows.pop("migration_checksum")} == (  # noqa: C416
        migrate.known_migrations()
    )
    assert [row[1] for row in rows.pop("schema_migration")] == [
        row[1] for row in expected_rows.pop("schema_migration")
    ]
    assert rows == expected_rows
    assert NEW_SQLITE_STORE.read_text() == new_store_script()


def test_a_step_that_databases_may_have_is_never_edited() -> None:
    """A database refuses a step whose text has changed. A new step needs a new line."""
    lines = CHECKSUMS.read_text().splitlines()

    assert migrate.known_migrations() == {
        name: checksum for checksum, name in (line.split() for line in lines)
    }
