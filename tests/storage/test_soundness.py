"""A start finds damaged pages of a SQLite file, within a bound of time."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from runrecovery_service.domain.errors import DatabaseRefused
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.storage import instances, soundness, trial
from runrecovery_service.storage.database import open_database

from .conftest import World, boot

PAGE = 4096


def break_index(file: Path) -> None:
    """Overwrite the page on which the index of queued runs begins."""
    with closing(sqlite3.connect(file)) as store:
        ((page,),) = store.execute("SELECT rootpage FROM sqlite_master WHERE name = 'run_queue'")
    with file.open("r+b") as raw:
        raw.seek((page - 1) * PAGE)
        raw.write(b"\xff" * PAGE)


def make(folder: Path, *, stopped_in_order: bool) -> Path:
    """Make a store that a service has left."""
    with closing(open_database("", folder)) as db:
        owner = instances.claim(db, boot(), now=World.now)
        if stopped_in_order:
            instances.resign(db, owner)
    return folder / "runrecovery.db"


@pytest.mark.parametrize("stopped_in_order", [True, False])
def test_a_damaged_page_refuses_the_start(tmp_path: Path, *, stopped_in_order: bool) -> None:
    file = make(tmp_path, stopped_in_order=stopped_in_order)
    break_index(file)
    before = file.read_bytes()

    with pytest.raises(DatabaseRefused, match=r"is damaged \(Page \d+: .+\); docs/operations\.md"):
        open_database("", tmp_path)

    assert file.read_bytes() == before


@pytest.mark.parametrize(("stopped_in_order", "bound"), [(True, 0.5), (False, 10.0)])
def test_the_time_to_look_is_longer_after_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, stopped_in_order: bool, bound: float
) -> None:
    file = make(tmp_path, stopped_in_order=stopped_in_order)
    taken: list[float] = []
    interrupting = soundness._interrupting

    def note(connection: sqlite3.Connection, within_s: float) -> Any:
        taken.append(within_s)
        return interrupting(connection, within_s)

    monkeypatch.setattr(soundness, "_interrupting", note)
    with closing(sqlite3.connect(file)) as store:
        assert soundness.damage(store) is None

    assert taken == [bound]


def test_a_file_that_takes_too_long_is_taken_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = make(tmp_path, stopped_in_order=False)
    for name in ("AFTER_CRASH_S", "REPEAT_S"):
        monkeypatch.setattr(soundness, name, 0.0001)
    with closing(sqlite3.connect(file)) as store:
        store.execute("PRAGMA synchronous = OFF")
        store.execute("CREATE TABLE large (id INTEGER PRIMARY KEY, text TEXT)")
        store.executemany(
            "INSERT INTO large (text) VALUES (?)", (("x" * 2000,) for _ in range(50_000))
        )
        store.commit()

    open_database("", tmp_path).close()

    assert "storage.check_cut_short" in capsys.readouterr().out


# -- trials ------------------------------------------------------------------------------------


def try_it(world: World) -> None:
    trial.read(world.db)
    trial.create_and_take(
        world.db, owner=world.owner, due_in=world.due_in, steady=world.steady, now=world.tick()
    )


def test_a_trial_changes_nothing_and_announces_nothing(world: World) -> None:
    run = world.create()
    before = world.dump()
    world.db.take_touched()

    try_it(world)

    assert world.dump() == before
    assert world.db.take_touched() == frozenset()
    assert world.get(run).status is RunStatus.QUEUED


@pytest.mark.parametrize(
    "breakage",
    [
        "ALTER TABLE process_lease RENAME TO elsewhere",
        "ALTER TABLE run_label RENAME TO elsewhere",
        "ALTER TABLE interaction RENAME TO elsewhere",
        "ALTER TABLE recovery_event RENAME TO elsewhere",
    ],
)
def test_a_trial_fails_where_the_work_would(world: World, breakage: str) -> None:
    world.create()
    with world.db.transaction():
        world.db.execute(breakage)

    with pytest.raises(Exception, match=r"no such table|does not exist"):
        try_it(world)
