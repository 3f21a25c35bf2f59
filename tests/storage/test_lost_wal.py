"""A SQLite store that lacks acknowledged commits is refused."""

from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing, suppress
from pathlib import Path

import pytest
from runrecovery_service.domain.start_errors import DatabaseRefused
from runrecovery_service.storage import wal_index
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.integrity import integrity_problems
from runrecovery_service.storage.migrate import migrate
from runrecovery_service.storage.opening import open_database

NAME = "runrecovery.db"
MARKER = f"{NAME}.installed"
KILLED_WRITER = Path(__file__).with_name("killed_writer.py")


def add(db: Database, name: str) -> None:
    db.execute("INSERT INTO request_receipt VALUES (?, 'm', 'f', 1, 1, '')", (name,))


def receipts(db: Database) -> int:
    return len(db.fetch_all("SELECT 1 FROM request_receipt"))


def contents(directory: Path) -> dict[str, bytes]:
    """Return the content of a store's files, except for the index, into which readers write too."""
    files = [path for path in directory.iterdir() if not path.name.endswith("-shm")]
    return {path.name: path.read_bytes() for path in files}


def reason(directory: Path) -> str:
    with pytest.raises(DatabaseRefused) as refused:
        open_database("", directory).close()
    return refused.value.reason


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """The directory of a service that was killed after five commits, all of them in the log."""
    living = tmp_path / "living"
    living.mkdir()
    open_database("", living).close()
    with closing(open_database("", living)) as db:
        for n in range(5):
            with db.transaction():
                add(db, f"w{n}")
        return shutil.copytree(living, tmp_path / "killed")


def test_a_start_after_a_kill_finds_everything(killed: Path) -> None:
    assert (killed / f"{NAME}-wal").stat().st_size > 0

    with closing(open_database("", killed)) as db:
        assert receipts(db) == 5


def test_a_store_without_its_wal_is_refused_and_no_file_is_touched(killed: Path) -> None:
    (killed / f"{NAME}-wal").rename(killed / "log")
    (killed / f"{NAME}-shm").unlink()
    before = contents(killed)

    said = reason(killed)

    assert "lacks 5 commits that were acknowledged" in said
    assert MARKER in said
    assert contents(killed) == before
    assert integrity_problems(killed / NAME) == [f"{killed / NAME}: {said}"]
    (killed / "log").rename(killed / f"{NAME}-wal")
    with closing(open_database("", killed)) as db:
        assert receipts(db) == 5


def test_a_store_with_a_truncated_wal_is_refused_and_no_file_is_touched(killed: Path) -> None:
    log = killed / f"{NAME}-wal"
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    before = contents(killed)

    assert "commits that were acknowledged" in reason(killed)
    assert contents(killed) == before


def test_a_store_whose_marker_file_was_removed_opens_without_the_lost_commits(killed: Path) -> None:
    (killed / f"{NAME}-wal").unlink()
    (killed / MARKER).unlink()

    with closing(open_database("", killed)) as db:
        assert receipts(db) == 0
    with closing(open_database("", killed)) as db, db.transaction():
        add(db, "again")


def test_an_older_copy_in_the_place_of_the_store_is_refused(tmp_path: Path) -> None:
    open_database("", tmp_path).close()
    shutil.copy(tmp_path / NAME, tmp_path / "older")
    with closing(open_database("", tmp_path)) as db, db.transaction():
        add(db, "newer")
    (tmp_path / "older").rename(tmp_path / NAME)

    assert "lacks 1 commits" in reason(tmp_path)


def test_a_removed_wal_index_loses_nothing(killed: Path) -> None:
    (killed / f"{NAME}-shm").unlink()

    with closing(open_database("", killed)) as db:
        assert receipts(db) == 5


def test_another_program_may_empty_and_remove_the_wal(killed: Path) -> None:
    with closing(sqlite3.connect(killed / NAME)) as theirs:
        assert theirs.execute("SELECT count(*) FROM request_receipt").fetchall() == [(5,)]
    assert not (killed / f"{NAME}-wal").exists()

    with closing(open_database("", killed)) as db:
        assert receipts(db) == 5


def test_only_transactions_that_change_something_and_commit_count(tmp_path: Path) -> None:
    with closing(open_database("", tmp_path)) as db:
        before = (tmp_path / MARKER).read_text()
        with db.transaction():
            db.fetch_all("SELECT 1 FROM run")
        with pytest.raises(ZeroDivisionError), db.transaction():
            add(db, f"{1 / 0}")
        assert (tmp_path / MARKER).read_text() == before
        with db.transaction():
            add(db, "one")
            with db.transaction():
                add(db, "the same")

        assert db.fetch_all("SELECT commits FROM commit_count") == [(1,)]
        assert (tmp_path / MARKER).read_text() == (
            "A runrecovery database was created beside this file.\n"
            "Commits acknowledged: 00000000000000000001\n"
        )


def write_and_undo(db: Database) -> None:
    with suppress(ZeroDivisionError), db.transaction():
        add(db, "undone")
        with suppress(ZeroDivisionError), db.transaction():
            add(db, "inner")
            add(db, f"{1 / 0}")
        add(db, f"{1 / 0}")


def test_a_rolled_back_trial_counts_no_commit_and_writes_nothing(tmp_path: Path) -> None:
    with closing(open_database("", tmp_path)) as db:
        db.watch_files()
        with db.transaction():
            add(db, "one")
        before = contents(tmp_path)

        with db.transaction():
            write_and_undo(db)
        with db.transaction(), db.transaction():
            pass

        assert contents(tmp_path) == before
        with db.transaction():
            write_and_undo(db)
            add(db, "two")
            write_and_undo(db)
        assert db.fetch_all("SELECT commits FROM commit_count") == [(2,)]
        assert receipts(db) == 2


def test_a_marker_of_an_older_version_gets_its_count_at_the_next_start(tmp_path: Path) -> None:
    open_database("", tmp_path).close()
    (tmp_path / MARKER).write_text("A runrecovery database was created beside this file.\n")

    with closing(open_database("", tmp_path)) as db, db.transaction():
        add(db, "one")

    assert (tmp_path / MARKER).read_text().endswith("Commits acknowledged: 00000000000000000001\n")


def test_a_marker_that_cannot_be_written_fails_no_commit(tmp_path: Path) -> None:
    with closing(open_database("", tmp_path)) as db:
        (tmp_path / MARKER).unlink()
        (tmp_path / MARKER).mkdir()

        with db.transaction():
            add(db, "one")

        assert receipts(db) == 1


def test_a_kill_at_any_moment_is_not_taken_for_a_lost_wal(tmp_path: Path) -> None:
    """Writers that often empty their log are killed; the store keeps every acknowledged commit."""
    open_database("", tmp_path).close()

    command = [sys.executable, str(KILLED_WRITER), str(tmp_path), "12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("12 kills survived\n")


def test_a_store_that_was_just_migrated_counts_commits(tmp_path: Path) -> None:
    with closing(open_database("", tmp_path)) as db:
        assert migrate(db) == []
        assert db.fetch_all("SELECT id, commits FROM commit_count") == [(1, 0)]


def test_two_readings_of_a_wal_index_differ_unless_only_marks_of_readers_changed() -> None:
    raw = bytes(wal_index.SIZE)
    changed = [
        at
        for at in range(wal_index.SIZE)
        if not wal_index.is_same(raw, raw[:at] + b"x" + raw[at + 1 :])
    ]

    assert changed == [*range(100), *range(128, 132)]
