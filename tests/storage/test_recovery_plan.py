"""A plan shows the decisions of the next restart, run by run and in total; it changes nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from runrecovery.v1 import recovery_service_pb2 as pb
from runrecovery_service.domain.plan import Outcome, PlannedDecision, RecoveryPlan, Work
from runrecovery_service.domain.run import Profile, RestartPolicy, Run, RunStatus
from runrecovery_service.domain.session_check import (
    SessionCheck,
    SessionFinding,
    SessionFingerprint,
    SessionReason,
    StoredHandle,
    UnknownSession,
    apply_policy,
)
from runrecovery_service.domain.usage import TurnUsage, Usage
from runrecovery_service.engines.sessions.lines import FOUND
from runrecovery_service.recovery.bulk_session_check import (
    CHECK_S,
    BulkSessionCheck,
    changed_findings,
)
from runrecovery_service.recovery.plan import Planner
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.paging import PageTokens
from runrecovery_service.rpc.recovery_service import RecoveryDeps, RecoveryService
from runrecovery_service.storage import (
    recovery_apply,
    recovery_preview,
    session_checks,
    turns,
)
from runrecovery_service.storage.async_storage import (
    POSTGRESQL_CONNECTIONS,
    READER_THREADS,
    Storage,
)
from runrecovery_service.storage.recovery_apply import Tally
from runrecovery_service.storage.rows import to_us
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.turns import Turn
from storage.service_store import ServiceStore


def planner(
    store: ServiceStore, checks: dict[str, SessionCheck] | None = None, *, check_s: float = CHECK_S
) -> Planner:
    return Planner(
        owner=store.owner,
        sessions=BulkSessionCheck(
            checks=checks or {},
            workspace=lambda key, attempt: Path(f"/{key}/{attempt}"),
            check_s=check_s,
        ),
        clock=store.ticking_clock,
    )


def each(look: Callable[[StoredHandle], SessionFinding]) -> SessionCheck:
    """Return a check that calls `look` for one handle after the other."""
    return SessionCheck(lambda handles: [look(stored) for stored in handles])


def all_are(reason: SessionReason) -> SessionCheck:
    """Return a check with the same finding for every handle."""
    return each(lambda stored: FOUND[reason])


def planned(store: ServiceStore, made: Planner, *, limit: int = 2) -> list[PlannedDecision]:
    found: list[PlannedDecision] = []
    after: tuple[int, ...] | None = None
    while True:
        page, _ = made.decide(made.read(store.db, after=after, limit=limit))
        found += page.rows
        after = page.after
        if after is None:
            return found


def totals_of(store: ServiceStore, made: Planner) -> RecoveryPlan:
    _, totals = made.decide(made.read(store.db, after=None, limit=1))
    assert totals is not None
    return totals


def one_of_each(store: ServiceStore) -> list[Run]:
    """Create a run in every situation that a restart distinguishes."""
    replied = store.waiting()
    store.reply(replied)
    held = store.take()
    assert held is not None
    canceled = store.waiting(profile=Profile.STICKY_PROCESS)
    store.cancel(canceled)
    damaged = store.waiting()
    store.set(damaged, input="{")
    unknown = store.waiting()
    store.set(unknown, profile="NEWER")
    lost = store.waiting()
    store.set(lost, session_value=None)
    again = store.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=3).run
    return [
        replied, canceled, damaged, unknown, lost, again, store.waiting(), store.running().run,
        store.waiting(profile=Profile.STICKY_PROCESS), store.create(),
        store.create(restart_policy=RestartPolicy.REQUEUE, max_attempts=3),
    ]  # fmt: skip


def test_a_plan_says_what_work_is_at_stake(store: ServiceStore) -> None:
    def used(turn: Turn, tokens: int) -> None:
        usage = TurnUsage(turn=Usage(input_tokens=tokens, output_tokens=1))
        turns.record_usage(store.db, turn, owner=store.owner, used=usage)

    resume: dict[str, Any] = {
        "restart_policy": RestartPolicy.RESUME, "max_resumes": 3, "max_attempts": 2,
        "engine": "checked",
    }  # fmt: skip
    for tokens, policy in ((10, {}), (20, {}), (40, resume), (80, resume)):
        turn = store.running(**policy)
        used(turn, tokens)
        if policy:
            store.keep_session(turn, f"kept-{tokens}")
    store.waiting()
    store.reply(store.waiting(engine="checked"))
    store.create(restart_policy=RestartPolicy.REQUEUE, max_attempts=2)
    store.advance(100)

    def look(stored: StoredHandle) -> SessionFinding:
        return FOUND[SessionReason.MISSING if stored.handle == "kept-80" else SessionReason.WHOLE]

    began = store.now
    plan = totals_of(store, planner(store, {"checked": each(look)}))

    taken = store.db.fetch_all("SELECT created_at FROM process_lease WHERE state = 'INTENT'")
    ages = [to_us(began) + 1_000_000 - at for (at,) in sorted(taken)]
    assert min(ages) > 100_000_000
    assert plan.groups == (
        (Outcome.KEPT_WAITING, Work(runs=1)),
        (Outcome.REPLY_DELIVERED, Work(runs=1)),
        (Outcome.RESUMED, Work(runs=1, tokens=41, running_us=ages[2])),
        (Outcome.RESTARTED, Work(runs=2, tokens=81, running_us=ages[3])),
        (Outcome.FAILED, Work(runs=2, tokens=32, running_us=ages[0] + ages[1])),
    )
    assert sum(work.runs for _, work in plan.groups) == plan.runs_total


def recover(store: ServiceStore, checks: dict[str, SessionCheck]) -> Tally:
    """Restart as the service does: sessions are checked before anything is decided."""
    store.restart()
    scope = store.open_report()
    bulk = planner(store, checks).sessions
    for found in changed_findings(store.db, scope, bulk):
        session_checks.record_findings(store.db, scope, found)
    tally, after = Tally(), 0
    while batch := recovery_apply.next_batch(store.db, scope, after=after, rows=3):
        tally += recovery_apply.apply_batch(store.db, scope, batch, report=lambda db, tally: None)
        after = batch.last
    return tally


def demand_plan_comes_true(store: ServiceStore, checks: dict[str, SessionCheck]) -> None:
    made = planner(store, checks)
    decisions, totals = planned(store, made), totals_of(store, made)
    before = {
        one.run_id: store.db.fetch_one(
            "SELECT recovery_count FROM run WHERE run_id = ?", (one.run_id,)
        )
        for one in decisions
    }

    tally = recover(store, checks)

    for one in decisions:
        row = store.db.fetch_one(
            "SELECT recovery_reason, recovery_state, status, recovery_count FROM run"
            " WHERE run_id = ?",
            (one.run_id,),
        )
        assert row is not None
        counted = before[one.run_id]
        assert counted is not None
        assert row[:2] == (one.decision.rule, one.decision.state)
        assert one.decision.becomes in {None, row[2]}
        assert (row[3] == counted[0]) is one.decision.unchanged
    assert {count.rule: count.count for count in totals.decisions} == tally.decisions
    assert (totals.runs_unchanged, totals.quarantined) == (tally.unchanged, tally.quarantined)
    assert totals.runs_total == len(decisions) == tally.scanned


def test_a_plan_is_what_each_of_several_restarts_decides(store: ServiceStore) -> None:
    one_of_each(store)
    for _ in range(3):
        demand_plan_comes_true(store, {})


def test_a_plan_uses_the_session_checks_of_the_engines(store: ServiceStore) -> None:
    runs = [store.waiting(engine="checked") for _ in range(4)]
    store.reply(runs[3])
    gone = {f"/{run.key}/1" for run in runs[1:]}

    def look(stored: StoredHandle) -> SessionFinding:
        there = stored.handle == "secret" and str(stored.workspace) not in gone
        return FOUND[SessionReason.WHOLE if there else SessionReason.MISSING]

    demand_plan_comes_true(store, {"checked": each(look)})
    gone.clear()  # the restart has failed the runs: their sessions come back too late
    demand_plan_comes_true(store, {"checked": each(look)})


@pytest.mark.parametrize("unknown", UnknownSession)
def test_a_plan_applies_the_policy_for_sessions_that_cannot_be_judged(
    store: ServiceStore, unknown: UnknownSession
) -> None:
    runs = [store.waiting(engine="checked") for _ in range(3)]
    store.reply(runs[2])
    reasons = [SessionReason.NOT_KNOWN, SessionReason.WHOLE, SessionReason.NOT_ANSWERED]
    of = {
        f"/{run.key}/1": apply_policy(FOUND[reason], unknown)
        for run, reason in zip(runs, reasons, strict=True)
    }
    checks = {"checked": each(lambda stored: of[str(stored.workspace)])}

    demand_plan_comes_true(store, checks)

    statuses = [store.get(run).status for run in runs]
    kept = unknown is UnknownSession.KEEP
    assert [status is RunStatus.FAILED for status in statuses] == [not kept, False, not kept]
    verdict = "UNKNOWN" if kept else "UNKNOWN_REFUSED"
    assert store.rows(
        "SELECT session_verdict, session_reason FROM recovery_event ORDER BY run"
    ) == [(verdict, "not_known"), ("VALID", "whole"), (verdict, "not_answered")]


def test_a_check_gets_handles_in_bulk_with_their_fingerprints(store: ServiceStore) -> None:
    runs = [store.waiting(engine="checked") for _ in range(3)]
    store.set(runs[1], session_mark="7 -5")
    asked: list[list[StoredHandle]] = []

    def check(handles: Sequence[StoredHandle]) -> list[SessionFinding]:
        asked.append(list(handles))
        return [FOUND[SessionReason.WHOLE] for _ in handles]

    recover(store, {"checked": SessionCheck(check)})

    (handles,) = asked
    assert [one.fingerprint for one in handles] == [None, SessionFingerprint(7, -5), None]
    assert [one.workspace for one in handles] == [Path(f"/{run.key}/1") for run in runs]


def test_a_session_that_is_back_is_valid_again(store: ServiceStore) -> None:
    run = store.waiting(engine="checked")
    store.set(run, session_verdict="INVALID")

    demand_plan_comes_true(store, {"checked": all_are(SessionReason.WHOLE)})


def test_a_handle_without_a_type_counts_as_missing(store: ServiceStore) -> None:
    run = store.waiting(engine="checked")
    store.set(run, session_type=None, session_verdict="INVALID")

    demand_plan_comes_true(store, {"checked": all_are(SessionReason.WHOLE)})


def test_a_plan_changes_nothing(store: ServiceStore) -> None:
    one_of_each(store)
    before = store.dump()
    made = planner(store, {"demo": all_are(SessionReason.MISSING)})

    planned(store, made)
    totals_of(store, made)

    assert store.dump() == before


def test_a_plan_counts_the_launches_that_would_be_ended(store: ServiceStore) -> None:
    store.running()
    store.waiting(profile=Profile.STICKY_PROCESS)
    store.waiting()

    assert totals_of(store, planner(store)).launches == 2


def test_an_empty_store_has_an_empty_plan(store: ServiceStore) -> None:
    totals = totals_of(store, planner(store))

    assert (planned(store, planner(store)), totals.runs_total, totals.decisions) == ([], 0, ())


def test_a_plan_checks_sessions_after_its_rows_are_read(store: ServiceStore) -> None:
    for _ in range(3):
        store.waiting(engine="checked")
    asked: list[str] = []

    def look(stored: StoredHandle) -> SessionFinding:
        asked.append(stored.handle)
        return FOUND[SessionReason.MISSING]

    made = planner(store, {"checked": each(look)})
    rows = made.read(store.db, after=None, limit=2)
    assert asked == []
    assert not store.db.peewee.in_transaction()
    store.db.close()

    page, totals = made.decide(rows)

    assert len(asked) == 3  # each once, including those of the page
    assert totals is not None
    assert {count.rule: count.count for count in totals.decisions} == {"session_handle_lost": 3}
    assert [one.decision.rule for one in page.rows] == ["session_handle_lost"] * 2
    assert store.db.peewee.is_closed()


@pytest.mark.parametrize("unknown", UnknownSession)
def test_plans_do_not_call_a_check_that_has_not_answered(
    store: ServiceStore, unknown: UnknownSession
) -> None:
    store.waiting(engine="hangs")
    release, asked = threading.Event(), list[int]()

    def hang(handles: Sequence[StoredHandle]) -> Iterator[SessionFinding]:
        asked.append(len(handles))
        release.wait()
        yield FOUND[SessionReason.WHOLE]

    made = planner(store, {"hangs": SessionCheck(hang, unknown)}, check_s=0.0)
    kept = unknown is UnknownSession.KEEP
    try:
        for _ in range(3):
            (found,) = planned(store, made)
            rule = "resumable_waiting_preserved" if kept else "session_handle_lost"
            assert found.decision.rule == rule
        assert asked == [1]
    finally:
        release.set()


def test_a_plan_reads_one_snapshot(store: ServiceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [store.waiting(engine="checked") for _ in range(3)]
    look = recovery_preview.sum_situations

    def answer() -> None:
        store.reply(runs[0])
        store.db.close()

    def answered_after_the_look(*args: Any, **named: Any) -> Any:
        seen = look(*args, **named)
        with ThreadPoolExecutor(1) as other:
            other.submit(answer).result(30)
        return seen

    monkeypatch.setattr(recovery_preview, "sum_situations", answered_after_the_look)
    checks: dict[str, SessionCheck] = {"checked": all_are(SessionReason.MISSING)}

    made = planner(store, checks)
    page, totals = made.decide(made.read(store.db, after=None, limit=9))

    assert totals is not None
    assert {count.rule: count.count for count in totals.decisions} == {"session_handle_lost": 3}
    assert [one.decision.rule for one in page.rows] == ["session_handle_lost"] * 3


async def test_a_plan_that_waits_for_session_files_holds_no_thread_of_the_storage(
    store: ServiceStore,
) -> None:
    store.waiting(engine="hangs")
    release, asked = threading.Event(), threading.Event()

    def hang(handles: Sequence[StoredHandle]) -> Iterator[SessionFinding]:
        asked.set()
        release.wait()
        yield from (FOUND[SessionReason.WHOLE] for _ in handles)

    storage = Storage(store.db)
    is_sqlite = store.db.dialect.kind is DatabaseKind.SQLITE
    all_read = threading.Barrier(READER_THREADS if is_sqlite else POSTGRESQL_CONNECTIONS)
    deps = RecoveryDeps(
        storage=storage,
        owner=store.owner,
        status=RecoveryStatus(),
        planner=planner(store, {"hangs": SessionCheck(hang)}, check_s=600.0),
        page_tokens=PageTokens(key=b"key"),
    )
    service = RecoveryService(deps, Gate())
    plans = [
        asyncio.create_task(service.plan_recovery(pb.PlanRecoveryRequest())) for _ in range(12)
    ]
    try:
        await asyncio.to_thread(asked.wait, 60)

        async with asyncio.timeout(60):
            # These reads need all threads of the storage at the same time.
            await asyncio.gather(
                *(storage.read(lambda db: all_read.wait(30)) for _ in range(all_read.parties))
            )
    finally:
        release.set()
        answers = await asyncio.gather(*plans)
        await asyncio.to_thread(storage.close)

    assert [answer.plan.runs_total for answer in answers] == [1] * 12


async def test_a_plan_waits_for_the_thread_of_a_plan_whose_call_was_cancelled(
    store: ServiceStore,
) -> None:
    for _ in range(2):
        store.waiting(engine="hangs")
    release, asked = threading.Event(), threading.Event()
    checks: list[int] = []

    def hang(handles: Sequence[StoredHandle]) -> Iterator[SessionFinding]:
        checks.append(len(handles))
        asked.set()
        release.wait()
        yield from (FOUND[SessionReason.WHOLE] for _ in handles)

    storage = Storage(store.db)
    deps = RecoveryDeps(
        storage=storage,
        owner=store.owner,
        status=RecoveryStatus(),
        planner=planner(store, {"hangs": SessionCheck(hang)}, check_s=600.0),
        page_tokens=PageTokens(key=b"key"),
    )
    service = RecoveryService(deps, Gate())
    first = asyncio.create_task(service.plan_recovery(pb.PlanRecoveryRequest()))
    try:
        await asyncio.to_thread(asked.wait, 60)
        first.cancel()
        await asyncio.wait([first])

        second = asyncio.create_task(service.plan_recovery(pb.PlanRecoveryRequest()))
        for _ in range(100):  # enough time for a plan that would not wait
            await storage.read(lambda db: db.fetch_one("SELECT 1"))
        seen = len(checks)
    finally:
        release.set()
        answer = await second
        await asyncio.to_thread(storage.close)

    assert first.cancelled()
    assert seen == 1
    assert answer.plan.runs_total == 2
