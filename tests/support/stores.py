"""Read and write the store of a service, on either database."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Any

import psycopg

from support.service import Home

Rows = list[tuple[Any, ...]]


def query(home: Home, sql: str, *values: object) -> Rows:
    """Return the rows of a query; `?` stands for a value."""
    url = str(home.settings.get("database", ""))
    if not url:
        return home.rows(sql, *values)
    with psycopg.connect(url, autocommit=True) as store:
        return store.execute(sql.replace("?", "%s").encode(), values).fetchall()


def change(home: Home, sql: str, *values: object) -> int:
    """Execute one statement while no service writes; return how many rows it changed."""
    url = str(home.settings.get("database", ""))
    if url:
        with psycopg.connect(url, autocommit=True) as server:
            return server.execute(sql.replace("?", "%s").encode(), values).rowcount
    with closing(sqlite3.connect(home.database, timeout=5.0)) as store, store:
        return store.execute(sql, values).rowcount


def dump(home: Home) -> dict[str, Rows]:
    """Return every row of every table, without the columns that lease renewals change."""
    names = "name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'"
    if home.settings.get("database"):
        names = "table_name FROM information_schema.tables WHERE table_schema = 'public'"
    tables = sorted({name for (name,) in query(home, f"SELECT {names}")} - {"commit_count"})
    assert "instance" in tables
    assert "run" in tables
    every = {name: f"SELECT * FROM {name}" for name in tables}  # noqa: S608 - the store's own names
    found = {name: sorted(query(home, sql), key=repr) for name, sql in every.items()}
    found["instance"] = query(home, "SELECT name, epoch, boot_token, pid FROM instance")
    return found


def key_of(home: Home, run_id: str) -> int:
    """Return the integer key of a run."""
    ((key,),) = query(home, "SELECT id FROM run WHERE run_id = ?", run_id)
    return int(key)


def lose_session(home: Home, run_id: str) -> dict[str, bytes]:
    """Remove the session files of a run; return their contents by path."""
    folder = home.data / "runs" / str(key_of(home, run_id))
    kept = {str(file): file.read_bytes() for file in folder.rglob("session-*.json")}
    assert kept
    for file in folder.rglob("session-*.json"):
        file.unlink()
    return kept
