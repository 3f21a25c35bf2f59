"""Every write can be repeated: after a conflict, and after its COMMIT got no answer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final

import peewee as pw
import pytest
from psycopg.errors import SerializationFailure
from runrecovery_service.domain.errors import RunRecoveryError
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.use_case import run_use_case
from storage.every_write import WRITES, Prepared, content
from storage.service_store import ServiceStore

OF_ONE_TRY: Final = re.compile(
    r".*(_at|_us|_until)|id|key|run|reconciliation(_id)?|cookie|watermark|due_clock"
)
"""The columns that differ between two tries: times, random values, and keys."""
QUICKER: Final = "the code is the same for both, and SQLite is quicker"
REPEATED_ELSEWHERE: Final = {
    "take a run",  # `give runs back` undoes a take whose answer was lost
    "a report that begins",  # the next report closes this one as abandoned
    "keep a session",  # the same session is kept, at a higher version
    "orphans",  # adds the processes that were killed by each call
    "a straggler",  # the same
    "decisions",  # the second try counts unchanged runs in the report
    "other clocks",  # each call here boots the machine
}


def settled(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Return rows without the columns that differ between two tries."""
    return {
        table: sorted(
            (
                {name: value for name, value in row.items() if not OF_ONE_TRY.fullmatch(name)}
                for row in rows
            ),
            key=str,
        )
        for table, rows in found.items()
    }


class _Undone(Exception):
    pass


@contextmanager
def undone(store: ServiceStore) -> Iterator[None]:
    """Undo everything that the block writes, and set the clocks back."""
    clocks = store.now, store.steady_us, store.clock
    with suppress(_Undone), store.db.transaction():
        yield
        raise _Undone
    store.now, store.steady_us, store.clock = clocks


@contextmanager
def conflict_once(store: ServiceStore) -> Iterator[list[str]]:
    """Let the first statement that writes conflict, after it was executed."""
    execute: Callable[..., Any] = store.db.peewee.execute_sql
    conflicts: list[str] = []

    def conflicting(sql: str, *args: Any, **kwargs: Any) -> Any:
        cursor = execute(sql, *args, **kwargs)
        if not conflicts and sql.startswith(("INSERT", "UPDATE", "DELETE")):
            conflicts.append(sql)
            cursor.close()  # the exception keeps the cursor, and an open one blocks the rollback
            raise pw.OperationalError from SerializationFailure()
        return cursor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store.db.peewee, "execute_sql", conflicting)
        yield conflicts


def _on_prepared(_: Database, write: Callable[[Prepared], object], prepared: Prepared) -> object:
    return write(prepared)


def test_every_write_that_conflicts_is_done_once_by_the_next_try(store: ServiceStore) -> None:
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip(QUICKER)
    prepared = Prepared(store)
    for what, write in WRITES.items():
        with undone(store):
            before = content(store)
            write(prepared)
            expected = content(store)
        with undone(store):
            with conflict_once(store) as conflicts:
                run_use_case(store.db, _on_prepared, write, prepared)

            assert len(conflicts) == 1, what
            after = content(store)
            assert after != before, what
            for table, rows in settled(after).items():
                assert rows == settled(expected)[table], (what, table)


def test_every_write_that_is_repeated_changes_nothing_more(store: ServiceStore) -> None:
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip(QUICKER)
    prepared = Prepared(store)
    for what in WRITES.keys() - REPEATED_ELSEWHERE:
        with undone(store):
            WRITES[what](prepared)
            once = content(store)

            with suppress(RunRecoveryError):
                WRITES[what](prepared)

            assert content(store) == once, what
