"""A start checks a SQLite file for damaged pages, within a time limit."""

from __future__ import annotations

import shutil
import sqlite3
import stat
import subprocess
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.domain.start_errors import DatabaseRefused
from runrecovery_service.storage import instances, quick_check, runs, trial
from runrecovery_service.storage.integrity import integrity_problems
from runrecovery_service.storage.opening import open_database
from storage.service_store import ServiceStore, boot

PAGE = 4096


def break_page(file: Path, of: str) -> None:
    """Overwrite the page on which an index or a table begins."""
    with closing(sqlite3.connect(file)) as connection:
        ((page,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = ?", (of,))
    with file.open("r+b") as raw:
        raw.seek((page - 1) * PAGE)
        raw.write(b"\xff" * PAGE)


def make(folder: Path, *, stopped_in_order: bool) -> Path:
    """Create a store as a service leaves it after a planned stop or a crash."""
    with closing(open_database("", folder)) as db:
        owner = instances.claim(db, boot(), now=ServiceStore.now)
        if stopped_in_order:
            instances.resign(db, owner)
    return folder / "runrecovery.db"


@pytest.mark.parametrize("stopped_in_order", [True, False])
def test_a_damaged_page_refuses_the_start(tmp_path: Path, *, stopped_in_order: bool) -> None:
    file = make(tmp_path, stopped_in_order=stopped_in_order)
    break_page(file, "run_queue")
    before = file.read_bytes()

    with pytest.raises(DatabaseRefused, match=r"is damaged \(Page \d+: .+\); docs/operations\.md"):
        open_database("", tmp_path)

    assert file.read_bytes() == before


@pytest.mark.parametrize(("stopped_in_order", "bound"), [(True, 0.5), (False, 10.0)])
def test_a_check_may_take_longer_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, stopped_in_order: bool, bound: float
) -> None:
    file = make(tmp_path, stopped_in_order=stopped_in_order)
    taken: list[float] = []
    interrupting = quick_check._interrupting

    def note(connection: sqlite3.Connection, within_s: float) -> Any:
        taken.append(within_s)
        return interrupting(connection, within_s)

    monkeypatch.setattr(quick_check, "_interrupting", note)
    with closing(sqlite3.connect(file)) as connection:
        assert quick_check.find_damage(connection) is None

    assert taken == [bound]


def test_a_file_whose_check_takes_too_long_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make(tmp_path, stopped_in_order=False)
    for name in ("AFTER_CRASH_S", "REPEAT_S"):
        monkeypatch.setattr(quick_check, name, 0.0001)
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("CREATE TABLE large (id INTEGER PRIMARY KEY, text TEXT)")
        connection.executemany(
            "INSERT INTO large (text) VALUES (?)", (("x" * 2000,) for _ in range(50_000))
        )
        connection.commit()

    open_database("", tmp_path).close()

    assert "storage.check_cut_short" in capsys.readouterr().out


def test_a_file_without_tables_is_refused_and_check_reports_it(tmp_path: Path) -> None:
    file = make(tmp_path, stopped_in_order=True)
    file.unlink()
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("PRAGMA application_id = 1381122902")
        connection.execute("CREATE TABLE lost_and_found (id)")
    Path(f"{file}.installed").unlink()

    said = "has none of the service's tables; restore a backup"
    assert integrity_problems(file) == [f"{file}: {said}"]
    with pytest.raises(DatabaseRefused, match=said):
        open_database("", tmp_path)


@pytest.mark.parametrize("damaged", ["run_queue", "run_label"])
def test_the_documented_repair_saves_the_runs(tmp_path: Path, damaged: str) -> None:
    if shutil.which("sqlite3") is None:
        pytest.skip("no sqlite3 command here")
    with closing(open_database("", tmp_path)) as db:
        store = ServiceStore(db=db, owner=instances.claim(db, boot(), now=ServiceStore.now))
        run = store.create()
    break_page(tmp_path / "runrecovery.db", damaged)
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text("utf-8")
    script = page.partition("### A damaged database")[2].split("```\n")[1]

    subprocess.run(["bash", "-c", script], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)

    assert integrity_problems(tmp_path / "runrecovery.db") == []
    assert stat.S_IMODE((tmp_path / "runrecovery.db").stat().st_mode) == 0o600
    with closing(open_database("", tmp_path)) as db:
        assert runs.get(db, run.run_id).status is RunStatus.QUEUED


# -- trials ------------------------------------------------------------------------------------


def try_it(store: ServiceStore) -> None:
    trial.read_newest_run(store.db)
    trial.try_create_and_take(
        store.db, owner=store.owner, due_in=store.due_in, steady=store.steady, now=store.tick()
    )


def test_a_trial_changes_nothing_and_announces_nothing(store: ServiceStore) -> None:
    run = store.create()
    before = store.dump()
    store.db.take_changed_runs()

    try_it(store)

    assert store.dump() == before
    assert store.db.take_changed_runs() == frozenset()
    assert store.get(run).status is RunStatus.QUEUED


@pytest.mark.parametrize(
    "breakage",
    [
        "ALTER TABLE process_lease RENAME TO elsewhere",
        "ALTER TABLE run_label RENAME TO elsewhere",
        "ALTER TABLE interaction RENAME TO elsewhere",
        "ALTER TABLE recovery_event RENAME TO elsewhere",
    ],
)
def test_a_trial_fails_where_real_work_would(store: ServiceStore, breakage: str) -> None:
    store.create()
    with store.db.transaction():
        store.db.execute(breakage)

    with pytest.raises(Exception, match=r"no such table|does not exist"):
        try_it(store)
