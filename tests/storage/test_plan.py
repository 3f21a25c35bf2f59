"""A plan is what the restart that follows decides, run by run and in total; it changes nothing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from runrecovery_service.domain.plan import PlannedDecision
from runrecovery_service.domain.run import Profile, RestartPolicy, Run
from runrecovery_service.recovery.plan import Planner
from runrecovery_service.recovery.sessions import SessionCheck, changed_verdicts
from runrecovery_service.storage import converge
from runrecovery_service.storage.converge import Tally

from .conftest import World


def planner(world: World, checks: dict[str, SessionCheck] | None = None) -> Planner:
    return Planner(
        owner=world.owner,
        session_checks=checks or {},
        workspace=lambda key, attempt: Path(f"/{key}/{attempt}"),
    )


def planned(world: World, made: Planner, *, limit: int = 2) -> list[PlannedDecision]:
    found: list[PlannedDecision] = []
    after: tuple[int, ...] | None = None
    while True:
        page = made.page(world.db, after=after, limit=limit)
        found += page.rows
        after = page.after
        if after is None:
            return found


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
    made = planner(world, checks)
    for verdicts in changed_verdicts(world.db, scope, checks, made.workspace):
        converge.record_verdicts(world.db, scope, verdicts)
    tally, after = Tally(), 0
    while batch := converge.next_batch(world.db, scope, after=after, rows=3):
        tally += converge.converge(world.db, scope, batch, report=lambda db, tally: None)
        after = batch.last
    return tally


def demand_plan_comes_true(world: World, checks: dict[str, SessionCheck]) -> None:
    made = planner(world, checks)
    decisions, totals = planned(world, made), made.totals(world.db)
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
        assert row[:2] == (one.verdict.rule, one.verdict.state)
        assert one.verdict.becomes in {None, row[2]}
        assert (row[3] == counted[0]) is one.verdict.unchanged
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

    def check(workspace: Path, handle: str) -> bool:
        return handle == "secret" and str(workspace) not in gone

    demand_plan_comes_true(world, {"checked": check})
    gone.clear()  # it failed them; their sessions come back too late
    demand_plan_comes_true(world, {"checked": check})


def test_a_session_that_came_back_counts_again(world: World) -> None:
    run = world.waiting(engine="checked")
    world.set(run, session_verdict="INVALID")

    demand_plan_comes_true(world, {"checked": lambda workspace, handle: True})


def test_a_handle_without_a_type_is_none_whatever_its_check_says(world: World) -> None:
    run = world.waiting(engine="checked")
    world.set(run, session_type=None, session_verdict="INVALID")

    demand_plan_comes_true(world, {"checked": lambda workspace, handle: True})


def test_a_plan_changes_nothing(world: World) -> None:
    one_of_each(world)
    before = world.dump()
    made = planner(world, {"demo": lambda workspace, handle: False})

    planned(world, made)
    made.totals(world.db)

    assert world.dump() == before


def test_a_plan_counts_the_launches_that_would_be_ended(world: World) -> None:
    world.running()
    world.waiting(profile=Profile.STICKY_PROCESS)
    world.waiting()

    assert planner(world).totals(world.db).launches == 2


def test_an_empty_store_has_an_empty_plan(world: World) -> None:
    totals = planner(world).totals(world.db)

    assert (planned(world, planner(world)), totals.runs_total, totals.decisions) == ([], 0, ())


def test_a_plan_is_of_one_moment(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [world.waiting(engine="checked") for _ in range(3)]
    look = converge.situations

    def answer() -> None:
        world.reply(runs[0])
        world.db.close()

    def answered_after_the_look(*args: Any) -> Any:
        seen = look(*args)
        with ThreadPoolExecutor(1) as other:
            other.submit(answer).result(30)
        return seen

    monkeypatch.setattr(converge, "situations", answered_after_the_look)
    checks: dict[str, SessionCheck] = {"checked": lambda workspace, handle: False}

    page, totals = planner(world, checks).first(world.db, limit=9)

    assert {count.rule: count.count for count in totals.decisions} == {"session_handle_lost": 3}
    assert [one.verdict.rule for one in page.rows] == ["session_handle_lost"] * 3
