"""Only a store of this service is opened; a refused file or database is not changed."""

from __future__ import annotations

import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from runrecovery_service.domain.start_errors import (
    DatabaseOutOfReach,
    DatabaseRefused,
    DataDirRefused,
    Held,
)
from runrecovery_service.storage import file_locks as storage_locks
from runrecovery_service.storage import postgresql, sqlite_file
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.file_locks import DatabaseLock, Lock, LockFile
from runrecovery_service.storage.integrity import integrity_problems
from runrecovery_service.storage.migrate import known_migrations, migrate
from runrecovery_service.storage.opening import open_database, postgresql_problems
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.sqlite_file import SQLITE_PRAGMAS
from support.pg_proxy import proxied

NAME = "runrecovery.db"


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def refusal(directory: Path, url: str = "") -> str:
    with pytest.raises(DatabaseRefused) as refused:
        open_database(url, directory).close()
    return refused.value.reason


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A directory with a closed store of the service."""
    open_database("", tmp_path).close()
    return tmp_path


# -- both databases ----------------------------------------------------------------------------


def test_a_store_opens_again_with_nothing_left_to_migrate(database: Database) -> None:
    assert migrate(database) == []


def test_a_store_of_a_newer_version_is_refused(
    new_database_url: Callable[[], str], tmp_path: Path
) -> None:
    url = new_database_url()
    db = open_database(url, tmp_path)
    with db.transaction():
        db.execute(
            "INSERT INTO schema_migration (name, applied) VALUES ('9999_later', ?)",
            ("2026-11-24",),
        )
    db.close()
    before = contents(tmp_path)

    assert "newer version (step 9999_later)" in refusal(tmp_path, url)
    assert before == contents(tmp_path)


def test_a_store_with_an_edited_migration_is_refused(
    new_database_url: Callable[[], str], tmp_path: Path
) -> None:
    url = new_database_url()
    db = open_database(url, tmp_path)
    with db.transaction():
        db.execute("UPDATE migration_checksum SET checksum = 'other'")
    db.close()

    assert f"step {next(iter(known_migrations()))} has changed" in refusal(tmp_path, url)


@pytest.mark.parametrize("lost", ["name IS NOT NULL", "name = '0001_initial'"])
def test_a_store_that_lost_the_record_of_a_migration_is_refused(
    new_database_url: Callable[[], str], tmp_path: Path, lost: str
) -> None:
    url = new_database_url()
    db = open_database(url, tmp_path)
    with db.transaction():
        db.execute(f"DELETE FROM schema_migration WHERE {lost}")  # noqa: S608 - written above
    db.close()

    assert "no record of the migration step 0001_initial that makes them" in refusal(tmp_path, url)


def test_check_reports_that_the_record_of_a_migration_is_lost(made: Path) -> None:
    with closing(sqlite3.connect(made / "runrecovery.db")) as connection, connection:
        connection.execute("DELETE FROM schema_migration")

    (problem,) = integrity_problems(made / "runrecovery.db")

    assert "no record of the migration step 0001_initial that makes them" in problem


def test_check_reports_that_a_newer_version_made_a_sqlite_store(made: Path) -> None:
    with closing(sqlite3.connect(made / "runrecovery.db")) as connection, connection:
        connection.execute("INSERT INTO schema_migration VALUES (99, '9999_later', '2026-11-24')")

    assert integrity_problems(made / "runrecovery.db") == [
        f"{made}/runrecovery.db: was made by a newer version (step 9999_later)"
    ]


def test_a_postgresql_database_with_another_programs_table_run_is_refused(
    new_database_url: Callable[[], str], tmp_path: Path
) -> None:
    url = new_database_url()
    if not url:
        pytest.skip("SQLite identifies a store by its header")
    db = open_database(url, tmp_path)
    for table in ("schema_migration", "migration_checksum"):
        db.execute(f"DROP TABLE {table}")
    db.close()

    assert "not of runrecovery" in refusal(tmp_path, url)


# -- PostgreSQL --------------------------------------------------------------------------------


def administer(url: str, *statements: str) -> None:
    """Run statements in a database, each by itself."""
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            connection.execute(statement.encode())


@pytest.mark.parametrize("encoding", ["SQL_ASCII", "LATIN1"])
def test_a_postgresql_whose_encoding_is_not_utf8_is_refused(
    postgresql_url: str, tmp_path: Path, encoding: str
) -> None:
    name = f"in_{encoding.lower()}"
    url = postgresql_url.replace(f"/{conninfo_to_dict(postgresql_url)['dbname']}?", f"/{name}?")
    administer(
        postgresql_url,
        f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' TEMPLATE template0",
    )
    try:
        reason = (
            f"has the encoding {encoding}, UTF8 is needed"
            " (CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0)"
        )
        assert refusal(tmp_path, url) == reason
        assert postgresql_problems(url) == [f"the PostgreSQL database: {reason}"]
    finally:
        administer(postgresql_url, f"DROP DATABASE {name} WITH (FORCE)")


def test_default_settings_of_a_database_do_not_affect_the_service(
    postgresql_url: str, tmp_path: Path
) -> None:
    name = conninfo_to_dict(postgresql_url)["dbname"]
    for setting, value in (
        ("default_transaction_isolation", "serializable"),
        ("TimeZone", "Asia/Kolkata"),
        ("standard_conforming_strings", "off"),
        ("client_encoding", "LATIN1"),
        ("synchronous_commit", "off"),
    ):
        administer(postgresql_url, f"ALTER DATABASE {name} SET {setting} = '{value}'")

    with closing(open_database(postgresql_url, tmp_path)) as db, db.transaction():
        found = db.fetch_one(
            "SELECT current_setting('transaction_isolation'), current_setting('TimeZone'),"
            " current_setting('standard_conforming_strings'), current_setting('client_encoding'),"
            " current_setting('synchronous_commit'), 'a→b'"
        )
    assert found == ("read committed", "UTC", "on", "UTF8", "on", "a→b")


def test_options_of_the_url_are_kept(postgresql_url: str, tmp_path: Path) -> None:
    administer(postgresql_url, "CREATE SCHEMA elsewhere")
    url = f"{postgresql_url}&options=-csearch_path%3Delsewhere"

    with closing(open_database(url, tmp_path)) as db:
        assert db.fetch_one("SELECT current_schema()") == ("elsewhere",)


def test_a_connection_on_which_settings_have_no_effect_is_refused(
    postgresql_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(postgresql.CONNECTION_SETTINGS, "synchronous_commit", "off")

    reason = refusal(tmp_path, postgresql_url)

    assert reason == (
        "synchronous_commit is off, not on, although the connection sets it; behind a pooler, set"
        " it for the role"
    )


@pytest.mark.parametrize(
    ("of_the_url", "words"),
    [
        ({"user": "nobody"}, 'role "nobody" does not exist'),
        ({"dbname": "nothing"}, 'database "nothing" does not exist'),
        ({"sslmode": "require"}, "server does not support SSL, but SSL was required"),
        ({"port": "1"}, "Connection refused"),
        ({"host": "/nowhere"}, "No such file or directory"),
    ],
    ids=["role", "database", "TLS", "port", "host"],
)
def test_an_unreachable_postgresql_is_refused_with_its_own_message(
    postgresql_url: str, tmp_path: Path, of_the_url: dict[str, str], words: str
) -> None:
    with proxied(postgresql_url) as proxy:
        named = {**conninfo_to_dict(proxy.url), "password": "s3cret", **of_the_url}
        host = f"host={named['host']}&port={named['port']}&sslmode={named.get('sslmode', 'prefer')}"
        url = f"postgresql://{named['user']}:{named['password']}@/{named['dbname']}?{host}"

        with pytest.raises(DatabaseOutOfReach) as refused:
            open_database(url, tmp_path)

        (problem,) = postgresql_problems(url)
    for text in (str(refused.value), problem):
        assert words in text
        assert "\n" not in text
        assert "s3cret" not in text


def test_a_read_only_database_is_refused_as_read_only(postgresql_url: str, tmp_path: Path) -> None:
    name = conninfo_to_dict(postgresql_url)["dbname"]
    administer(postgresql_url, f"ALTER DATABASE {name} SET default_transaction_read_only = on")

    assert "session is read-only" in refusal(tmp_path, postgresql_url)


@pytest.mark.parametrize("password", ["x@s3cret", "x@s3cret:9", "s3cret/x", "@@s3cret"])
def test_an_unescaped_password_is_in_no_message(tmp_path: Path, password: str) -> None:
    reason = refusal(tmp_path, f"postgresql://runrecovery:{password}@127.0.0.1:1/runrecovery")

    assert reason == (
        "its URL cannot be read; are special characters of the password percent-encoded?"
    )


def test_a_url_that_cannot_be_parsed_is_refused_without_its_password(tmp_path: Path) -> None:
    reason = refusal(tmp_path, "postgresql://runrecovery:s3%zzcret@db/runrecovery")

    assert reason == (
        "its URL cannot be read; are special characters of the password percent-encoded?"
    )


def test_check_reports_that_a_newer_version_has_used_the_store(postgresql_url: str) -> None:
    administer(
        postgresql_url,
        "INSERT INTO schema_migration (name, applied) VALUES ('9999_later', '2026-11-24')",
    )

    assert postgresql_problems(postgresql_url) == [
        "the PostgreSQL database: was made by a newer version (step 9999_later)"
    ]


# -- SQLite ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"hello, world" * 100, "is not a SQLite database"),
        (b"SQLite format 3\0", "is not a SQLite database"),
    ],
    ids=["empty", "foreign", "cut short"],
)
def test_a_file_that_is_no_store_is_refused_untouched(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / NAME).write_bytes(content)

    assert reason in refusal(tmp_path)
    assert {NAME: content} == contents(tmp_path)


def test_the_file_of_another_application_is_refused_untouched(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / NAME)) as theirs:
        theirs.execute("PRAGMA application_id = 7")
        theirs.execute("CREATE TABLE run (id)")
        theirs.commit()
    before = contents(tmp_path)

    assert "another application" in refusal(tmp_path)
    assert before == contents(tmp_path)


def test_a_missing_file_is_refused_and_not_created_again(made: Path) -> None:
    (made / NAME).unlink()
    before = contents(made)

    assert "is gone" in refusal(made)
    assert before == contents(made)


def test_a_file_that_was_truncated_is_refused(made: Path) -> None:
    (made / NAME).write_bytes(b"")

    assert "is empty" in refusal(made)


def test_files_of_a_crashed_first_start_do_not_hinder_the_next(tmp_path: Path) -> None:
    for suffix in (".new", ".new-wal", ".new-shm"):
        (tmp_path / (NAME + suffix)).write_bytes(b"half of a database")

    open_database("", tmp_path).close()

    assert {NAME, NAME + ".installed"} == set(contents(tmp_path))


def test_a_crash_before_the_marker_file_was_written_is_repaired(made: Path) -> None:
    (made / (NAME + ".installed")).unlink()

    open_database("", made).close()

    assert (made / (NAME + ".installed")).exists()


def test_a_locked_file_is_refused_as_locked(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SQLITE_PRAGMAS, "busy_timeout", 20)
    with closing(sqlite3.connect(made / NAME)) as other:
        other.execute("PRAGMA locking_mode = EXCLUSIVE")
        other.execute("UPDATE instance SET epoch = epoch")
        other.commit()

        said = "is busy: another connection holds its lock (database is locked)"
        assert refusal(made) == said


def test_only_the_owner_can_read_the_files(tmp_path: Path) -> None:
    db = open_database("", tmp_path)
    with db.transaction():
        db.execute("UPDATE run SET version = version")

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    db.close()

    assert {NAME, NAME + "-wal", NAME + "-shm", NAME + ".installed"} == set(modes)
    assert {0o600} == set(modes.values())


# Literal: a comparison with the service's own table would accept every value in the table.
DURABLE_SETTINGS = {
    "journal_mode": "wal",
    "synchronous": 2,  # FULL
    "foreign_keys": 1,
    "busy_timeout": 5000,
    "trusted_schema": 0,
    "cell_size_check": 1,
}


def settings_of(db: Database) -> dict[str, object]:
    """Return the settings of the calling thread's connection."""
    rows = {name: db.fetch_one(f"PRAGMA {name}") for name in DURABLE_SETTINGS}
    return {name: row and row[0] for name, row in rows.items()}


@pytest.mark.parametrize("use", ["read_row", "read", "write", "renew", "run_exclusive"])
async def test_every_connection_has_the_durable_settings(sqlite_store: Database, use: str) -> None:
    storage = Storage(sqlite_store)
    try:
        assert await getattr(storage, use)(settings_of) == DURABLE_SETTINGS
    finally:
        storage.close()


def test_a_new_store_and_a_reopened_one_have_the_durable_settings(tmp_path: Path) -> None:
    for _ in range(2):
        with closing(open_database("", tmp_path)) as db:
            assert settings_of(db) == DURABLE_SETTINGS


def test_a_setting_that_does_not_take_effect_is_refused(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SQLITE_PRAGMAS, "synchronous", 99)

    assert "PRAGMA synchronous" in refusal(made)


def test_a_sqlite_store_can_be_named_by_url(tmp_path: Path) -> None:
    place = tmp_path / "elsewhere.db"

    open_database(f"sqlite:///{place}", tmp_path).close()

    assert place.exists()
    assert sqlite_file.sqlite_path("postgresql://x", tmp_path) is None


def test_postgresql_commits_are_durable_and_bounded(database: Database) -> None:
    if database.dialect.kind is not DatabaseKind.POSTGRESQL:
        pytest.skip("settings of PostgreSQL")

    def setting(name: str) -> object:
        row = database.fetch_one("SELECT current_setting(?)", (name,))
        return row and row[0]

    assert tuple(
        map(
            setting,
            (
                "synchronous_commit", "statement_timeout", "lock_timeout",
                "idle_in_transaction_session_timeout", "timezone",
            ),
        )
    ) == ("on", "1min", "10s", "5s", "UTC")  # fmt: skip


@pytest.fixture
def sqlite_store(tmp_path: Path) -> Iterator[Database]:
    db = open_database("", tmp_path)
    yield db
    db.close()


# -- the lock file -----------------------------------------------------------------------------


def test_a_file_in_use_is_refused_with_the_name_of_its_holder(tmp_path: Path) -> None:
    held = LockFile(tmp_path / "lock", "the data directory", "pid 4711")

    with pytest.raises(Held, match=r"the data directory is held by pid 4711"):
        LockFile(tmp_path / "lock", "the data directory", "pid 4712")
    held.release()

    again = LockFile(tmp_path / "lock", "the data directory", "pid 3")
    assert (tmp_path / "lock").read_text() == "pid 3"
    again.release()


def test_a_removed_or_replaced_lock_file_is_noticed(tmp_path: Path) -> None:
    lock = LockFile(tmp_path / "lock", "the data directory", "pid 4711")
    lock.demand_in_place()

    (tmp_path / "lock").rename(tmp_path / "kept")
    with pytest.raises(DataDirRefused, match="was removed or replaced"):
        lock.demand_in_place()
    (tmp_path / "lock").touch()
    with pytest.raises(DataDirRefused, match="was removed or replaced"):
        lock.demand_in_place()
    (tmp_path / "kept").rename(tmp_path / "lock")
    lock.demand_in_place()
    lock.release()


# -- the lock of the SQLite file -----------------------------------------------------------------


@pytest.fixture
def locks(made: Path) -> Iterator[list[Lock]]:
    """The locks of an open store."""
    held: list[Lock] = []
    with closing(open_database("", made, locks=held)) as db, db.transaction():
        db.execute("UPDATE run SET version = version")
        yield held
    for lock in held:
        lock.release()


@pytest.mark.parametrize("link", [os.symlink, os.link], ids=["symbolic", "hard"])
def test_a_sqlite_file_is_locked_under_all_its_names(
    made: Path,
    tmp_path_factory: pytest.TempPathFactory,
    locks: list[Lock],
    link: Callable[..., None],
) -> None:
    other = tmp_path_factory.mktemp("other")
    link(made / NAME, other / NAME)

    with pytest.raises(Held, match=f"pid {os.getpid()}"):
        open_database("", other, locks=[])
    (lock,) = locks
    lock.release()
    locks.clear()

    DatabaseLock(other / NAME).release()


@pytest.mark.parametrize(
    ("pid", "holder"), [("4711", "pid 4711"), ("0", "a process of another container")]
)
def test_the_holder_of_a_sqlite_file_is_named_as_far_as_it_is_known(
    made: Path,
    tmp_path: Path,
    locks: list[Lock],
    monkeypatch: pytest.MonkeyPatch,
    pid: str,
    holder: str,
) -> None:
    found = (made / NAME).stat()
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    table = tmp_path / "locks"
    table.write_text(f"1: FLOCK  ADVISORY  WRITE {pid} {device}:{found.st_ino} 0 EOF\n")
    monkeypatch.setattr(storage_locks, "LOCK_TABLE", table)

    with pytest.raises(Held) as held:
        open_database("", made, locks=[])

    assert held.value.holder == f"{holder}, through another lock file or path"
    assert len(locks) == 1


def test_the_lock_of_a_sqlite_file_ends_with_its_release(made: Path) -> None:
    for _ in range(2):
        locks: list[Lock] = []
        open_database("", made, locks=locks).close()
        (lock,) = locks
        lock.release()


def test_a_file_that_has_a_second_name_is_refused(made: Path) -> None:
    os.link(made / NAME, made / "second")

    assert "has another name" in refusal(made)
    (made / "second").unlink()
    open_database("", made).close()
