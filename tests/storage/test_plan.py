"""A plan is what the restart that follows decides, run by run and in total; it changes nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from runrecovery.v1 import recovery_service_pb2 as pb
from runrecovery_service.domain.plan import PlannedDecision, RecoveryPlan
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
from runrecovery_service.engines.sessions.lines import FOUND
from runrecovery_service.recovery.bulk_session_check import (
    CHECK_S,
    BulkSessionCheck,
    changed_findings,
)
from runrecovery_service.recovery.plan import Planner
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.recovery_service import RecoveryDeps, RecoveryService
from runrecovery_service.storage import recovery_apply, recovery_preview, session_checks
from runrecovery_service.storage.async_storage import (
    POSTGRESQL_CONNECTIONS,
    READER_THREADS,
    Storage,
)
from runrecovery_service.storage.recovery_apply import Tally
from runrecovery_service.storage.sql_dialects import DatabaseKind

from .conftest import World


def planner(
    world: World, checks: dict[str, SessionCheck] | None = None, *, check_s: float = CHECK_S
) -> Planner:
    return Planner(
        owner=world.owner,
        sessions=BulkSessionCheck(
            checks=checks or {},
            workspace=lambda key, attempt: Path(f"/{key}/{attempt}"),
            check_s=check_s,
        ),
    )


def each(look: Callable[[StoredHandle], SessionFinding]) -> SessionCheck:
    """A check that looks at one handle after the other."""
    return SessionCheck(lambda handles: [look(stored) for stored in handles])


def all_are(reason: SessionReason) -> SessionCheck:
    """A check that finds the same everywhere."""
    return each(lambda stored: FOUND[reason])


def planned(world: World, made: Planner, *, limit: int = 2) -> list[PlannedDecision]:
    found: list[PlannedDecision] = []
    after: tuple[int, ...] | None = None
    while True:
        page, _ = made.decide(made.read(world.db, after=after, limit=limit))
        found += page.rows
        after = page.after
        if after is None:
            return found


def totals_of(world: World, made: Planner) -> RecoveryPlan:
    _, totals = made.decide(made.read(world.db, after=None, limit=1))
    assert totals is not None
    return totals


def one_of_each(world: World) -> list[Run]:
    """A run in every situation that a restart tells apart."""
    replied = world.waiting()
    world.reply(replied)
    held = world.take()
    assert held is not None
    canceled = world.waiting(profile=Profile.STICKY_PROCESS)
    world.cancel(canceled)
    damaged = world.waiting()
    world.set(damaged, input="{")
    unknown = world.waiting()
    world.set(unknown, profile="NEWER")
    lost = world.waiting()
    world.set(lost, session_value=None)
    again = world.running(restart_policy=RestartPolicy.REQUEUE, max_attempts=3).run
    return [
        replied, canceled, damaged, unknown, lost, again, world.waiting(), world.running().run,
        world.waiting(profile=Profile.STICKY_PROCESS), world.create(),
        world.create(restart_policy=RestartPolicy.REQUEUE, max_attempts=3),
    ]  # fmt: skip


def recover(world: World, checks: dict[str, SessionCheck]) -> Tally:
    """Restart as the service does: sessions are checked before anything is decided."""
    world.restart()
    scope = world.begin()
    bulk = planner(world, checks).sessions
    for found in changed_findings(world.db, scope, bulk):
        session_checks.record_findings(world.db, scope, found)
    tally, after = Tally(), 0
    while batch := recovery_apply.next_batch(world.db, scope, after=after, rows=3):
        tally += recovery_apply.apply_batch(world.db, scope, batch, report=lambda db, tally: None)
        after = batch.last
    return tally


def demand_plan_comes_true(world: World, checks: dict[str, SessionCheck]) -> None:
    made = planner(world, checks)
    decisions, totals = planned(world, made), totals_of(world, made)
    before = {
        one.run_id: world.db.fetch_one(
            "SELECT recovery_count FROM run WHERE run_id = ?", (one.run_id,)
        )
        for one in decisions
    }

    tally = recover(world, checks)

    for one in decisions:
        row = world.db.fetch_one(
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


def test_a_plan_comes_true_again_and_again(world: World) -> None:
    one_of_each(world)
    for _ in range(3):
        demand_plan_comes_true(world, {})


def test_a_plan_knows_what_the_engines_checks_will_say(world: World) -> None:
    runs = [world.waiting(engine="checked") for _ in range(4)]
    world.reply(runs[3])
    gone = {f"/{run.key}/1" for run in runs[1:]}

    def look(stored: StoredHandle) -> SessionFinding:
        there = stored.handle == "secret" and str(stored.workspace) not in gone
        return FOUND[SessionReason.WHOLE if there else SessionReason.MISSING]

    demand_plan_comes_true(world, {"checked": each(look)})
    gone.clear()  # it failed them; their sessions come back too late
    demand_plan_comes_true(world, {"checked": each(look)})


@pytest.mark.parametrize("unknown", UnknownSession)
def test_a_plan_knows_what_becomes_of_sessions_that_cannot_be_judged(
    world: World, unknown: UnknownSession
) -> None:
    runs = [world.waiting(engine="checked") for _ in range(3)]
    world.reply(runs[2])
    reasons = [SessionReason.NOT_KNOWN, SessionReason.WHOLE, SessionReason.NOT_ANSWERED]
    of = {
        f"/{run.key}/1": apply_policy(FOUND[reason], unknown)
        for run, reason in zip(runs, reasons, strict=True)
    }
    checks = {"checked": each(lambda stored: of[str(stored.workspace)])}

    demand_plan_comes_true(world, checks)

    statuses = [world.get(run).status for run in runs]
    kept = unknown is UnknownSession.KEEP
    assert [status is RunStatus.FAILED for status in statuses] == [not kept, False, not kept]
    verdict = "UNKNOWN" if kept else "UNKNOWN_REFUSED"
    assert world.rows(
        "SELECT session_verdict, session_reason FROM recovery_event ORDER BY run"
    ) == [(verdict, "not_known"), ("VALID", "whole"), (verdict, "not_answered")]


def test_a_check_is_asked_in_bulk_and_told_the_mark(world: World) -> None:
    runs = [world.waiting(engine="checked") for _ in range(3)]
    world.set(runs[1], session_mark="7 -5")
    asked: list[list[StoredHandle]] = []

    def check(handles: Sequence[StoredHandle]) -> list[SessionFinding]:
        asked.append(list(handles))
        return [FOUND[SessionReason.WHOLE] for _ in handles]

    recover(world, {"checked": SessionCheck(check)})

    (handles,) = asked
    assert [one.fingerprint for one in handles] == [None, SessionFingerprint(7, -5), None]
    assert [one.workspace for one in handles] == [Path(f"/{run.key}/1") for run in runs]


def test_a_session_that_came_back_counts_again(world: World) -> None:
    run = world.waiting(engine="checked")
    world.set(run, session_verdict="INVALID")

    demand_plan_comes_true(world, {"checked": all_are(SessionReason.WHOLE)})


def test_a_handle_without_a_type_is_none_whatever_its_check_says(world: World) -> None:
    run = world.waiting(engine="checked")
    world.set(run, session_type=None, session_verdict="INVALID")

    demand_plan_comes_true(world, {"checked": all_are(SessionReason.WHOLE)})


def test_a_plan_changes_nothing(world: World) -> None:
    one_of_each(world)
    before = world.dump()
    made = planner(world, {"demo": all_are(SessionReason.MISSING)})

    planned(world, made)
    totals_of(world, made)

    assert world.dump() == before


def test_a_plan_counts_the_launches_that_would_be_ended(world: World) -> None:
    world.running()
    world.waiting(profile=Profile.STICKY_PROCESS)
    world.waiting()

    assert totals_of(world, planner(world)).launches == 2


def test_an_empty_store_has_an_empty_plan(world: World) -> None:
    totals = totals_of(world, planner(world))

    assert (planned(world, planner(world)), totals.runs_total, totals.decisions) == ([], 0, ())


def test_a_plan_looks_at_sessions_when_its_rows_are_read(world: World) -> None:
    for _ in range(3):
        world.waiting(engine="checked")
    asked: list[str] = []

    def look(stored: StoredHandle) -> SessionFinding:
        asked.append(stored.handle)
        return FOUND[SessionReason.MISSING]

    made = planner(world, {"checked": each(look)})
    rows = made.read(world.db, after=None, limit=2)
    assert asked == []
    assert not world.db.peewee.in_transaction()
    world.db.close()

    page, totals = made.decide(rows)

    assert len(asked) == 3  # each once, also those of the page
    assert totals is not None
    assert {count.rule: count.count for count in totals.decisions} == {"session_handle_lost": 3}
    assert [one.decision.rule for one in page.rows] == ["session_handle_lost"] * 2
    assert world.db.peewee.is_closed()


@pytest.mark.parametrize("unknown", UnknownSession)
def test_plans_leave_a_check_alone_that_does_not_answer(
    world: World, unknown: UnknownSession
) -> None:
    world.waiting(engine="hangs")
    release, asked = threading.Event(), list[int]()

    def hang(handles: Sequence[StoredHandle]) -> Iterator[SessionFinding]:
        asked.append(len(handles))
        release.wait()
        yield FOUND[SessionReason.WHOLE]

    made = planner(world, {"hangs": SessionCheck(hang, unknown)}, check_s=0.0)
    kept = unknown is UnknownSession.KEEP
    try:
        for _ in range(3):
            (found,) = planned(world, made)
            rule = "resumable_waiting_preserved" if kept else "session_handle_lost"
            assert found.decision.rule == rule
        assert asked == [1]
    finally:
        release.set()


def test_a_plan_is_of_one_moment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [world.waiting(engine="checked") for _ in range(3)]
    look = recovery_preview.count_situations

    def answer() -> None:
        world.reply(runs[0])
        world.db.close()

    def answered_after_the_look(*args: Any) -> Any:
        seen = look(*args)
        with ThreadPoolExecutor(1) as other:
            other.submit(answer).result(30)
        return seen

    monkeypatch.setattr(recovery_preview, "count_situations", answered_after_the_look)
    checks: dict[str, SessionCheck] = {"checked": all_are(SessionReason.MISSING)}

    made = planner(world, checks)
    page, totals = made.decide(made.read(world.db, after=None, limit=9))

    assert totals is not None
    assert {count.rule: count.count for count in totals.decisions} == {"session_handle_lost": 3}
    assert [one.decision.rule for one in page.rows] == ["session_handle_lost"] * 3


async def test_a_plan_that_waits_for_files_keeps_no_thread_of_the_store(world: World) -> None:
    world.waiting(engine="hangs")
    release, asked = threading.Event(), threading.Event()

    def hang(handles: Sequence[StoredHandle]) -> Iterator[SessionFinding]:
        asked.set()
        release.wait()
        yield from (FOUND[SessionReason.WHOLE] for _ in handles)

    storage = Storage(world.db)
    is_sqlite = world.db.dialect.kind is DatabaseKind.SQLITE
    all_read = threading.Barrier(READER_THREADS if is_sqlite else POSTGRESQL_CONNECTIONS)
    deps = RecoveryDeps(
        storage=storage,
        owner=world.owner,
        status=RecoveryStatus(),
        planner=planner(world, {"hangs": SessionCheck(hang)}, check_s=600.0),
    )
    service = RecoveryService(deps, Gate())
    plans = [
        asyncio.create_task(service.plan_recovery(pb.PlanRecoveryRequest())) for _ in range(12)
    ]
    try:
        await asyncio.to_thread(asked.wait, 60)

        async with asyncio.timeout(60):
            # They wait for each other, on all threads that there are.
            await asyncio.gather(
                *(storage.read(lambda db: all_read.wait(30)) for _ in range(all_read.parties))
            )
    finally:
        release.set()
        answers = await asyncio.gather(*plans)
        await asyncio.to_thread(storage.close)

    assert [answer.plan.runs_total for answer in answers] == [1] * 12
