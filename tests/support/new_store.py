"""The tables of a new SQLite store, as the migrations make them.

    PYTHONPATH=tests python -m support.new_store      (make schema)

writes the file that a first start executes instead of the migrations.
"""

from __future__ import annotations

import sqlite3
import tempfile
from contextlib import closing
from pathlib import Path

from playhouse.migrations import Runner
from runrecovery_service.storage.migrate import MIGRATIONS, NEW_SQLITE_STORE
from runrecovery_service.storage.sqlite_file import connect_sqlite


def migrate_step_by_step(file: Path) -> None:
    """Make a store by every step."""
    with closing(sqlite3.connect(file)) as made:
        made.execute("PRAGMA journal_mode = WAL")
    db = connect_sqlite(file)
    try:
        Runner(db.peewee, directory=str(MIGRATIONS)).up()
    finally:
        db.close()


def contents(file: Path) -> tuple[dict[str, str | None], dict[str, list[tuple[object, ...]]]]:
    """Return the text of each table and index, and the rows of each table."""
    with closing(sqlite3.connect(file)) as store:
        texts = dict(store.execute("SELECT name, sql FROM sqlite_master"))
        tables = store.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        rows = {
            name: store.execute(f'SELECT * FROM "{name}"').fetchall()  # noqa: S608 - from the store
            for (name,) in tables
        }
        return texts, rows


def new_store_script() -> str:
    """Return the text of the file that creates a new store."""
    with tempfile.TemporaryDirectory() as folder:
        migrate_step_by_step(Path(folder, "store"))
        with closing(sqlite3.connect(Path(folder, "store"))) as store:
            order = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY type DESC, name"
            statements = [text for (text,) in store.execute(order)]
            assert store.execute("SELECT * FROM commit_count").fetchall() == [(1, 0)]
    statements.append("INSERT INTO commit_count VALUES (1, 0)")
    assert not any(";" in statement for statement in statements)
    last = max(file.stem for file in MIGRATIONS.glob("[0-9]*.py"))
    return f"-- The steps up to {last}\n" + "".join(f"{text};\n" for text in statements)


if __name__ == "__main__":
    NEW_SQLITE_STORE.write_text(new_store_script(), encoding="utf-8")
