"""Once a newer epoch is claimed, the older one writes nothing more."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.domain.run import Profile, RunError, Session
from runrecovery_service.domain.session_check import SessionFinding, SessionVerdict
from runrecovery_service.domain.turn import Asked, Failed, Interrupted, Succeeded
from runrecovery_service.recovery.report import ReportBuilder
from runrecovery_service.storage import (
    deadlines,
    instances,
    launch_records,
    recovery_apply,
    reopening,
    reports,
    session_checks,
    trust,
    turns,
)
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.launch_records import LaunchEnd
from runrecovery_service.storage.trust import EntryOutcome, TrustEntry

from .conftest import GONE, QUESTION, World, boot, receipt

STUCK = LaunchEnd(exit_code=None, processes_ended=1, gone=False)
ENTRY: dict[str, Any] = {"file": "/f", "folder": "/d", "place": "p", "cli": "codex", "added": "{}"}
ENDS = (
    Asked(QUESTION),
    Succeeded({"x": 1}),
    Failed(RunError(code="ENGINE_FAILED", message="The agent was ended by signal 15.")),
    Interrupted("The service stood still."),
)


class Prepared:
    """Runs in every situation that a write is about; all of it of the first epoch."""

    def __init__(self, world: World) -> None:
        self.world = world
        lost = world.waiting()
        world.set(lost, session_verdict="INVALID")
        world.recover()
        self.lost = world.get(lost)
        self.timed = world.waiting(max_run_s=1.0)
        world.set(self.lost, session_value="left over")
        self.waits = world.waiting(profile=Profile.STICKY_PROCESS, session_timeout_s=1.0)
        self.asked = world.waiting()
        self.gated = world.running()
        launch_records.record_gated(
            world.db, self.gated.launch, owner=world.owner, pid=4242, start_ticks=99
        )
        self.answered = world.running(profile=Profile.STICKY_PROCESS)
        world.reply(world.ask_and_stay(self.answered))
        self.stuck = world.running()
        world.end(self.stuck, ENDS[2], ended=STUCK)
        self.intended = world.running()
        self.entry = TrustEntry(
            run_key=self.intended.run.key, run_id=self.intended.run.run_id, attempt=1, **ENTRY
        )
        trust.record_entry(world.db, self.entry, host_id="host", owner=world.owner, now=world.now)
        self.queued = world.create()
        self.report = ReportBuilder(
            owner=world.owner,
            reconciliation_id="under way",
            cause=Cause.SHUTDOWN,
            safe_mode=False,
            clock=world.ticking_clock,
        )
        self.report.open(world.db)
        self.scope = world.scope(self.report.key, Cause.SHUTDOWN)
        instances.resign(world.db, world.owner)
        world.wait(2000)


def _turn(prepared: Prepared, use: Callable[..., Any], **facts: Any) -> Any:
    return use(prepared.world.db, prepared.gated, owner=prepared.world.owner, **facts)


def _end(prepared: Prepared, end: Any) -> Any:
    return _turn(
        prepared, turns.record_end, end=end, ended=GONE, due=None,
        now=prepared.world.now,
    )  # fmt: skip


def _by_time(prepared: Prepared, use: Callable[..., Any], key: int) -> Any:
    world = prepared.world
    return use(world.db, key, owner=world.owner, now=world.now, steady=world.steady)


def _reopen(prepared: Prepared) -> Any:
    world = prepared.world
    return reopening.reopen(
        world.db, prepared.lost.run_id, handle="h", session_type=lambda _: "jsonl",
        owner=world.owner, etag=None, receipt=receipt(), due_in=world.due_in,
        steady=world.steady, now=world.now,
    )  # fmt: skip


def _end_window(prepared: Prepared) -> None:
    world = prepared.world
    world.wait(7200)
    deadlines.end_reopening(world.db, [prepared.lost.key], owner=world.owner, steady=world.steady)


def _rearm(prepared: Prepared) -> None:
    world = prepared.world
    world.reboot(5)
    deadlines.move_to_clock(world.db, world.owner, now=world.now, steady=world.steady)


def _converge(prepared: Prepared) -> Any:
    world = prepared.world
    batch = recovery_apply.next_batch(world.db, prepared.scope, after=0, rows=100)
    assert batch is not None
    return recovery_apply.apply_batch(world.db, prepared.scope, batch, report=prepared.report.write)


WRITES: dict[str, Callable[[Prepared], object]] = {
    "create": lambda p: p.world.create(with_receipt=receipt()),
    "reply": lambda p: p.world.reply(p.asked, receipt=receipt()),
    "cancel a queued run": lambda p: p.world.cancel(p.queued, receipt=receipt()),
    "cancel a running run": lambda p: p.world.cancel(p.gated.run),
    "reopen": _reopen,
    "take a run": lambda p: p.world.take(),
    "give runs back": lambda p: turns.requeue_unlaunched(
        p.world.db, owner=p.world.owner, held=(), now=p.world.now
    ),
    "keep a session": lambda p: _turn(
        p, turns.record_session, session=Session(type="demo", handle="h", turn=1), now=p.world.now
    ),
    "a delivered reply": lambda p: turns.record_delivered(
        p.world.db, p.answered, owner=p.world.owner
    ),
    "a sticky question": lambda p: _turn(
        p,
        turns.record_sticky_question,
        number=1,
        question=QUESTION,
        due=p.world.due_in(1),
        now=p.world.now,
    ),
    **{f"{type(end).__name__} turn": partial(_end, end=end) for end in ENDS},
    "a shim at its gate": lambda p: launch_records.record_gated(
        p.world.db, p.intended.launch, owner=p.world.owner, pid=1, start_ticks=1
    ),
    "a gate that opens": lambda p: launch_records.record_running(
        p.world.db, p.gated.launch, owner=p.world.owner
    ),
    "orphans": lambda p: launch_records.close_all(
        p.world.db, [(p.gated.launch, STUCK)], now=p.world.now, reconciliation_key=p.report.key
    ),
    "a straggler": lambda p: launch_records.record_late_end(
        p.world.db, [(p.stuck.launch, GONE)], now=p.world.now
    ),
    "the end of a wait": lambda p: _by_time(p, deadlines.end_wait, p.waits.key),
    "the end of a run's time": lambda p: _by_time(p, deadlines.end_run, p.timed.key),
    "the end of a window": _end_window,
    "other clocks": _rearm,
    "a report that begins": lambda p: p.world.begin(),
    "a report that goes on": lambda p: p.report.write(p.world.db),
    "a report that ends": lambda p: p.report.complete(p.world.db),
    "reports of the dead": lambda p: reports.close_abandoned(p.world.db),
    "decisions": _converge,
    "bindings": lambda p: recovery_apply.clear_stale_bindings(p.world.db, p.world.owner),
    "checks of sessions": lambda p: session_checks.record_findings(
        p.world.db, p.scope, {p.asked.key: SessionFinding(SessionVerdict.INVALID, None)}
    ),
    "a trust entry": lambda p: trust.record_entry(
        p.world.db, p.entry, host_id="host", owner=p.world.owner, now=p.world.now
    ),
    "a trust entry that went": lambda p: trust.record_outcome(
        p.world.db, EntryOutcome(forget=(p.entry,)), only_stale=False
    ),
}  # fmt: skip


@pytest.fixture
def prepared(world: World) -> Prepared:
    return Prepared(world)


def content(world: World) -> object:
    return world.dump(), world.dump("trust_entry")


class _Undone(Exception):
    pass


def changes(prepared: Prepared, what: str) -> bool:
    """Return whether it writes anything at all; it is undone."""
    world, before = prepared.world, content(prepared.world)
    after = before
    with suppress(_Undone), world.db.transaction():
        WRITES[what](prepared)
        after = content(world)
        raise _Undone
    assert before == content(world)
    return before != after


@pytest.mark.parametrize("what", WRITES)
def test_an_epoch_that_was_superseded_writes_nothing(prepared: Prepared, what: str) -> None:
    world = prepared.world
    assert changes(prepared, what)
    world.db.guard(partial(instances.demand_current, owner=world.owner))
    of_the_next_start = Database(world.db.peewee, world.db.dialect, world.db.name)
    instances.claim(of_the_next_start, boot(), now=world.tick())
    before = content(world)

    with pytest.raises(Fenced):
        WRITES[what](prepared)

    assert before == content(world)
