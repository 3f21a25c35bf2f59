"""A test gets a PostgreSQL database that is like a new copy of the template."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator

import psycopg
import pytest
from support.postgres_pool import PostgresPool, definition_of

from bench.postgres import ScratchPostgres

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
NAMES = (f"{WORKER}_pool_{number}" for number in itertools.count())
INSERT = (
    "INSERT INTO quarantine (run, reconciliation, reason, detail, quarantined_at)"
    " VALUES (1, 1, '', '', 1) RETURNING id"
)


@pytest.fixture
def pool(_postgres_pool: PostgresPool, _postgres: ScratchPostgres) -> Iterator[PostgresPool]:
    """A pool that has lent nothing yet."""
    pool = PostgresPool(_postgres, NAMES, _postgres_pool.template)
    yield pool
    pool.close()


def insert(url: str) -> int:
    """Add a row to a table; return its key."""
    with psycopg.connect(url) as connection:
        ((key,),) = connection.execute(INSERT)
        return int(key)


def test_a_database_is_lent_again_without_its_rows_and_with_its_first_keys(
    pool: PostgresPool,
) -> None:
    with pool.database() as first:
        keys = [insert(first), insert(first)]
    with pool.database() as second:
        keys.append(insert(second))
        with psycopg.connect(second) as connection:
            rows = connection.execute("SELECT id FROM quarantine").fetchall()
            steps = connection.execute("SELECT count(*) FROM migration_checksum").fetchall()

    assert first == second
    assert keys == [1, 2, 1]
    assert rows == [(1,)]
    assert steps > [(0,)]


CHANGES = (
    "ALTER TABLE run ADD COLUMN more TEXT",
    "ALTER TABLE run RENAME COLUMN engine TO motor",
    "ALTER TABLE run ALTER COLUMN engine DROP NOT NULL",
    "ALTER TABLE run ALTER COLUMN recovery_state SET DEFAULT 'ANY'",
    "DROP TABLE run_label",
    "DROP INDEX run_queue",
    "CREATE TABLE more ()",
    "CREATE SCHEMA more",
    "CREATE FUNCTION more() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "REVOKE INSERT ON run FROM postgres",
    "ALTER DATABASE {name} SET lock_timeout = '1s'",
    "ALTER DATABASE {name} CONNECTION LIMIT 20",
    "DELETE FROM migration_checksum",
    "UPDATE schema_migration SET name = name || 'x'",
)


def test_a_key_that_a_refused_row_has_used_is_used_again(pool: PostgresPool) -> None:
    with (
        pool.database() as first,
        psycopg.connect(first) as connection,
        pytest.raises(psycopg.errors.NotNullViolation),
    ):
        connection.execute(INSERT.replace("(1,", "(NULL,").encode())

    with pool.database() as second:
        assert first == second
        assert insert(second) == 1


def test_every_change_of_a_database_is_noticed(pool: PostgresPool) -> None:
    missed = []
    with pool.database() as url, psycopg.connect(url) as connection:
        before = definition_of(connection)
        for change in CHANGES:
            connection.execute(change.replace("{name}", connection.info.dbname).encode())
            if definition_of(connection) == before:
                missed.append(change)
            connection.rollback()

        assert definition_of(connection) == before
    assert missed == []


def test_a_database_that_was_changed_is_not_lent_again(pool: PostgresPool) -> None:
    with pool.database() as first, psycopg.connect(first) as connection:
        connection.execute("DROP TABLE run_label")

    with pool.database() as second:
        assert first != second


def test_connections_to_a_database_end_before_it_is_lent_again(pool: PostgresPool) -> None:
    with pool.database() as first:
        left = psycopg.connect(first)
        left.execute("LOCK TABLE run")

    with pool.database() as second:
        assert first == second
        with pytest.raises(psycopg.OperationalError):
            left.execute("SELECT 1")
    left.close()


def test_a_database_whose_connections_a_test_ended_is_not_lent_again(pool: PostgresPool) -> None:
    with pool.database() as first, psycopg.connect(first) as connection:
        connection.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )

    with pool.database() as second:
        assert first != second
