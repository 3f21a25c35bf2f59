"""Unfinished turns, and the ends of turns that a recovery finds in the kept output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import field
from typing import Final

from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.recovery_matrix import BUDGET_RULE, QUESTION_RULE, RESULT_RULE
from runrecovery_service.domain.run import InteractionState, Profile, Question, RunStatus, Session
from runrecovery_service.domain.turn import Asked, Succeeded
from runrecovery_service.domain.usage import (
    TOKEN_FIELDS,
    UNLIMITED,
    Budget,
    SessionUsage,
    TurnUsage,
    Usage,
)
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import usage
from runrecovery_service.storage.database import Database, Row
from runrecovery_service.storage.launch_records import LaunchRecord
from runrecovery_service.storage.recovery_scope import ApplyScope, RecoveryScope
from runrecovery_service.storage.rows import (
    enum_from_text,
    options_to_json,
    session_from_columns,
    session_usage_from_json,
    to_json,
    to_us,
    tool_call_to_json,
    usage_from_columns,
    usage_from_json,
)
from runrecovery_service.storage.tables import live, sql_words

_USED: Final = ", ".join(f"r.{name}" for name in (*TOKEN_FIELDS, "cost_nanos", "model"))
RULES: Final = frozenset({RESULT_RULE, QUESTION_RULE, BUDGET_RULE})
LAST_KEY: Final = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenTurn:
    """The turn of a RUNNING run, and its launch.

    Attributes:
        session: the session of the run; its handle is a secret.
        boot_id: the boot of the machine during which the process was launched.
        shim: pid and start time of its shim, the latter in clock ticks since the boot.
        session_timeout_s: how many seconds a question of the run waits at most; None: the engine's
            setting applies.
        session_usage: the usage that processes of the session had reported before this turn.
        budget: the most that the run may use.
        used_before: the usage of the run before this turn.
        reported: the recorded usage of this turn; None: none was recorded.
    """

    run_key: int
    run_id: str
    engine: str
    profile: Profile | None
    attempt: int
    turn: int
    session: Session | None = field(repr=False)
    boot_id: str
    shim: tuple[int, int]
    session_timeout_s: float | None
    require_user_reply: bool
    session_usage: SessionUsage | None = None
    budget: Budget = UNLIMITED
    used_before: Usage | None = None
    reported: TurnUsage | None = None


_TURNS: Final = (
    "SELECT r.id, r.run_id, r.engine, r.profile, r.attempt, r.turn, r.session_type,"
    " r.session_value, r.session_turn, l.boot_id, l.pid, l.start_ticks, r.session_timeout_us,"
    " r.require_user_reply, r.session_usage, l.usage, r.max_tokens, r.max_cost_nanos,"
    f" {_USED} FROM run r"
    " JOIN process_lease l ON l.run = r.id AND l.attempt = r.attempt AND l.turn = r.turn"
    " WHERE l.pid IS NOT NULL AND l.start_ticks IS NOT NULL"
)


def open_turns(
    db: Database, scope: RecoveryScope, *, first: int = 0, last: int = LAST_KEY
) -> list[OpenTurn]:
    """Return the open turns of runs in scope whose key is from `first` to `last`.

    Runs with a requested cancel are left out.
    """
    rows = db.fetch_all(
        f"{_TURNS} AND r.status = '{RunStatus.RUNNING}' AND {live('r.')} AND r.owner = ?"
        " AND r.owner_epoch < ? AND r.id BETWEEN ? AND ? AND r.cancel_requested_at IS NULL"
        " ORDER BY r.id",
        (*scope.params, first, last),
    )
    return [_open_turn(row) for row in rows]


def turn_of(db: Database, launch: LaunchRecord) -> OpenTurn | None:
    """Return the turn of a launch, whatever the run's status; None if a later turn exists."""
    row = db.fetch_one(f"{_TURNS} AND l.id = ? AND l.cookie = ?", launch.identity)
    return None if row is None else _open_turn(row)


def _open_turn(row: Row) -> OpenTurn:
    key, run_id, engine, profile, attempt, turn, *rest = row
    *session, boot_id, pid, ticks, wait_us, must = rest[:8]
    used, used_in_turn, max_tokens, max_cost_nanos, *of_run = rest[8:]
    session_usage, in_turn = session_usage_from_json(used), usage_from_json(used_in_turn)
    total = usage_from_columns(*of_run)
    reported = None if in_turn is None else TurnUsage(turn=in_turn, session=session_usage)
    if session_usage is not None and in_turn is not None:
        session_usage = session_usage.before(in_turn)
    return OpenTurn(
        run_key=key,
        run_id=run_id,
        engine=engine,
        profile=enum_from_text(Profile, profile),
        attempt=attempt,
        turn=turn,
        session=session_from_columns(*session),
        boot_id=boot_id,
        shim=(pid, ticks),
        session_timeout_s=None if wait_us is None else wait_us / 1e6,
        require_user_reply=must != 0,
        session_usage=session_usage,
        budget=Budget(max_tokens=max_tokens, max_cost_nanos=max_cost_nanos),
        used_before=total if total is None or in_turn is None else total.minus(in_turn),
        reported=reported,
    )


def facts_sql(found: Mapping[int, FoundEnd]) -> str:
    """Return an SQL expression for the bits of the facts that these ends add to a run `r`."""
    whens = " ".join(f"WHEN {key:d} THEN {end.fact.value}" for key, end in sorted(found.items()))
    return f"CASE r.id {whens} ELSE 0 END" if found else "0"


def record_batch(db: Database, scope: ApplyScope, *, first: int, last: int) -> None:
    """Record the found results and questions of runs that a recovery has just decided."""
    rows = db.fetch_all(
        "SELECT e.run, r.interaction_count FROM recovery_event e JOIN run r ON r.id = e.run"
        " WHERE e.reconciliation = ? AND e.run BETWEEN ? AND ?"
        f" AND e.rule IN ({sql_words(RULES)})",
        (scope.reconciliation_key, first, last),
    )
    for key, questions in rows:
        found = scope.found[key]
        if found.used is not None:
            usage.record_found(db, key, found.used, owner=scope.owner)
        match found.end:
            case Succeeded(output):
                db.execute("UPDATE run SET output = ? WHERE id = ?", (to_json(output), key))
            case Asked(question) if not found.is_last:
                _ask(db, scope, key, questions + 1, question, found.wait_s)


def record_counted(db: Database, scope: ApplyScope, *, first: int, last: int) -> None:
    """Record the usage of killed turns in the runs that a recovery has just decided."""
    rows = db.fetch_all(
        "SELECT run FROM recovery_event WHERE reconciliation = ? AND run BETWEEN ? AND ?",
        (scope.reconciliation_key, first, last),
    )
    for (key,) in rows:
        if key in scope.counted:
            usage.record_found(db, key, scope.counted[key], owner=scope.owner)


def _ask(
    db: Database,
    scope: ApplyScope,
    run_key: int,
    number: int,
    question: Question,
    wait_s: float | None,
) -> None:
    """Record a question as open.

    If the run's deadlines are of another clock, its `due_clock` is cleared: the recovery then
    converts all of its deadlines together.
    """
    now_us, wait_us = to_us(scope.now), None if wait_s is None else round(wait_s * 1e6)
    due_us = None if wait_us is None else scope.steady.us + wait_us
    db.execute(
        "UPDATE run SET interaction_count = ?, session_mark = NULL, wait_due_us = ?,"
        " due_clock = CASE WHEN COALESCE(due_clock, ?) = ? THEN ? ELSE '' END WHERE id = ?",
        (number, due_us, *(scope.steady.clock,) * 3, run_key),
    )
    db.execute(
        "INSERT INTO interaction (run, no, kind, prompt, options, state, asked_at,"
        " wait_deadline_at, tool_call)"
        f" VALUES (?, ?, ?, ?, ?, '{InteractionState.OPEN}', ?, ?, ?)",
        (
            run_key,
            number,
            question.kind.value,
            question.prompt,
            options_to_json(question.options),
            now_us,
            None if wait_us is None else now_us + wait_us,
            tool_call_to_json(question.tool_call),
        ),
    )
