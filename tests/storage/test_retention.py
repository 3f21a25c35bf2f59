"""Runs that have reached their age are removed with all rows; runs that may continue are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from runrecovery_service.domain.errors import (
    DecisionsPruned,
    RequestedRunRemoved,
    RunNotFound,
    WatchCursorInvalid,
    WatchHistoryPruned,
)
from runrecovery_service.domain.reconciliation import RecoveredFilter
from runrecovery_service.domain.retention import FIRST, RetentionKind, RunPosition
from runrecovery_service.domain.run import Profile, Run, RunFilter
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.storage import (
    decision_feed,
    events,
    instances,
    reports,
    retention,
    run_pages,
)
from runrecovery_service.storage.decision_feed import START
from runrecovery_service.storage.launch_records import LaunchEnd
from runrecovery_service.storage.rows import to_us
from runrecovery_service.storage.sql_dialects import DatabaseKind
from storage.service_store import ServiceStore, boot, receipt

CHILDREN: Final = (
    "interaction", "run_event", "run_label", "recovery_event", "process_lease", "quarantine",
)  # fmt: skip
PARTS: Final = (RetentionKind.OUTPUTS, RetentionKind.WORKSPACES, RetentionKind.EVENTS)
LONG_S: Final = 600.0
ALIVE: Final = LaunchEnd(exit_code=None, processes_ended=0, gone=False)


def removable(store: ServiceStore, *, limit: int = 100) -> list[int]:
    upto = RunPosition(to_us(store.now), 0)
    found = retention.removable_runs(
        store.db, store.owner, after=FIRST, upto=upto, now=store.now, limit=limit
    )
    return found.keys


def remove(store: ServiceStore, *made: Run) -> int:
    removed = retention.remove_runs(
        store.db, [run.key for run in made], owner=store.owner, now=store.now, within_s=LONG_S
    )
    assert removed.handled == len(made)
    return len(removed.changed)


def mark(store: ServiceStore, kind: RetentionKind, *, limit: int = 100) -> list[int]:
    found = retention.removable_parts(
        store.db, store.owner, kind, after=FIRST, ended_before=store.now, now=store.now, limit=limit
    )
    marked = retention.mark_removed(
        store.db, [kind], found.keys, owner=store.owner, now=store.now, within_s=LONG_S
    )
    assert marked.handled == len(found.keys)
    return marked.changed


def succeeded(store: ServiceStore, **changes: object) -> Run:
    return store.end(store.running(**changes), Succeeded(output={}))


def settle(store: ServiceStore) -> None:
    """Let enough time pass for removals, and add a later run and launch, which are the newest."""
    store.running()
    store.advance(retention.SETTLES_S + 1)


def lost(store: ServiceStore) -> Run:
    """Return a run that a recovery failed because of its session, and that can be reopened."""
    run = store.waiting()
    store.set(run, session_verdict="INVALID")
    store.recover()
    return store.get(run)


# -- runs --------------------------------------------------------------------------------------


def test_a_removed_run_leaves_no_row_and_others_keep_theirs(store: ServiceStore) -> None:
    gone, kept = lost(store), lost(store)
    store.set(gone, reopen_due_us=None)
    settle(store)
    before = store.dump("run", *CHILDREN)

    assert remove(store, gone, kept) == 1

    after = store.dump("run", *CHILDREN)
    assert after == {
        table: [row for row in rows if row["id" if table == "run" else "run"] != gone.key]
        for table, rows in before.items()
    }
    assert [len(before[table]) - len(after[table]) for table in ("run", *CHILDREN[:5])] == [
        1, 1, 2, 1, 1, 1,
    ]  # fmt: skip
    with pytest.raises(RunNotFound):
        store.get(gone)


def may_be_reopened(store: ServiceStore) -> Run:
    return lost(store)


def waits(store: ServiceStore) -> Run:
    return store.waiting()


def waits_with_its_process(store: ServiceStore) -> Run:
    return store.waiting(profile=Profile.STICKY_PROCESS)


def works(store: ServiceStore) -> Run:
    return store.running().run


def has_a_living_process(store: ServiceStore) -> Run:
    return store.end(store.running(), Succeeded(output={}), ended=ALIVE)


def is_quarantined(store: ServiceStore) -> Run:
    run = succeeded(store)
    store.set(run, recovery_state="QUARANTINED")
    return run


def has_a_trust_entry(store: ServiceStore) -> Run:
    run = succeeded(store)
    with store.db.transaction():
        store.db.execute(
            "INSERT INTO trust_entry (file, folder, place, host_id, cli, run, attempt, instance,"
            " added, created_at) VALUES ('f', 'w', 'p', 'h', 'codex', ?, 1, 'default', '', 0)",
            (run.key,),
        )
    return run


def has_an_unknown_status(store: ServiceStore) -> Run:
    run = succeeded(store)
    store.set(run, status="LINGERING")
    return run


KEPT: Final = (
    may_be_reopened, waits, waits_with_its_process, works, has_a_living_process, is_quarantined,
    has_a_trust_entry, has_an_unknown_status,
)  # fmt: skip


@pytest.mark.parametrize("make", KEPT, ids=lambda make: make.__name__)
def test_nothing_is_removed_of_a_run_that(
    store: ServiceStore, make: Callable[[ServiceStore], Run]
) -> None:
    run, ended = make(store), succeeded(store)
    settle(store)
    before = store.dump()

    assert removable(store) == [ended.key]
    assert remove(store, run) == 0
    assert [key for kind in PARTS for key in mark(store, kind) if key == run.key] == []
    changed = {"removed_part", "run_event"}  # of the other run
    assert store.dump(*before.keys() - changed) == {
        table: rows for table, rows in before.items() if table not in changed
    }
    assert {row["run"] for row in store.dump("removed_part")["removed_part"]} == {ended.key}
    ids = [
        [row["no"] for row in rows if row["run"] == run.key]
        for rows in (before["run_event"], store.dump("run_event")["run_event"])
    ]
    assert ids[0] == ids[1]


def test_a_run_is_kept_while_its_closed_launch_is_still_searched_for(store: ServiceStore) -> None:
    ended = succeeded(store)
    store.running()
    store.advance(60)

    early = removable(store)
    store.advance(retention.SETTLES_S)

    assert (early, removable(store)) == ([], [ended.key])


def test_a_late_kill_keeps_its_run_for_that_time_again(store: ServiceStore) -> None:
    ended = succeeded(store)
    settle(store)
    with store.db.transaction():
        store.db.execute(
            "UPDATE process_lease SET closed_at = ? WHERE run = ?", (to_us(store.now), ended.key)
        )

    assert removable(store) == []


def test_the_newest_run_stays_so_that_its_key_is_not_given_out_again(store: ServiceStore) -> None:
    """SQLite uses a deleted highest key again; files, receipts and cursors would be mixed up."""
    first = succeeded(store)
    launched_last, newest = store.create(), store.cancel(store.create())
    turn = store.take()
    assert turn is not None
    store.end(turn, Succeeded(output={}))
    store.advance(retention.SETTLES_S + 1)

    assert removable(store) == [first.key]
    assert remove(store, first, launched_last, newest) == 1
    taken = store.running()
    assert (taken.run.key, taken.launch.key) == (newest.key + 1, turn.launch.key + 1)


def test_runs_of_another_instance_are_its_own_on_postgresql(store: ServiceStore) -> None:
    ended = succeeded(store)
    settle(store)
    store.owner = instances.claim(store.db, boot("other"), now=store.now)
    adopts = store.db.dialect.kind is DatabaseKind.SQLITE

    assert removable(store) == ([ended.key] if adopts else [])
    assert remove(store, ended) == int(adopts)
    assert retention.stored_runs(store.db, store.owner, [ended.key]) == (
        {} if adopts else {ended.key: retention.StoredRun(own=False, removed=frozenset())}
    )


def test_the_surplus_begins_behind_the_newest_ended_runs(store: ServiceStore) -> None:
    ended = [succeeded(store) for _ in range(4)]
    store.waiting()

    surplus = [
        retention.position_of_surplus(store.db, store.owner, kept=kept, now=store.now)
        for kept in (0, 1, 3, 4)
    ]

    assert [None if at is None else at.key for at in surplus] == [
        ended[3].key, ended[2].key, ended[0].key, None,
    ]  # fmt: skip


def test_a_list_continues_when_the_run_of_its_cursor_is_removed(store: ServiceStore) -> None:
    made = [succeeded(store) for _ in range(4)]
    settle(store)
    everything = RunFilter()
    page = run_pages.page(store.db, everything, after=None, limit=3)
    assert page.rows[-1].key == made[2].key

    remove(store, made[2], made[1])

    rest = run_pages.page(store.db, everything, after=page.after, limit=3)
    assert [run.key for run in rest.rows] == [made[0].key]


# -- requests ----------------------------------------------------------------------------------


def test_a_request_whose_run_was_removed_creates_no_second_run(store: ServiceStore) -> None:
    run = store.create(with_receipt=receipt("r1"))
    store.cancel(run)
    settle(store)
    remove(store, run)

    with pytest.raises(RequestedRunRemoved, match="request_id r1 was carried out before"):
        store.create(with_receipt=receipt("r1"))


def test_a_request_is_new_once_its_receipt_was_removed(store: ServiceStore) -> None:
    old = [store.create(with_receipt=receipt(f"r{number}")) for number in range(3)]
    cut = store.now
    kept = store.create(with_receipt=receipt("young"))

    removed = [
        retention.remove_receipts(store.db, owner=store.owner, created_before=cut, limit=2)
        for _ in range(3)
    ]

    assert removed == [2, 1, 0]
    assert store.create(with_receipt=receipt("young")).key == kept.key
    assert store.create(with_receipt=receipt("r0")).key not in {run.key for run in old}


def test_receipts_of_another_instance_are_its_own_on_postgresql(store: ServiceStore) -> None:
    """Otherwise a request could be carried out twice, by both instances."""
    run = store.create(with_receipt=receipt("r1"))
    store.cancel(run)
    settle(store)
    remove(store, run)  # the receipt stays
    first, store.owner = store.owner, instances.claim(store.db, boot("other"), now=store.now)
    own = store.db.dialect.kind is DatabaseKind.SQLITE

    def receipts() -> tuple[int, int]:
        return (
            retention.count_receipts(store.db, store.owner, created_before=store.now),
            retention.remove_receipts(
                store.db, owner=store.owner, created_before=store.now, limit=9
            ),
        )

    assert receipts() == (int(own), int(own))
    if not own:
        store.owner = first
        assert receipts() == (1, 1)


# -- parts of runs -----------------------------------------------------------------------------


def test_a_part_is_recorded_once_oldest_runs_first(store: ServiceStore) -> None:
    made = [succeeded(store) for _ in range(3)]
    settle(store)

    marked = [mark(store, RetentionKind.OUTPUTS, limit=2) for _ in range(3)]

    assert [sorted(keys) for keys in marked] == [
        [made[0].key, made[1].key], [made[2].key], [],
    ]  # fmt: skip
    assert retention.is_output_removed(store.db, made[0])
    parts = store.rows("SELECT DISTINCT part FROM removed_part")
    assert parts == [("outputs",)]
    assert store.get(made[0]).etag == made[0].etag


def test_a_watch_of_removed_events_gets_the_first_sequence_that_is_kept(
    store: ServiceStore,
) -> None:
    run = succeeded(store)
    settle(store)
    assert len(events.events_after(store.db, run, 0)) == run.event_count

    mark(store, RetentionKind.EVENTS)

    with pytest.raises(WatchHistoryPruned) as caught:
        events.events_after(store.db, run, 0)
    assert caught.value.oldest == run.event_count + 1
    assert events.events_after(store.db, run, run.event_count) == ()


def test_decisions_stay_when_events_are_removed(store: ServiceStore) -> None:
    run = lost(store)
    store.set(run, reopen_due_us=None)
    settle(store)

    mark(store, RetentionKind.EVENTS)

    with pytest.raises(WatchHistoryPruned) as caught:
        events.events_after(store.db, run, 1)
    last = caught.value.oldest - 1
    assert [event.kind for event in events.events_after(store.db, run, last)] == ["RECOVERED"]


# -- reports -----------------------------------------------------------------------------------


def report_ids(store: ServiceStore) -> list[int]:
    return [row[0] for row in store.rows("SELECT id FROM reconciliation ORDER BY id")]


def close_report(store: ServiceStore, decisions: str = "{}") -> int:
    key = store.open_report().reconciliation_key
    with store.db.transaction():
        store.db.execute(
            "UPDATE reconciliation SET state = 'COMPLETED', decisions = ? WHERE id = ?",
            (decisions, key),
        )
    return key


def remove_reports(store: ServiceStore, before: timedelta = timedelta()) -> int:
    return retention.remove_reports(
        store.db, owner=store.owner, started_before=store.now - before, limit=100
    )


def test_only_reports_that_nothing_names_are_removed(store: ServiceStore) -> None:
    lost(store)  # the run's decision refers to the report
    named = report_ids(store)
    idle = [close_report(store) for _ in range(3)]
    latest_with_decisions = close_report(store, '{"a": 1}')
    running = store.open_report().reconciliation_key

    assert remove_reports(store) == len(idle)
    assert report_ids(store) == [*named, latest_with_decisions, running]


def test_the_newest_report_stays_at_any_age(store: ServiceStore) -> None:
    made = [close_report(store) for _ in range(2)]
    store.advance(10**9)

    assert (remove_reports(store), report_ids(store)) == (1, made[1:])


def test_a_young_report_stays(store: ServiceStore) -> None:
    for _ in range(2):
        close_report(store)

    assert remove_reports(store, timedelta(hours=1)) == 0


def test_a_report_is_removable_once_the_runs_that_name_it_are_gone(store: ServiceStore) -> None:
    run = lost(store)
    store.set(run, reopen_due_us=None)
    (named,) = report_ids(store)
    for _ in range(2):
        close_report(store, '{"a": 1}')
    settle(store)

    remove_reports(store)
    assert named in report_ids(store)

    remove(store, run)

    assert remove_reports(store) == 1
    assert named not in report_ids(store)


def test_a_reader_of_decisions_whose_report_is_gone_is_told_so(store: ServiceStore) -> None:
    run = lost(store)
    cursor = decision_feed.end_cursor(store.db)
    store.set(run, reopen_due_us=None)
    for _ in range(2):
        close_report(store, '{"a": 1}')
    settle(store)
    remove(store, run)
    remove_reports(store)

    with pytest.raises(DecisionsPruned):
        decision_feed.demand_valid(store.db, cursor)
    with pytest.raises(WatchCursorInvalid):
        decision_feed.demand_valid(store.db, decision_feed.FeedCursor(10**6, 1, 1))


def test_a_reader_of_decisions_passes_over_removed_runs(store: ServiceStore) -> None:
    first, second = store.waiting(), store.waiting()
    for run in (first, second):
        store.set(run, session_verdict="INVALID")
    store.recover()
    store.set(first, reopen_due_us=None)
    settle(store)

    remove(store, first)

    page = decision_feed.decisions_after(store.db, START, RecoveredFilter(), limit=10)
    assert [decided.run_id for decided in page.decided] == [second.run_id]
    assert reports.report_page(store.db, after=None, limit=10).rows != ()


# -- the store ---------------------------------------------------------------------------------


def test_removable_rows_are_found_by_partial_indexes(store: ServiceStore) -> None:
    """Reading every ended run for each batch would take minutes with a million of them."""
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL chooses its plans by the size of the tables")
    asked: list[str] = []
    execute = store.db.execute

    def note(sql: str, params: Sequence[object] = ()) -> Any:
        asked.extend(row[3] for row in execute(f"EXPLAIN QUERY PLAN {sql}", params).fetchall())
        return execute(sql, params)

    succeeded(store)
    settle(store)
    store.db.execute = note  # type: ignore[method-assign]
    removable(store)
    retention.position_of_surplus(store.db, store.owner, kept=1, now=store.now)
    for kind in PARTS:
        mark(store, kind)
    retention.remove_receipts(store.db, owner=store.owner, created_before=store.now, limit=1)

    found = {plan.partition("INDEX ")[2].split(" ")[0] for plan in asked if " r USING" in plan}
    assert found == {"run_ended", ""}  # the rest by their keys
    assert [plan for plan in asked if plan.startswith("SCAN")] == []


def test_postgresql_finds_the_launches_of_a_batch_by_their_runs(store: ServiceStore) -> None:
    """Reading all launches took 100 ms for each batch of 100,000 runs."""
    if store.db.dialect.kind is DatabaseKind.SQLITE:
        pytest.skip("SQLite reads launches by their runs: see the test above")
    for _ in range(3):
        succeeded(store)
    settle(store)
    columns = "attempt, turn, instance, epoch, host_id, boot_id, pid_namespace, cookie, state"
    with store.db.transaction():
        store.db.execute(
            f"INSERT INTO process_lease (run, {columns}, processes_ended, created_at, closed_at)"  # noqa: S608 - literals
            f" SELECT 1000 + n, {columns}, 0, 0, 0 FROM process_lease, generate_series(1, 5000) n"
            " WHERE id = 1"
        )
        store.db.execute("ANALYZE process_lease")
        store.db.execute("ANALYZE run")
    # Makes PostgreSQL join a few runs as it would join many, if the query permits it.
    for join in ("nestloop", "mergejoin"):
        store.db.execute(f"SET enable_{join} = off")
    asked: list[str] = []
    execute = store.db.execute

    def note(sql: str, params: Sequence[object] = ()) -> Any:
        asked.extend(row[0] for row in execute(f"EXPLAIN {sql}", params).fetchall())
        return execute(sql, params)

    store.db.execute = note  # type: ignore[method-assign]
    removable(store)
    for kind in PARTS:
        mark(store, kind)

    assert [line for line in asked if "process_lease_run" in line] != []
    assert [line for line in asked if "Seq Scan on process_lease" in line] == []


def test_a_run_with_many_rows_is_removed_in_short_transactions_its_own_row_last(
    store: ServiceStore,
) -> None:
    """On SQLite every other write waits for a transaction."""
    run = succeeded(store)
    settle(store)
    mark(store, RetentionKind.OUTPUTS)
    with store.db.transaction():
        for number in range(1001, 1046):
            store.db.execute(
                "INSERT INTO run_event (run, no, kind, status, attempt, interaction, happened_at)"
                " VALUES (?, ?, 'x', 'x', 1, 0, 0)",
                (run.key, number),
            )
    count = "SELECT count(*) FROM run_event WHERE run = ?"
    ((before,),) = store.rows(count, run.key)
    found: list[tuple[int, int]] = []

    def remove_some() -> retention.Progress:
        return retention.remove_runs(
            store.db, [run.key], owner=store.owner, now=store.now, within_s=0
        )

    while not (progress := remove_some()).handled:
        ((left,),) = store.rows(count, run.key)
        ((rows,),) = store.rows("SELECT count(*) FROM run WHERE id = ?", run.key)
        found.append((left, rows))

    steps = [(before - retention.PIECE, 1), (before - 2 * retention.PIECE, 1), (0, 1)]
    assert [step for number, step in enumerate(found) if step not in found[:number]] == steps
    assert progress.changed == [run.key]
    assert store.rows("SELECT * FROM removed_part") == []
    with pytest.raises(RunNotFound):
        store.get(run)


def test_a_transaction_marks_as_many_runs_as_its_time_permits(store: ServiceStore) -> None:
    keys = [succeeded(store).key for _ in range(3)]
    settle(store)

    def mark_some(within_s: float, kind: RetentionKind) -> retention.Progress:
        return retention.mark_removed(
            store.db, [kind], keys, owner=store.owner, now=store.now, within_s=within_s
        )

    assert mark_some(0, RetentionKind.OUTPUTS).handled == 1
    assert mark_some(LONG_S, RetentionKind.WORKSPACES).changed == keys


def test_a_mark_does_not_write_the_run_again(store: ServiceStore) -> None:
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL keeps large columns apart from their rows")
    run = succeeded(store)
    store.set(run, input="x" * 900_000)
    settle(store)
    wal = Path(f"{store.db.name}-wal")
    store.db.fetch_all("PRAGMA wal_checkpoint(TRUNCATE)")

    assert mark(store, RetentionKind.OUTPUTS) == [run.key]

    assert 0 < wal.stat().st_size < 100_000
