"""The recovery matrix: one rule for every unfinished run, evaluated alike by SQL and Python."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Final

import pytest
from runrecovery_service.clock import Clock
from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.plan import RecoveryPlan
from runrecovery_service.domain.reconciliation import Cause
from runrecovery_service.domain.recovery_matrix import (
    MATRIX,
    NOTHING,
    QUARANTINE_RULE,
    Fact,
    Rule,
    decide,
)
from runrecovery_service.domain.run import (
    TERMINAL,
    ErrorCode,
    InteractionKind,
    Profile,
    Question,
    RecoveryState,
    RunStatus,
)
from runrecovery_service.domain.steady_time import Due, SteadyTime
from runrecovery_service.domain.transitions import is_legal
from runrecovery_service.domain.turn import Asked, Succeeded
from runrecovery_service.recovery.bulk_session_check import BulkSessionCheck
from runrecovery_service.recovery.plan import Planner
from runrecovery_service.storage import instances, recovery_apply, reports
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import InstanceStart, Owner
from runrecovery_service.storage.recovery_apply import Tally
from runrecovery_service.storage.recovery_scope import ApplyScope

LIVE: Final = tuple(status for status in RunStatus if status not in TERMINAL)
PROFILES: Final = (*Profile, None)
OF_START: Final = tuple(Fact(bits) for bits in range(Fact.ELSEWHERE.value))
OF_TAKEOVER: Final = tuple(
    facts | elsewhere
    for facts in (Fact(bits) for bits in range(Fact.RESULT.value))
    for elsewhere in (Fact.ELSEWHERE, Fact.ELSEWHERE | Fact.HOST_LOST)
    if Fact.HANDLE in facts
)
"""A takeover that lacks the session has no output to read either."""
Case = tuple[RunStatus, Profile | None, Fact]
AT_START: Final = tuple(product(LIVE, PROFILES, OF_START))
IN_TAKEOVER: Final = tuple(product(LIVE, PROFILES, OF_TAKEOVER))
EVERYTHING: Final = AT_START + IN_TAKEOVER
RESUMES: Final = Fact.RESUME | Fact.RESUME_LEFT | Fact.RESTART_LEFT
LOST_HOST: Final = Fact.ELSEWHERE | Fact.HOST_LOST
WAITS, QUEUED, RUNS = RunStatus.WAITING_USER, RunStatus.QUEUED, RunStatus.RUNNING
RESUMABLE, STICKY = Profile.RESUMABLE, Profile.STICKY_PROCESS
FIRST_RULES: Final = (
    (WAITS, RESUMABLE, Fact.PENDING | Fact.HANDLE, "resumable_waiting_preserved"),
    (WAITS, RESUMABLE, Fact.PENDING, "session_handle_lost"),
    (WAITS, RESUMABLE, Fact.HANDLE, "pending_interaction_lost"),
    (WAITS, STICKY, Fact.PENDING | Fact.HANDLE, "sticky_process_lost"),
    (WAITS, None, Fact.PENDING | Fact.HANDLE, "profile_missing"),
    (QUEUED, RESUMABLE, Fact.REPLY | Fact.HANDLE, "accepted_reply_redriven"),
    (RUNS, RESUMABLE, Fact.REPLY | Fact.HANDLE, "accepted_reply_redriven"),
    (QUEUED, RESUMABLE, Fact.REPLY | Fact.HANDLE | Fact.REQUEUE, "accepted_reply_redriven"),
    (RUNS, RESUMABLE, Fact.REPLY | Fact.HANDLE | RESUMES, "accepted_reply_redriven"),
    (QUEUED, RESUMABLE, Fact.REPLY, "accepted_reply_session_lost"),
    (QUEUED, RESUMABLE, Fact.REPLY | RESUMES, "accepted_reply_session_lost"),
    (RUNS, RESUMABLE, Fact.REPLY | Fact.REQUEUE, "requeued"),
    (RUNS, RESUMABLE, Fact.HANDLE | RESUMES, "interrupted_turn_resumed"),
    (RUNS, RESUMABLE, RESUMES, "interrupted_before_session"),
    (RUNS, RESUMABLE, Fact.HANDLE | Fact.RESUME | Fact.RESTART_LEFT, "resumes_used_up"),
    (RUNS, RESUMABLE, Fact.RESUME | Fact.RESUME_LEFT, "attempts_used_up"),
    (RUNS, STICKY, Fact.REQUEUE, "requeued"),
    (QUEUED, RESUMABLE, NOTHING, "queued_interrupted"),
    (RUNS, RESUMABLE, Fact.HANDLE, "running_interrupted"),
    (RUNS, RESUMABLE, Fact.RESULT | Fact.REPLY | Fact.HANDLE, "result_found_in_output"),
    (RUNS, RESUMABLE, Fact.RESULT | Fact.REQUEUE, "result_found_in_output"),
    (RUNS, RESUMABLE, Fact.QUESTION | Fact.HANDLE | RESUMES, "question_found_in_output"),
    (RUNS, RESUMABLE, Fact.QUESTION, "running_interrupted"),
    (RUNS, RESUMABLE, Fact.OVER_BUDGET | Fact.HANDLE | RESUMES, "budget_used_up"),
    (WAITS, RESUMABLE, Fact.PENDING | Fact.HANDLE | Fact.ELSEWHERE, "waiting_for_its_host"),
    (QUEUED, RESUMABLE, Fact.REPLY | Fact.HANDLE | Fact.ELSEWHERE, "queued_for_its_host"),
    (RUNS, RESUMABLE, Fact.HANDLE | RESUMES | Fact.ELSEWHERE, "queued_for_its_host"),
    (WAITS, RESUMABLE, Fact.PENDING | Fact.HANDLE | LOST_HOST, "host_did_not_return"),
    (RUNS, RESUMABLE, Fact.HANDLE | LOST_HOST | Fact.CANCEL, "cancel_completed"),
)  # fmt: skip
"""Runs for which several rules apply, or nearly apply, and the rule that decides."""
EXCLUSIVE: Final = (
    Fact.PENDING | Fact.REPLY, Fact.REQUEUE | Fact.RESUME, Fact.RESULT | Fact.QUESTION,
    Fact.RESULT | Fact.OVER_BUDGET, Fact.QUESTION | Fact.OVER_BUDGET,
)  # fmt: skip
IN_OUTPUT: Final = Fact.RESULT | Fact.QUESTION | Fact.OVER_BUDGET
RESULT: Final = Succeeded({"done": True})
QUESTION: Final = Asked(Question(kind=InteractionKind.CONFIRM, prompt="Ship?", options=()))
ROWS: Final = 200
"""Of one INSERT."""
OF_RESUME: Final = Fact.RESUME_LEFT | Fact.RESTART_LEFT


def can_be_stored(facts: Fact) -> bool:
    """A run has one policy, and its latest question is not both open and answered.

    A turn has one end.
    """
    if any(both in facts for both in EXCLUSIVE):
        return False
    return Fact.RESUME in facts or not facts & OF_RESUME


CAN_BE_STORED: Final = tuple(case for case in AT_START if can_be_stored(case[2]))
NOW: Final = datetime(2026, 11, 24, tzinfo=UTC)
REOPEN: Final = Due(at=NOW, clock="boot", us=1)


def test_every_unfinished_run_has_exactly_one_first_rule() -> None:
    for status, profile, facts in EVERYTHING:
        first = next(rule for rule in MATRIX if rule.matches(status, profile, facts))

        assert first is decide(status, profile, facts)


def test_every_rule_is_first_for_some_run() -> None:
    assert set(MATRIX) == {decide(*case) for case in CAN_BE_STORED + IN_TAKEOVER}


def test_every_decision_is_a_legal_transition() -> None:
    assert all(is_legal(case[0], decide(*case).becomes) for case in EVERYTHING)


def test_no_rule_decides_an_ended_run() -> None:
    for status, profile, facts in product(TERMINAL, PROFILES, OF_START):
        with pytest.raises(ValueError, match="no rule"):
            decide(status, profile, facts)


@pytest.mark.parametrize("rule", MATRIX, ids=lambda rule: rule.name)
def test_the_parts_of_a_rule_agree(rule: Rule) -> None:
    assert (rule.error is not None) == (rule.becomes is RunStatus.FAILED)
    assert rule.keeps <= (rule.becomes not in TERMINAL)
    assert rule.stays == (Fact.ELSEWHERE in rule.needs)
    assert (rule.state is RecoveryState.RECOVERED_WAITING) == (
        rule.becomes is RunStatus.WAITING_USER
    )
    assert not rule.needs & rule.lacks


def test_names_are_unique_and_texts_are_safe_inside_sql() -> None:
    names = [rule.name for rule in MATRIX]

    assert len(set(names)) == len(names)
    assert QUARANTINE_RULE not in names
    for text in (*names, *(rule.because for rule in MATRIX)):
        assert not set("?%'\"\\") & set(text)


def test_a_cancel_request_precedes_every_other_rule() -> None:
    for status, profile, facts in EVERYTHING:
        if Fact.CANCEL in facts:
            assert RunStatus.CANCELED is decide(status, profile, facts).becomes


@pytest.mark.parametrize(("status", "profile", "facts", "rule"), FIRST_RULES)
def test_a_rule_comes_before_those_that_would_lose_more(
    status: RunStatus, profile: Profile | None, facts: Fact, rule: str
) -> None:
    assert decide(status, profile, facts).name == rule


# -- SQL ---------------------------------------------------------------------------------------


def owner_of(db: Database) -> Owner:
    boot = InstanceStart(
        instance="default", boot_token="", host_id="h", data_dir="/d", pid=1, lock_id="the same"
    )
    return instances.claim(db, boot, now=NOW)


def store(db: Database, owner: Owner, cases: tuple[Case, ...]) -> None:
    """Write a run for each case, with its real question, session, cancel and policy."""
    numbered = list(enumerate(cases, 1))
    with db.transaction():
        insert(db, "run", [_run(owner, key, *case) for key, case in numbered])
        insert(
            db,
            "interaction",
            [
                {
                    "run": key, "no": 1, "kind": "confirm", "prompt": "Go on.", "options": "[]",
                    "state": "OPEN" if Fact.PENDING in facts else "ANSWERED", "asked_at": 1,
                    "response": "true" if Fact.REPLY in facts else None,
                }
                for key, (_, _, facts) in numbered
                if facts & (Fact.PENDING | Fact.REPLY)
            ],
        )  # fmt: skip
        insert(
            db,
            "process_lease",
            [_launch(owner, key, facts) for key, (_, _, facts) in numbered if facts & IN_OUTPUT],
        )


def insert(db: Database, table: str, rows: list[dict[str, object]]) -> None:
    """Insert rows that have the same columns, many by one statement."""
    if not rows:
        return
    columns = ", ".join(rows[0])
    for some in (rows[at : at + ROWS] for at in range(0, len(rows), ROWS)):
        marks = ", ".join(f"({', '.join('?' for _ in row)})" for row in some)
        values = tuple(value for row in some for value in row.values())
        db.execute(f"INSERT INTO {table} ({columns}) VALUES {marks}", values)  # noqa: S608


def found_in(cases: tuple[Case, ...]) -> dict[int, FoundEnd]:
    """Return the ends that are found in the kept output of these runs."""
    ends = {
        each.fact: each
        for each in (
            FoundEnd(end=RESULT),
            FoundEnd(end=QUESTION),
            FoundEnd(end=QUESTION, is_last=True),
        )
    }
    return {
        key: ends[facts & IN_OUTPUT]
        for key, (_, _, facts) in enumerate(cases, 1)
        if facts & IN_OUTPUT
    }


def _policy(facts: Fact) -> str:
    if Fact.RESUME in facts:
        return "RESUME"
    return "REQUEUE" if Fact.REQUEUE in facts else "FAIL"


def _attempt(facts: Fact) -> int:
    return 1 if facts & (Fact.REQUEUE | Fact.RESTART_LEFT) else 2


def _launch(owner: Owner, key: int, facts: Fact) -> dict[str, object]:
    return {
        "run": key, "attempt": _attempt(facts), "turn": 1, "instance": owner.instance,
        "epoch": owner.epoch, "host_id": "h", "boot_id": "b", "pid_namespace": 1,
        "cookie": f"run-{key}", "pid": 1, "start_ticks": 1, "state": "CLOSED", "created_at": 1,
    }  # fmt: skip


def _run(
    owner: Owner, key: int, status: RunStatus, profile: Profile | None, facts: Fact
) -> dict[str, object]:
    session = ("demo", "handle") if Fact.HANDLE in facts else (None, None)
    return {
        "id": key, "run_id": f"run-{key}", "engine": "demo", "labels": "{}", "input": "{}",
        "status": status.value, "profile": profile.value if profile else None,
        "restart_policy": _policy(facts), "max_attempts": 2,
        "attempt": _attempt(facts), "turn": 1,
        "resume_count": 1, "max_resumes": 2 if Fact.RESUME_LEFT in facts else 1,
        "interaction_count": 1, "session_type": session[0],
        "session_value": session[1], "owner": owner.instance, "owner_epoch": owner.epoch,
        "cancel_requested_at": 1 if Fact.CANCEL in facts else None,
        "version": 5, "queued_at": 1, "created_at": 1, "updated_at": 1,
    }  # fmt: skip


def recovered(db: Database) -> Iterator[tuple[object, ...]]:
    """Recover all runs in one batch, and return each run with its decision, in order of the key."""
    owner = owner_of(db)
    key = reports.open_report(
        db, owner, reconciliation_id="r", cause=Cause.STARTUP, safe_mode=False, now=NOW
    )
    scope = ApplyScope(
        owner=owner,
        before=owner.epoch,
        reconciliation_key=key,
        reopen=REOPEN,
        now=NOW,
        steady=SteadyTime("boot-1", 0),
        found=found_in(CAN_BE_STORED),
    )
    batch = recovery_apply.next_batch(db, scope, after=0, rows=100_000)
    assert batch is not None
    recovery_apply.apply_batch(db, scope, batch, report=lambda db, tally: None)
    yield from db.fetch_all(
        "SELECT r.recovery_reason, e.facts, r.status, r.error_code,"
        " r.recovery_state, r.session_value, i.state, r.version, r.owner_epoch, r.ended_at"
        " FROM run r JOIN recovery_event e ON e.run = r.id"
        " LEFT JOIN interaction i ON i.run = r.id AND i.no = 1 ORDER BY r.id"
    )


def expected(case: Case) -> tuple[object, ...]:
    """Return the row that the store should have by the matrix in Python."""
    rule, facts = decide(*case), case[2]
    question = "OPEN" if Fact.PENDING in facts else "ANSWERED" if Fact.REPLY in facts else None
    ended = rule.becomes in TERMINAL
    kept_waiting = case[0] is rule.becomes is RunStatus.WAITING_USER
    return (
        rule.name,
        facts.value,
        rule.becomes.value,
        rule.error.value if rule.error else None,
        rule.state.value,
        "handle" if Fact.HANDLE in facts and rule.keeps else None,
        question if rule.keeps or question is None else "CLOSED",
        5 if kept_waiting else 6,
        2,
        int(NOW.timestamp() * 1e6) if ended else None,
    )


def test_sql_and_python_decide_alike(database: Database) -> None:
    store(database, owner_of(database), CAN_BE_STORED)

    became = [tuple(row) for row in recovered(database)]

    assert [expected(case) for case in CAN_BE_STORED] == became


def needs_its_session(status: RunStatus, profile: Profile | None, facts: Fact) -> bool:
    """Return whether the next turn of a run resumes a session."""
    if Fact.HANDLE not in facts:
        return False
    if status is RunStatus.WAITING_USER:
        return profile is Profile.RESUMABLE and Fact.PENDING in facts
    return Fact.RESUME_LEFT in facts or (profile is Profile.RESUMABLE and Fact.REPLY in facts)


@pytest.mark.parametrize("elsewhere", [Fact.ELSEWHERE, Fact.ELSEWHERE | Fact.HOST_LOST])
def test_in_a_takeover_sql_and_python_decide_alike_and_runs_keep_the_owner_of_their_session(
    database: Database, elsewhere: Fact
) -> None:
    cases = tuple(case for case in CAN_BE_STORED if not case[2] & IN_OUTPUT)
    dead = owner_of(database)
    store(database, dead, cases)
    dead = owner_of(database)
    scope = ApplyScope(
        owner=Owner("successor", 7, ""),
        before=dead.epoch,
        taken_from=dead,
        reconciliation_key=1,
        reopen=REOPEN,
        now=NOW,
        steady=SteadyTime("boot-1", 0),
        elsewhere=elsewhere,
    )
    batch = recovery_apply.next_batch(database, scope, after=0, rows=100_000)
    assert batch is not None

    recovery_apply.apply_batch(database, scope, batch, report=lambda db, tally: None)

    became = database.fetch_all(
        "SELECT r.recovery_reason, e.facts, r.status, r.owner, r.owner_epoch"
        " FROM run r JOIN recovery_event e ON e.run = r.id ORDER BY r.id"
    )
    for (status, profile, stored), got in zip(cases, became, strict=True):
        facts = stored | (elsewhere if needs_its_session(status, profile, stored) else NOTHING)
        rule = decide(status, profile, facts)
        owner = ("default", 2) if rule.stays else ("successor", 7)
        assert tuple(got) == (rule.name, facts.value, rule.becomes.value, *owner)


def test_a_restart_does_what_its_plan_said(database: Database) -> None:
    before = owner_of(database)
    store(database, before, CAN_BE_STORED)
    found = found_in(CAN_BE_STORED)
    planner = Planner(
        owner=before,
        sessions=BulkSessionCheck(checks={}, workspace=lambda key, attempt: Path("/")),
        clock=Clock(),
        find_end=lambda turn: found.get(turn.run_key),
    )
    planned: list[tuple[object, ...]] = []
    totals: RecoveryPlan | None = None
    after: tuple[int, ...] | None = None
    while True:
        page, sums = planner.decide(planner.read(database, after=after, limit=100))
        totals = totals or sums
        planned += [
            (one.decision.rule, one.decision.becomes, one.decision.error, one.decision.state)
            for one in page.rows
        ]
        after = page.after
        if after is None:
            break
    assert totals is not None

    # The next epoch, as a restart claims it.
    became = [
        (rule, RunStatus(str(status)), code and ErrorCode(str(code)), RecoveryState(str(state)))
        for rule, _, status, code, state, *_ in recovered(database)
    ]

    assert planned == became
    assert {one.rule: one.count for one in totals.decisions} == Counter(rule for rule, *_ in became)
    assert (totals.runs_total, totals.runs_unchanged) == (len(became), 0)


def test_every_applied_rule_is_counted(database: Database) -> None:
    store(database, owner_of(database), CAN_BE_STORED)
    owner = owner_of(database)
    scope = ApplyScope(
        owner=owner,
        before=owner.epoch,
        reconciliation_key=1,
        reopen=REOPEN,
        now=NOW,
        steady=SteadyTime("boot-1", 0),
        found=found_in(CAN_BE_STORED),
    )
    batch = recovery_apply.next_batch(database, scope, after=0, rows=100_000)
    assert batch is not None
    tallies: list[Tally] = []

    tally = recovery_apply.apply_batch(
        database, scope, batch, report=lambda db, tally: tallies.append(tally)
    )

    rules = [decide(*case) for case in CAN_BE_STORED]
    assert Counter(rule.name for rule in rules) == tally.decisions
    assert len(CAN_BE_STORED) == tally.scanned
    assert [tally] == tallies
