"""A SQLite store with a removed, replaced or overwritten file acknowledges no more commits."""

from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from runrecovery_service.domain.errors import StorageUnavailable
from runrecovery_service.domain.start_errors import DataDirRefused, StoreLost
from runrecovery_service.lifecycle import store_kept
from runrecovery_service.storage import backup, file_watch
from runrecovery_service.storage.async_storage import Storage
from runrecovery_service.storage.backup import backup_sqlite
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.group_commit import GroupCommitWriter
from runrecovery_service.storage.integrity import integrity_problems
from runrecovery_service.storage.opening import open_database
from support.processes import open_files

NAME = "runrecovery.db"
DELETE_AND_CHECKPOINT = """
import sqlite3, sys
store = sqlite3.connect(sys.argv[1])
store.execute("DELETE FROM request_receipt WHERE request_id = 'w3'")
store.commit()
print(store.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall())
store.close()
"""


def remove(file: Path) -> None:
    file.unlink()


def replace(file: Path) -> None:
    file.with_name("new").write_bytes(file.read_bytes())
    file.with_name("new").rename(file)


damages = pytest.mark.parametrize("damage", [remove, replace])
suffixes = pytest.mark.parametrize("suffix", ["", "-wal", "-shm"], ids=["file", "log", "index"])
Damage = Callable[[Path], None]


@contextmanager
def opened(data_dir: Path) -> Iterator[Database]:
    """Open a store, and close every connection to it at the end.

    A store that has lost a file leaves its connections open by itself.
    """
    db = open_database("", data_dir)
    peewee: Any = db.peewee
    made: list[sqlite3.Connection] = [peewee.connection()]
    connect = peewee._connect

    def recorded_connect() -> sqlite3.Connection:
        made.append(connect())
        return made[-1]

    peewee._connect = recorded_connect
    try:
        with closing(db):
            yield db
    finally:
        for connection in made:
            connection.close()


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    """An open store, with one acknowledged write that is only in the log."""
    with opened(tmp_path) as db:
        db.watch_files()
        with db.transaction():
            add(db, "acknowledged")
        yield db


def add(db: Database, name: str) -> None:
    db.execute("INSERT INTO request_receipt VALUES (?, 'm', 'f', 1, 1, '')", (name,))


def contents(directory: Path) -> dict[str, bytes]:
    """Return the content of a store's files, except for the index, into which readers write too."""
    files = [path for path in directory.iterdir() if not path.name.endswith("-shm")]
    return {path.name: path.read_bytes() for path in files}


def names(path: Path) -> list[str]:
    with closing(sqlite3.connect(f"file:{path}?immutable=1", uri=True)) as copy:
        return [name for (name,) in copy.execute("SELECT request_id FROM request_receipt")]


@damages
@suffixes
def test_no_transaction_begins_after_the_loss(
    db: Database, tmp_path: Path, suffix: str, damage: Damage
) -> None:
    damage(tmp_path / (NAME + suffix))
    begun = False

    with pytest.raises(StorageUnavailable), db.transaction():
        begun = True

    assert not begun
    with pytest.raises(StoreLost, match=f"{NAME}{suffix} was removed or replaced"):
        db.demand_in_place()


@damages
@suffixes
def test_a_commit_into_a_lost_store_is_not_acknowledged(
    db: Database, tmp_path: Path, suffix: str, damage: Damage
) -> None:
    def use() -> None:
        with db.transaction():
            add(db, "late")
            damage(tmp_path / (NAME + suffix))

    with pytest.raises(StorageUnavailable):
        use()


def test_no_write_of_a_shared_commit_is_acknowledged_after_the_loss(
    db: Database, tmp_path: Path
) -> None:
    writer = GroupCommitWriter(db)

    def lose(db: Database) -> None:
        (tmp_path / f"{NAME}-wal").unlink()

    uses: list[Callable[[Database], None]] = [lambda db: add(db, "first"), lose]
    uses += [lambda db, n=n: add(db, f"w{n}") for n in range(100)]  # type: ignore[misc]
    futures: list[Future[None]] = [Future() for _ in uses]
    for use, future in zip(uses, futures, strict=True):
        writer.put(use, future)
    writer.close()

    answers = [future.exception() for future in futures]
    assert {type(answer) for answer in answers[1:]} == {StorageUnavailable}


async def test_a_recovery_is_not_acknowledged_after_the_loss(db: Database, tmp_path: Path) -> None:
    storage = Storage(db)

    def recover(db: Database) -> None:
        with db.transaction():
            add(db, "late")
            (tmp_path / f"{NAME}-wal").unlink()

    with pytest.raises(StorageUnavailable):
        await storage.run_exclusive(recover)
    storage.close()


def test_no_new_connection_makes_a_new_wal(db: Database, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}-wal").unlink()

    with ThreadPoolExecutor(1) as pool, pytest.raises(StorageUnavailable):
        pool.submit(db.fetch_all, "SELECT 1").result()

    assert not (tmp_path / f"{NAME}-wal").exists()


def test_a_file_that_comes_back_counts_as_lost(db: Database, tmp_path: Path) -> None:
    log = tmp_path / f"{NAME}-wal"
    log.rename(tmp_path / "aside")
    with pytest.raises(StoreLost):
        db.demand_in_place()
    (tmp_path / "aside").rename(log)

    with pytest.raises(StorageUnavailable), db.transaction():
        pass


@damages
@suffixes
def test_a_rescued_copy_has_everything_and_the_directory_is_not_changed(
    db: Database, tmp_path: Path, suffix: str, damage: Damage
) -> None:
    damage(tmp_path / (NAME + suffix))
    with pytest.raises(StoreLost):
        db.demand_in_place()
    before = contents(tmp_path)

    copy = backup.rescue(db)
    db.close()

    assert copy is not None
    assert names(copy) == ["acknowledged"]
    assert integrity_problems(copy) == []
    copy.unlink()
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "ended_by", [DataDirRefused("lock", "was removed"), KeyboardInterrupt(), ValueError()]
)
def test_a_service_that_ends_by_another_error_rescues_a_lost_store_too(
    db: Database, tmp_path: Path, ended_by: BaseException
) -> None:
    def end() -> None:
        (tmp_path / f"{NAME}-wal").unlink()
        raise ended_by

    with pytest.raises(StoreLost) as lost, store_kept(db):
        end()

    assert lost.value.__cause__ is ended_by
    assert lost.value.copy is not None
    assert names(Path(lost.value.copy)) == ["acknowledged"]


def test_a_service_that_ends_with_its_store_in_place_keeps_its_own_error(db: Database) -> None:
    failed = DataDirRefused("lock", "was removed")

    with pytest.raises(DataDirRefused) as ended, store_kept(db):
        raise failed
    with store_kept(db):
        pass

    assert ended.value is failed
    assert ended.value.__cause__ is None


def test_a_rescue_that_cannot_be_written_returns_no_copy(db: Database, tmp_path: Path) -> None:
    (tmp_path / f"{NAME}-wal").unlink()
    tmp_path.rename(tmp_path.with_name("moved"))

    assert backup.rescue(db) is None
    tmp_path.with_name("moved").rename(tmp_path)


def test_other_connections_that_empty_the_wal_lose_nothing(db: Database, tmp_path: Path) -> None:
    """Connections of this process and of others are opened and closed, and empty the log."""
    with ThreadPoolExecutor(4) as pool:
        for n in range(20):
            with db.transaction():
                add(db, f"w{n}")
            for use in (db.fetch_all,) * 3:
                pool.submit(use, "SELECT count(*) FROM run").result()
            for closed in [pool.submit(db.close) for _ in range(8)]:
                closed.result()
    backup_sqlite_elsewhere(tmp_path)
    command = [sys.executable, "-c", DELETE_AND_CHECKPOINT, str(tmp_path / NAME)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    assert done.stdout == "[(0, 0, 0)]\n"
    db.demand_in_place()
    with db.transaction():
        add(db, "last")
    assert len(db.fetch_all("SELECT 1 FROM request_receipt")) == 21


def backup_sqlite_elsewhere(path: Path) -> None:
    """Copy the store in another process: closing a file drops this process's locks on it."""
    copy = "import sys; from pathlib import Path; from runrecovery_service.storage.backup import"
    copy += f" {backup_sqlite.__name__} as run; run(*map(Path, sys.argv[1:]))"
    command = [sys.executable, "-c", copy, str(path / NAME), str(path / "backup.db")]
    subprocess.run(command, check=True, capture_output=True)


def test_a_directory_that_cannot_be_searched_for_a_while_is_not_lost(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is simulated, because root can search every directory."""

    def denied(path: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(file_watch, "identity", denied)
        with pytest.raises(StorageUnavailable), db.transaction():
            pass
        with pytest.raises(PermissionError):
            db.demand_in_place()

    with db.transaction():
        add(db, "afterwards")


def test_a_directory_that_was_moved_away_is_a_lost_store(db: Database, tmp_path: Path) -> None:
    tmp_path.rename(tmp_path.with_name("moved"))
    tmp_path.write_text("a file in its place")
    try:
        with pytest.raises(StoreLost):
            db.demand_in_place()
    finally:
        tmp_path.unlink()
        tmp_path.with_name("moved").rename(tmp_path)


# -- overwritten in place ------------------------------------------------------------------------


def empty(file: Path) -> None:
    os.truncate(file, 0)


def halve(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def cut_the_end(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def blank(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def shorten_and_fill(file: Path) -> None:
    size = file.stat().st_size
    os.truncate(file, size // 2)
    os.truncate(file, size + 100_000)


overwritten = pytest.mark.parametrize(
    ("suffix", "damage"),
    [(suffix, damage) for suffix in ("", "-wal") for damage in (empty, blank)]
    + [("-wal", halve), ("-wal", cut_the_end), ("-wal", shorten_and_fill), ("", halve)],
)


@pytest.fixture
def copied(tmp_path: Path) -> Iterator[Database]:
    """An open store, whose log was copied into the file, with one commit since then."""
    with opened(tmp_path) as db:
        for n in range(20):
            with db.transaction():
                add(db, f"w{n}")
        db.fetch_all("PRAGMA wal_checkpoint(TRUNCATE)")
        db.watch_files()
        with db.transaction():
            add(db, "acknowledged")
        yield db


def test_a_file_that_is_overwritten_after_a_crash_and_a_start_is_noticed(
    db: Database, tmp_path: Path
) -> None:
    crashed = tmp_path / "crashed"
    crashed.mkdir()
    for suffix in ("", "-wal", ".installed"):
        shutil.copy(f"{tmp_path / NAME}{suffix}", crashed)

    with opened(crashed) as started:
        started.watch_files()
        started.demand_in_place()
        os.truncate(crashed / NAME, (crashed / NAME).stat().st_size + 4096)

        with pytest.raises(StoreLost, match="was cut short or overwritten"):
            started.demand_in_place()


@overwritten
def test_no_transaction_begins_after_a_file_was_overwritten(
    copied: Database, tmp_path: Path, suffix: str, damage: Damage
) -> None:
    damage(tmp_path / (NAME + suffix))
    begun = False

    with pytest.raises(StorageUnavailable), copied.transaction():
        begun = True

    assert not begun
    with pytest.raises(StoreLost, match=f"{NAME}{suffix} was cut short or overwritten under"):
        copied.demand_in_place()
    assert backup.rescue(copied) is None
    assert list(tmp_path.glob("*rescued*")) == []


@pytest.mark.parametrize("damage", [empty, blank, halve])
def test_a_commit_into_an_overwritten_wal_is_not_acknowledged(
    copied: Database, tmp_path: Path, damage: Damage
) -> None:
    def use() -> None:
        with copied.transaction():
            add(copied, "late")
            damage(tmp_path / f"{NAME}-wal")

    with pytest.raises(StorageUnavailable):
        use()


@pytest.mark.parametrize("made_by", ["backup", "cp"])
def test_a_backup_that_is_copied_over_the_store_in_use_is_a_lost_store(
    tmp_path: Path, made_by: str
) -> None:
    (tmp_path / "store").mkdir()
    open_database("", tmp_path / "store").close()
    file, older = tmp_path / "store" / NAME, tmp_path / "older.db"
    if made_by == "backup":
        backup_sqlite(file, older)
    else:
        shutil.copyfile(file, older)
    with opened(file.parent) as db:
        for n in range(200):
            with db.transaction():
                add(db, f"{n:0100}")
        db.fetch_all("PRAGMA wal_checkpoint(RESTART)")
        db.watch_files()
        with db.transaction():
            add(db, "acknowledged")

        shutil.copyfile(older, file)  # into the same file, as `cp` does

        with pytest.raises(StorageUnavailable), db.transaction():
            pass


def test_a_file_that_is_only_touched_is_not_lost(copied: Database, tmp_path: Path) -> None:
    for file in tmp_path.iterdir():
        os.utime(file, (1, 1))
        file.chmod(0o640)

    copied.demand_in_place()


@pytest.mark.parametrize("pages", [1, 3, 50])
def test_heavy_writing_with_small_checkpoints_is_not_taken_for_damage(
    tmp_path: Path, pages: int
) -> None:
    """SQLite restarts its log, truncates it, and returns pages of the file.

    Meanwhile other threads check the files all the time.
    """
    with opened(tmp_path) as db:
        db.watch_files()
        ended = threading.Event()

        def look() -> int:
            looks = 0
            while not ended.is_set():
                db.demand_in_place()
                looks += 1
            return looks

        with ThreadPoolExecutor(2) as pool:
            looking = [pool.submit(look) for _ in range(2)]
            db.execute(f"PRAGMA wal_autocheckpoint = {pages}")
            db.execute("PRAGMA journal_size_limit = 20000")
            for n in range(100):
                with db.transaction():
                    for row in range(20):
                        add(db, f"{n}-{row}-{'x' * 500}")
                if n % 10 == 0:
                    db.execute(f"PRAGMA wal_checkpoint({('TRUNCATE', 'RESTART')[n // 10 % 2]})")
                if n % 50 == 49:
                    db.execute("DELETE FROM request_receipt")
                    db.execute("VACUUM")
            ended.set()
            looks = [one.result() for one in looking]
    assert all(looks)


def test_nothing_of_a_closed_store_stays_open(tmp_path: Path) -> None:
    with opened(tmp_path) as db:
        db.watch_files()
        db.fetch_all("SELECT 1")

    links = open_files(os.getpid())
    assert [link for link in links if link.startswith(str(tmp_path))] == []
