"""The facts and the recovery matrix as SQL.

Only this module defines the facts about a stored run. For one run, `facts_of_run` passes them to
`decide`. A recovery evaluates facts and matrix for a whole batch in one query. A test proves that
the SQL matrix and `decide` agree for every combination of facts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.recovery_matrix import (
    MATRIX,
    NOTHING,
    QUARANTINE_RULE,
    Fact,
    Rule,
)
from runrecovery_service.domain.run import (
    InteractionKind,
    InteractionState,
    Profile,
    RecoveryState,
    RestartPolicy,
    RunStatus,
)
from runrecovery_service.domain.session_check import LOST, SessionVerdict
from runrecovery_service.storage import found_ends
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.sql_dialects import SqlDialect
from runrecovery_service.storage.tables import live, sql_words

WITH_LATEST_QUESTION: Final = (
    "FROM run r LEFT JOIN interaction i ON i.run = r.id AND i.no = r.interaction_count"
)
IN_RANGE: Final = f"r.id BETWEEN ? AND ? AND {live('r.')} AND r.owner = ? AND r.owner_epoch < ?"
"""The condition for the runs of a batch. Parameters: first and last key, instance, epoch."""


def is_one_of(column: str, words: frozenset[str] | tuple[str, ...]) -> str:
    """Return an SQL condition: the column is one of these words.

    For statements that evaluate it for each of many rows: SQLite evaluates IN with three or more
    words by a search in a temporary index.
    """
    return "(" + " OR ".join(f"{column} = '{word}'" for word in sorted(words)) + ")"


def fact_conditions(dialect: SqlDialect) -> dict[Fact, str]:
    """Return for each fact the SQL condition on a run `r` and its latest question `i`."""
    kinds = sql_words(tuple(kind.value for kind in InteractionKind))
    resumes = f"r.restart_policy = '{RestartPolicy.RESUME}'"
    return {
        Fact.PENDING: f"i.state = '{InteractionState.OPEN}' AND i.kind IN ({kinds})"
        f" AND {dialect.is_json('i.options')}",
        Fact.HANDLE: "r.session_value <> '' AND r.session_type <> ''"
        f" AND COALESCE(r.session_verdict, '{SessionVerdict.VALID}')"
        f" NOT IN ({sql_words(tuple(verdict.value for verdict in LOST))})",
        Fact.CANCEL: "r.cancel_requested_at IS NOT NULL",
        Fact.REPLY: f"i.state = '{InteractionState.ANSWERED}' AND {dialect.is_json('i.response')}",
        Fact.REQUEUE: f"r.restart_policy = '{RestartPolicy.REQUEUE}'"
        " AND r.attempt < r.max_attempts",
        Fact.RESUME: resumes,
        Fact.RESUME_LEFT: f"{resumes} AND r.resume_count < r.max_resumes",
        Fact.RESTART_LEFT: f"{resumes} AND r.attempt < r.max_attempts",
    }
    # Facts that are not in the store: RESULT and QUESTION, which `found_ends.facts_sql` adds, and
    # the host of sessions, which `_elsewhere_sql` adds.


def facts_sql(dialect: SqlDialect) -> str:
    """Return an SQL expression for the facts of a run, as bits of `Fact`."""
    return " + ".join(
        f"CASE WHEN {condition} THEN {fact.value} ELSE 0 END"
        for fact, condition in fact_conditions(dialect).items()
    )


def _elsewhere_sql(dialect: SqlDialect, elsewhere: Fact) -> str:
    """Return an SQL expression: `elsewhere` if run `r` is to resume its session, else 0."""
    if not elsewhere:
        return "0"
    facts = fact_conditions(dialect)
    resumable = f"r.profile = '{Profile.RESUMABLE}'"
    resumes = (
        f"r.status = '{RunStatus.WAITING_USER}' AND {resumable} AND {facts[Fact.PENDING]}",
        f"r.status <> '{RunStatus.WAITING_USER}' AND {resumable} AND {facts[Fact.REPLY]}",
        f"r.status <> '{RunStatus.WAITING_USER}' AND {facts[Fact.RESUME_LEFT]}",
    )
    needed = " OR ".join(f"({condition})" for condition in resumes)
    return f"CASE WHEN {facts[Fact.HANDLE]} AND ({needed}) THEN {elsewhere.value} ELSE 0 END"


def facts_of_run(db: Database, run_key: int) -> Fact:
    """Return the facts about one run."""
    row = db.fetch_one(
        f"SELECT {facts_sql(db.dialect)} {WITH_LATEST_QUESTION} WHERE r.id = ?", (run_key,)
    )
    return Fact(0 if row is None else row[0])


def damage_sql(dialect: SqlDialect) -> str:
    """Return an SQL expression for the first damage in a run's row.

    Its value is a name such as `labels_unreadable` or `status_unknown`; NULL: no damage.
    """
    json_columns = ("labels", "input", "output")
    unreadable = "".join(
        f" WHEN r.{column} IS NOT NULL AND NOT {dialect.is_json('r.' + column)}"
        f" THEN '{column}_unreadable'"
        for column in json_columns
    )
    return (
        f"CASE WHEN r.status NOT IN ({sql_words(tuple(s.value for s in RunStatus))})"
        " THEN 'status_unknown'"
        f" WHEN r.restart_policy NOT IN ({sql_words(tuple(p.value for p in RestartPolicy))})"
        " THEN 'restart_policy_unknown'"
        f"{unreadable} END"
    )


def condition_sql(rule: Rule) -> str:
    """Return `Rule.matches` for a run of a fitting status, as SQL on the columns profile, facts."""
    terms = []
    if rule.profiles:
        terms.append(_profile_sql(rule.profiles))
    if rule.needs:
        terms.append(f"(facts & {rule.needs.value}) = {rule.needs.value}")
    if rule.lacks:
        terms.append(f"(facts & {rule.lacks.value}) = 0")
    return " AND ".join(terms) or "1 = 1"


def _profile_sql(profiles: tuple[Profile | None, ...]) -> str:
    known = sql_words(tuple(profile.value for profile in Profile))
    terms = [f"profile = '{p.value}'" for p in profiles if p is not None]
    if None in profiles:
        terms.append(f"profile IS NULL OR profile NOT IN ({known})")
    return f"({' OR '.join(terms)})"


def rule_sql() -> str:
    """Return the matrix as an SQL CASE for the number of the first rule that matches.

    A damaged run gets the number 0. A run is compared only with the rules of its status.
    """
    of_status = "".join(
        f" WHEN '{status}' THEN CASE{_first_match(status)} END"
        for status in sorted({status for rule in MATRIX for status in rule.statuses})
    )
    return f"CASE WHEN damage IS NOT NULL THEN 0 ELSE CASE status{of_status} END END"


def _first_match(status: RunStatus) -> str:
    return "".join(
        f" WHEN {condition_sql(rule)} THEN {number}"
        for number, rule in enumerate(MATRIX, 1)
        if status in rule.statuses
    )


def _of_rule(value: Callable[[Rule], str | None], *, damaged: str) -> str:
    """Return an SQL CASE for a value of rule `j.number`; `damaged`: the value of damaged runs."""
    values = "".join(
        f" WHEN {number} THEN '{text}'"
        for number, rule in enumerate(MATRIX, 1)
        if (text := value(rule)) is not None
    )
    return f"CASE j.number WHEN 0 THEN {damaged}{values} END"


def decisions_sql(
    dialect: SqlDialect, found: Mapping[int, FoundEnd], elsewhere: Fact = NOTHING
) -> str:
    """Return the query that decides on every run of a range.

    Args:
        found: by run key: the end of a turn that was found in the kept output.
        elsewhere: see `ApplyScope`.

    Parameters: first and last key, then as `IN_RANGE`. Columns: id, recovery_no, status, rule,
    facts, becomes, error_code, recovery_state, damage, stands (1 when the run already has this
    decision and has not changed since), sequence. The other columns explain the decision: profile,
    attempt, interaction, session_turn, session_verdict, session_reason, resumes.
    """
    rule = _of_rule(lambda rule: rule.name, damaged=f"'{QUARANTINE_RULE}'")
    becomes = _of_rule(lambda rule: rule.becomes, damaged="j.status")
    error = _of_rule(lambda rule: rule.error, damaged="NULL")
    state = _of_rule(lambda rule: rule.state, damaged=f"'{RecoveryState.QUARANTINED}'")
    return (
        # MATERIALIZED: otherwise SQLite evaluates an expression again wherever its column is used.
        "WITH seen AS MATERIALIZED (SELECT r.id, r.status, r.profile, r.recovery_reason,"
        " r.recovered_version, r.version, r.recovery_count, r.event_count, r.attempt,"
        " r.interaction_count, r.session_turn, r.session_verdict, r.session_reason,"
        " r.resume_count,"
        f" {facts_sql(dialect)} + {found_ends.facts_sql(found)}"
        f" + {_elsewhere_sql(dialect, elsewhere)} AS facts,"
        f" {damage_sql(dialect)} AS damage"
        # The range of questions: otherwise PostgreSQL may read all of them for each batch.
        f" {WITH_LATEST_QUESTION} AND i.run BETWEEN ? AND ? WHERE {IN_RANGE}),"
        f" judged AS MATERIALIZED (SELECT seen.*, {rule_sql()} AS number FROM seen)"
        f" SELECT j.id, j.recovery_count + 1 AS recovery_no, j.status, {rule} AS rule, j.facts,"
        f" {becomes} AS becomes, {error} AS error_code, {state} AS recovery_state, j.damage,"
        f" CASE WHEN j.recovery_reason = {rule} AND j.recovered_version = j.version"
        " THEN 1 ELSE 0 END AS stands, j.event_count + 1 AS sequence, j.profile, j.attempt,"
        " j.interaction_count AS interaction, j.session_turn, j.session_verdict, j.session_reason,"
        " j.resume_count AS resumes FROM judged j"
    )
