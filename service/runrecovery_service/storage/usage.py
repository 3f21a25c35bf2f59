"""Records the usage of turns for the launch, the run, the engine and the model.

One transaction writes all four. The launch has the whole usage of its turn. The others are
increased by the difference to the launch's previous value, so that a repeated write changes
nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from runrecovery_service.domain.run import Run
from runrecovery_service.domain.usage import TOKEN_FIELDS, SessionUsage, TurnUsage, Usage
from runrecovery_service.lazy_dataclass import dataclass
from runrecovery_service.storage import launch_records
from runrecovery_service.storage.database import Database, Row, Stale
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import LaunchRecord
from runrecovery_service.storage.rows import (
    session_usage_from_json,
    usage_from_json,
    usage_to_json,
)

MODELS_MOST: Final = 20
"""How many models of an engine are counted separately. The names come from agents."""
OTHER_MODEL: Final = "other"
"""Counts all further models of an engine, and models whose name has unusual characters."""
_MODEL: Final = re.compile(r"[A-Za-z0-9._:/@+\[\]-]{1,100}")
ROWS_MOST: Final = 1_000
"""The most rows of a result. Engines are few, but a damaged store could have any number of
names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineUsage:
    """The total usage of one engine, or of one of its models.

    Attributes:
        turns: the number of turns that have reported usage.
    """

    engine: str
    turns: int
    usage: Usage


def record(db: Database, run: Run, launch: LaunchRecord, used: TurnUsage, *, owner: Owner) -> None:
    """Record the usage of a turn so far, in the caller's transaction.

    Args:
        run: the run as this transaction has read it.

    Raises:
        Stale: another epoch has taken the run over meanwhile.
    """
    if used.is_of_session:
        if not _record_session(db, run.key, used, owner=owner):
            raise Stale
        return
    before = usage_from_json(launch_records.swap_usage(db, launch, usage_to_json(used.turn)))
    if not _add_to_run(db, run.key, used, before, owner=owner):
        raise Stale
    _add_to_engine(db, run.engine, used, before, owner=owner)


def record_found(db: Database, run_key: int, used: TurnUsage, *, owner: Owner) -> None:
    """Record the usage of a run's latest turn, in the transaction that recovers the run."""
    row = db.fetch_one(
        "SELECT l.id, l.usage, r.engine FROM run r JOIN process_lease l"
        " ON l.run = r.id AND l.attempt = r.attempt AND l.turn = r.turn WHERE r.id = ?",
        (run_key,),
    )
    if row is None:
        return
    if used.is_of_session:
        _record_session(db, run_key, used, owner=owner)
        return
    launch_key, known, engine = row
    before, now = usage_from_json(known), usage_to_json(used.turn)
    db.execute("UPDATE process_lease SET usage = ? WHERE id = ?", (now, launch_key))
    if _add_to_run(db, run_key, used, before, owner=owner):
        _add_to_engine(db, engine, used, before, owner=owner)


def _record_session(db: Database, run_key: int, used: TurnUsage, *, owner: Owner) -> bool:
    """Store the usage. Return False, and change nothing, if a newer epoch owns the run."""
    changed: int = db.execute(
        "UPDATE run SET session_usage = ? WHERE id = ? AND owner = ? AND owner_epoch <= ?",
        (usage_to_json(used.session), run_key, owner.instance, owner.epoch),
    ).rowcount
    return changed == 1


def _add_to_run(
    db: Database, run_key: int, used: TurnUsage, before: Usage | None, *, owner: Owner
) -> bool:
    """Store the usage. Return False, and change nothing, if a newer epoch owns the run."""
    amounts = _amounts(used, before)
    sums = ", ".join(f"{name} = COALESCE({name}, 0) + ?" for name in amounts)
    changed: int = db.execute(
        f"UPDATE run SET {sums}, model = COALESCE(?, model, ''),"
        " session_usage = COALESCE(?, session_usage)"
        " WHERE id = ? AND owner = ? AND owner_epoch <= ?",
        (
            *amounts.values(),
            used.turn.model or None,
            usage_to_json(used.session),
            run_key,
            owner.instance,
            owner.epoch,
        ),
    ).rowcount
    return changed == 1


def _amounts(used: TurnUsage, before: Usage | None) -> dict[str, int]:
    """Return by column the increase since the previous report."""
    grown = used.turn if before is None else used.turn.minus(before)
    amounts: dict[str, int] = {name: getattr(grown, name) for name in TOKEN_FIELDS}
    return amounts if grown.cost_nanos is None else amounts | {"cost_nanos": grown.cost_nanos}


def _add_to_engine(
    db: Database, engine: str, used: TurnUsage, before: Usage | None, *, owner: Owner
) -> None:
    amounts = {"turns": int(before is None)} | _amounts(used, before)
    keys = {"engine": engine, "instance": owner.instance}
    model = used.turn.model or ("" if before is None else before.model)
    _add(db, "engine_usage", keys, amounts)
    _add(db, "model_usage", keys | {"model": _counted_model(db, engine, model, owner)}, amounts)


def _add(db: Database, table: str, keys: Mapping[str, str], amounts: Mapping[str, int]) -> None:
    sums = ", ".join(f"{name} = COALESCE({table}.{name}, 0) + ?" for name in amounts)
    db.execute(
        f"INSERT INTO {table} ({', '.join((*keys, *amounts))})"
        f" VALUES ({', '.join('?' for _ in (*keys, *amounts))})"
        f" ON CONFLICT ({', '.join(keys)}) DO UPDATE SET {sums}",
        (*keys.values(), *amounts.values(), *amounts.values()),
    )


def _counted_model(db: Database, engine: str, model: str, owner: Owner) -> str:
    """Return the model name under which a report is counted: its own, or `OTHER_MODEL`."""
    if not model:
        return ""
    if not _MODEL.fullmatch(model):
        return OTHER_MODEL
    rows = db.fetch_all(
        "SELECT model FROM model_usage WHERE engine = ? AND instance = ?", (engine, owner.instance)
    )
    known = {row[0] for row in rows}
    has_room = len(known - {"", OTHER_MODEL}) < MODELS_MOST
    return model if model in known or has_room else OTHER_MODEL


def of_session(db: Database, run_key: int) -> SessionUsage | None:
    """Return the usage that earlier processes of the session reported; None: none was reported."""
    row = db.fetch_one("SELECT session_usage FROM run WHERE id = ?", (run_key,))
    return None if row is None else session_usage_from_json(row[0])


_SUMS: Final = ", ".join(f"sum({name})" for name in ("turns", *TOKEN_FIELDS, "cost_nanos"))


def by_engine(db: Database) -> list[EngineUsage]:
    """Return the usage of each engine, sorted by engine."""
    rows = db.fetch_all(f"SELECT engine, {_SUMS} FROM engine_usage GROUP BY engine ORDER BY engine")
    return [_engine_usage(row) for row in rows]


def by_model(db: Database, owner: Owner) -> list[EngineUsage]:
    """Return the usage of the instance, by engine and model, sorted by both."""
    rows = db.fetch_all(
        f"SELECT engine, turns, {', '.join((*TOKEN_FIELDS, 'cost_nanos'))}, model FROM model_usage"
        f" WHERE instance = ? ORDER BY engine, model LIMIT {ROWS_MOST}",
        (owner.instance,),
    )
    return [_engine_usage(tuple(row), model) for *row, model in rows]


def _engine_usage(row: Row, model: str = "") -> EngineUsage:
    engine, turns, *sums = row
    # PostgreSQL returns a sum as Decimal.
    read, cached, stored, written, reasoned, cost = (None if n is None else int(n) for n in sums)
    usage = Usage(
        input_tokens=read or 0,
        cached_input_tokens=cached or 0,
        cache_write_input_tokens=stored or 0,
        output_tokens=written or 0,
        reasoning_output_tokens=reasoned or 0,
        cost_nanos=cost,
        model=model,
    )
    return EngineUsage(engine=engine, turns=int(turns), usage=usage)
