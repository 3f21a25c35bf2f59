"""A copy of a SQLite store is kept only if a check finds everything in it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from runrecovery_service.domain.start_errors import DatabaseRefused
from runrecovery_service.storage import backup, instances
from runrecovery_service.storage.backup import backup_sqlite
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.sql_dialects import DatabaseKind
from storage.service_store import ServiceStore, boot

NAME = "runrecovery.db"
BACKUPS = """
import sys
from pathlib import Path
from runrecovery_service.storage.backup import backup_sqlite
for n in range(4):
    copy = Path(sys.argv[2]) / f"copy-{n}.db"
    print(backup_sqlite(Path(sys.argv[1]), copy), flush=True)
"""


@pytest.fixture
def store_file(store: ServiceStore, tmp_path: Path) -> Path:
    """A closed store with three runs of one instance and two of another."""
    if store.db.dialect.kind is not DatabaseKind.SQLITE:
        pytest.skip("PostgreSQL is backed up with its own tools")
    instances.claim(store.db, boot("other"), now=store.now)
    for instance, epoch, runs in (("default", 1, 3), ("other", 2, 2)):
        for _ in range(runs):
            store.create(owner=Owner(instance, epoch, "t"))
    store.db.close()
    return tmp_path / NAME


def test_a_backup_reports_the_number_of_runs_of_each_instance(
    store_file: Path, tmp_path: Path
) -> None:
    assert backup_sqlite(store_file, tmp_path / "copy.db") == {"default": 3, "other": 2}


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("DELETE FROM run WHERE owner = 'other'", "has 0 rows, not 2 (run, instance 'other')"),
        ("UPDATE run SET owner = 'other'", "instance '"),
        ("DELETE FROM instance", "has 0 rows, not 2 (instance)"),
        ("DROP TABLE run_label", "has 0 rows, not 5 (run_label)"),
    ],
)
def test_a_copy_that_lacks_rows_is_refused_and_removed(
    store_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str, reason: str
) -> None:
    def copy_badly(source: sqlite3.Connection, copy: sqlite3.Connection) -> None:
        source.backup(copy)
        copy.execute("PRAGMA foreign_keys = 0")
        copy.execute(damage)
        copy.commit()

    monkeypatch.setattr(backup, "_copy_pages", copy_badly)

    with pytest.raises(DatabaseRefused) as refused:
        backup_sqlite(store_file, tmp_path / "copy.db")

    assert reason in refused.value.reason
    assert not (tmp_path / "copy.db").exists()


def test_a_copy_with_every_row_that_is_damaged_is_refused_and_removed(
    store_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy_badly(source: sqlite3.Connection, copy: sqlite3.Connection) -> None:
        source.backup(copy)
        copy.execute("PRAGMA writable_schema = 1")
        copy.execute("DELETE FROM sqlite_schema WHERE type = 'index' AND sql IS NOT NULL")
        copy.commit()

    monkeypatch.setattr(backup, "_copy_pages", copy_badly)

    with pytest.raises(DatabaseRefused) as refused:
        backup_sqlite(store_file, tmp_path / "copy.db")

    assert refused.value.place == str(tmp_path / "copy.db")
    assert "never used" in refused.value.reason
    assert not (tmp_path / "copy.db").exists()


@pytest.mark.parametrize("kept_pages", range(1, 30, 3))
def test_a_backup_of_a_damaged_store_names_the_store_and_leaves_no_copy(
    store_file: Path, tmp_path: Path, kept_pages: int
) -> None:
    pages = bytearray(store_file.read_bytes())
    pages[kept_pages * 4096 :] = b"\xa5" * (len(pages) - kept_pages * 4096)
    store_file.write_bytes(pages)

    with pytest.raises(DatabaseRefused, match="is damaged") as refused:
        backup_sqlite(store_file, tmp_path / "copy.db")

    assert refused.value.place == str(store_file)
    assert "copy.db" not in refused.value.reason
    assert not (tmp_path / "copy.db").exists()


def test_every_backup_during_writes_is_complete(
    store_file: Path, tmp_path: Path, store: ServiceStore
) -> None:
    copies = tmp_path / "copies"
    copies.mkdir()
    command = [sys.executable, "-c", BACKUPS, str(store_file), str(copies)]
    made = 5
    with closing(open_database("", store_file.parent)) as db:
        store.db = db
        backups = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        while backups.poll() is None:
            store.create(owner=Owner("other", 2, "t"))
            made += 1
    assert backups.stdout is not None
    with backups.stdout as output:
        lines = output.read().splitlines()

    assert backups.returncode == 0
    assert len(lines) == len(set(lines)) == 4
    for n in range(4):
        with closing(sqlite3.connect(f"file:{copies}/copy-{n}.db?immutable=1", uri=True)) as copy:
            ((found,),) = copy.execute("SELECT count(*) FROM run WHERE owner = 'other'").fetchall()
        assert lines[n] == f"{{'default': 3, 'other': {found}}}"
        assert 2 <= found <= made


def test_a_backup_without_the_wal_is_refused_and_leaves_no_file(
    store_file: Path, tmp_path: Path, store: ServiceStore
) -> None:
    with closing(open_database("", store_file.parent)) as db:
        store.db = db
        store.create(owner=Owner("other", 2, "t"))
        store_file.with_name(f"{NAME}-wal").unlink()

        with pytest.raises(DatabaseRefused, match="lacks 1 commits that were acknowledged"):
            backup_sqlite(store_file, tmp_path / "copy.db")

    assert not (tmp_path / "copy.db").exists()
