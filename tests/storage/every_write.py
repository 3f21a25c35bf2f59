"""Every write of the store, and runs in the situations that the writes need."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.domain.run import Profile, RunError, Session
from runrecovery_service.domain.session_check import SessionFinding, SessionVerdict
from runrecovery_service.domain.turn import Asked, Failed, Interrupted, Succeeded
from runrecovery_service.recovery.report import ReportBuilder
from runrecovery_service.storage import (
    instances,
    launch_records,
    passed_deadlines,
    recovery_apply,
    reopening,
    reports,
    session_checks,
    stale_bindings,
    trust,
    turn_ends,
    turn_starts,
    turns,
)
from runrecovery_service.storage.launch_records import LaunchEnd
from runrecovery_service.storage.trust import EntryOutcome, TrustEntry
from storage.service_store import GONE, QUESTION, ServiceStore, receipt

STUCK = LaunchEnd(exit_code=None, processes_ended=1, gone=False)
ENTRY: dict[str, Any] = {"file": "/f", "folder": "/d", "place": "p", "cli": "codex", "added": "{}"}
ENDS = (
    Asked(QUESTION),
    Succeeded({"x": 1}),
    Failed(RunError(code="ENGINE_FAILED", message="The agent was ended by signal 15.")),
    Interrupted("The service stood still."),
)


class Prepared:
    """Runs of the first epoch, in every situation that a write needs."""

    def __init__(self, store: ServiceStore) -> None:
        self.store = store
        lost = store.waiting()
        store.set(lost, session_verdict="INVALID")
        store.recover()
        self.lost = store.get(lost)
        self.timed = store.waiting(max_run_s=1.0)
        store.set(self.lost, session_value="left over")
        self.waits = store.waiting(profile=Profile.STICKY_PROCESS, session_timeout_s=1.0)
        self.asked = store.waiting()
        self.gated = store.running()
        launch_records.record_gated(
            store.db, self.gated.launch, owner=store.owner, pid=4242, start_ticks=99
        )
        self.answered = store.running(profile=Profile.STICKY_PROCESS)
        store.reply(store.ask_and_stay(self.answered))
        self.stuck = store.running()
        store.end(self.stuck, ENDS[2], ended=STUCK)
        self.intended = store.running()
        self.entry = TrustEntry(
            run_key=self.intended.run.key, run_id=self.intended.run.run_id, attempt=1, **ENTRY
        )
        trust.record_entry(store.db, self.entry, host_id="host", owner=store.owner, now=store.now)
        self.queued = store.create()
        self.report = ReportBuilder(
            owner=store.owner,
            reconciliation_id="under way",
            cause=Cause.SHUTDOWN,
            safe_mode=False,
            clock=store.ticking_clock,
        )
        self.report.open(store.db)
        self.scope = store.scope(self.report.key, Cause.SHUTDOWN)
        instances.resign(store.db, store.owner)
        store.advance(2000)


def _turn(prepared: Prepared, use: Callable[..., Any], **facts: Any) -> Any:
    return use(prepared.store.db, prepared.gated, owner=prepared.store.owner, **facts)


def _end(prepared: Prepared, end: Any) -> Any:
    return _turn(
        prepared, turn_ends.record_end, end=end, ended=GONE, due=None, due_in=prepared.store.due_in,
        now=prepared.store.now,
    )  # fmt: skip


def _by_time(prepared: Prepared, use: Callable[..., Any], key: int) -> Any:
    store = prepared.store
    return use(store.db, key, owner=store.owner, now=store.now, steady=store.steady)


def _reopen(prepared: Prepared) -> Any:
    store = prepared.store
    return reopening.reopen(
        store.db, prepared.lost.run_id, handle="h", session_type_of=lambda _: "jsonl",
        wait_s_of=lambda _: 60.0, owner=store.owner, etag=None, receipt=receipt(),
        due_in=store.due_in, steady=store.steady, now=store.now,
    )  # fmt: skip


def _end_window(prepared: Prepared) -> None:
    store = prepared.store
    store.advance(7200)
    passed_deadlines.end_reopening(
        store.db, [prepared.lost.key], owner=store.owner, steady=store.steady
    )


def _rearm(prepared: Prepared) -> None:
    store = prepared.store
    store.reboot(5)
    passed_deadlines.move_to_clock(store.db, store.owner, now=store.now, steady=store.steady)


def _converge(prepared: Prepared) -> Any:
    store = prepared.store
    batch = recovery_apply.next_batch(store.db, prepared.scope, after=0, rows=100)
    assert batch is not None
    return recovery_apply.apply_batch(store.db, prepared.scope, batch, report=prepared.report.write)


WRITES: dict[str, Callable[[Prepared], object]] = {
    "create": lambda p: p.store.create(run_id="new", with_receipt=receipt()),
    "reply": lambda p: p.store.reply(p.asked, receipt=receipt()),
    "cancel a queued run": lambda p: p.store.cancel(p.queued, receipt=receipt()),
    "cancel a running run": lambda p: p.store.cancel(p.gated.run),
    "reopen": _reopen,
    "take a run": lambda p: p.store.take(),
    "give runs back": lambda p: turn_starts.requeue_unlaunched(
        p.store.db, owner=p.store.owner, held=(), now=p.store.now
    ),
    "keep a session": lambda p: _turn(
        p, turns.record_session, session=Session(type="demo", handle="h", turn=1), now=p.store.now
    ),
    "a delivered reply": lambda p: turns.record_delivered(
        p.store.db, p.answered, owner=p.store.owner, number=1
    ),
    "a sticky question": lambda p: _turn(
        p,
        turns.record_sticky_question,
        number=1,
        question=QUESTION,
        due=p.store.due_in(1),
        now=p.store.now,
    ),
    **{f"{type(end).__name__} turn": partial(_end, end=end) for end in ENDS},
    "a shim at its gate": lambda p: launch_records.record_gated(
        p.store.db, p.intended.launch, owner=p.store.owner, pid=1, start_ticks=1
    ),
    "a gate that opens": lambda p: launch_records.record_running(
        p.store.db, p.gated.launch, owner=p.store.owner
    ),
    "orphans": lambda p: launch_records.close_all(
        p.store.db, [(p.gated.launch, STUCK)], now=p.store.now, reconciliation_key=p.report.key
    ),
    "a straggler": lambda p: launch_records.record_late_end(
        p.store.db, [(p.stuck.launch, GONE)], now=p.store.now
    ),
    "the end of a wait": lambda p: _by_time(p, passed_deadlines.end_wait, p.waits.key),
    "the end of a run's time": lambda p: _by_time(p, passed_deadlines.end_run, p.timed.key),
    "the end of a window": _end_window,
    "other clocks": _rearm,
    "a report that begins": lambda p: p.store.open_report(),
    "a report that goes on": lambda p: p.report.write(p.store.db),
    "a report that ends": lambda p: p.report.complete(p.store.db),
    "reports of the dead": lambda p: reports.close_abandoned(p.store.db),
    "decisions": _converge,
    "bindings": lambda p: stale_bindings.clear_stale_bindings(p.store.db, p.store.owner),
    "checks of sessions": lambda p: session_checks.record_findings(
        p.store.db, p.scope, {p.asked.key: SessionFinding(SessionVerdict.INVALID, None)}
    ),
    "a trust entry": lambda p: trust.record_entry(
        p.store.db, p.entry, host_id="host", owner=p.store.owner, now=p.store.now
    ),
    "a trust entry that went": lambda p: trust.record_outcome(
        p.store.db, EntryOutcome(forget=(p.entry,)), only_stale=False
    ),
}  # fmt: skip


def content(store: ServiceStore) -> dict[str, list[dict[str, Any]]]:
    """Return every row that a write may change."""
    return store.dump() | store.dump("trust_entry")
