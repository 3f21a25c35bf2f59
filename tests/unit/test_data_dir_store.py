"""A start uses the folders of runs of its own store only."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from runrecovery_service.config.settings import Settings
from runrecovery_service.data_dir_store import demand_own_store
from runrecovery_service.domain.start_errors import DataDirRefused
from runrecovery_service.offline import check
from runrecovery_service.storage.backup import backup_sqlite
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.opening import open_database

NewDatabase = Callable[[Path], Database]


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def test_a_first_start_adopts_the_folders_and_later_starts_find_them(
    database: Database, data_dir: Path
) -> None:
    (data_dir / "runs" / "7" / "1").mkdir(parents=True)

    demand_own_store(database, data_dir / "runs")
    adopted = (data_dir / "runs" / ".store").read_text()
    demand_own_store(database, data_dir / "runs")

    assert (data_dir / "runs" / ".store").read_text() == adopted
    assert len(adopted) == 33


def test_the_folders_of_another_store_refuse_the_start(
    new_database: NewDatabase, tmp_path: Path, data_dir: Path
) -> None:
    first, second = new_database(tmp_path / "first"), new_database(tmp_path / "second")
    demand_own_store(first, data_dir / "runs")

    with pytest.raises(
        DataDirRefused, match=r"/runs/\.store: names another database: .* move runs/"
    ):
        demand_own_store(second, data_dir / "runs")

    demand_own_store(first, data_dir / "runs")
    (tmp_path / "away").mkdir()
    shutil.move(data_dir / "runs", tmp_path / "away" / "runs")
    demand_own_store(second, data_dir / "runs")
    ids = [(folder / "runs" / ".store").read_text() for folder in (tmp_path / "away", data_dir)]
    assert ids[0] != ids[1]


def test_a_restored_backup_keeps_its_folders(data_dir: Path, tmp_path: Path) -> None:
    db = open_database("", data_dir)
    demand_own_store(db, data_dir / "runs")
    db.close()
    copy = tmp_path / "copy.db"
    backup_sqlite(data_dir / "runrecovery.db", copy)
    for file in data_dir.glob("runrecovery.db*"):
        file.unlink()
    copy.rename(data_dir / "runrecovery.db")

    restored = open_database("", data_dir)

    demand_own_store(restored, data_dir / "runs")
    restored.close()


def test_a_check_finds_what_a_start_refuses(data_dir: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.db" for name in ("own", "other")}
    for name, file in files.items():
        db = open_database(f"sqlite:///{file}", data_dir)
        demand_own_store(db, (data_dir if name == "own" else tmp_path) / "runs")
        db.close()

    assert checked(f"sqlite:///{files['own']}", data_dir) == []
    (problem,) = checked(f"sqlite:///{files['other']}", data_dir)
    assert problem.startswith(f"{data_dir}/runs/.store: names another database")


def test_a_check_finds_what_a_start_on_postgresql_refuses(
    postgresql_url: str, data_dir: Path
) -> None:
    db = open_database(postgresql_url, data_dir)
    demand_own_store(db, data_dir / "runs")
    assert checked(postgresql_url, data_dir) == []

    db.execute("UPDATE store_identity SET store_id = 'x'")
    db.close()
    (problem,) = checked(postgresql_url, data_dir)
    assert problem.startswith(f"{data_dir}/runs/.store: names another database")


def test_a_check_on_a_new_database_finds_folders_of_another(
    empty_database_url: str, data_dir: Path
) -> None:
    assert checked(empty_database_url, data_dir) == []

    (data_dir / "runs").mkdir()
    (data_dir / "runs" / ".store").write_text("of another\n")

    (problem,) = checked(empty_database_url, data_dir)
    assert problem.startswith(f"{data_dir}/runs/.store: names another database")


def checked(url: str, data_dir: Path) -> list[str]:
    return check(Settings(data_dir=data_dir, database=url))


def test_an_id_that_was_not_written_to_its_end_is_written_again(
    database: Database, data_dir: Path
) -> None:
    demand_own_store(database, data_dir / "runs")
    whole = (data_dir / "runs" / ".store").read_text()
    (data_dir / "runs" / ".store").write_text(whole[:7])

    demand_own_store(database, data_dir / "runs")

    assert (data_dir / "runs" / ".store").read_text() == whole


def test_a_pipe_in_the_place_of_the_id_refuses_the_start_at_once(
    database: Database, data_dir: Path
) -> None:
    (data_dir / "runs").mkdir()
    os.mkfifo(data_dir / "runs" / ".store")

    with pytest.raises(DataDirRefused, match="not a regular file"):
        demand_own_store(database, data_dir / "runs")
