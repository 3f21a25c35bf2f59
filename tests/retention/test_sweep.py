"""A sweep removes in batches what the policy says; a crash at any step leaves no file behind."""

from __future__ import annotations

import errno
import math
import os
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import pytest
import structlog
from runrecovery_service.domain.retention import RetentionKind
from runrecovery_service.domain.run import RunStatus
from runrecovery_service.retention import sweep as sweep_module
from runrecovery_service.retention.files import RunFiles
from runrecovery_service.storage import retention
from runrecovery_service.storage.database import Database
from support.clock import FakeClock
from support.waiting import until_async

from .conftest import DAY_S, Machine

HOUR_S: Final = 3600.0
"""Less than a day: a later time would have to be confirmed first."""


async def test_only_runs_that_have_reached_their_age_are_removed(machine: Machine) -> None:
    old = machine.ended(3)
    machine.age(DAY_S)
    young = machine.ended(2)
    machine.age(retention.SETTLES_S + 1)
    sweep = machine.sweep(ended_runs=DAY_S)

    await sweep.sweep()

    assert machine.rows == machine.folders == [str(run.key) for run in young]
    assert sweep.totals.removed == {RetentionKind.RUNS: len(old)}
    assert (sweep.totals.bytes_freed, sweep.totals.not_removed) == ({RetentionKind.RUNS: 330}, 0)
    assert sweep.totals.swept_at == machine.store.now


async def test_a_service_that_is_restarted_before_a_second_sweep_removes_runs(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "FIRST_SWEEP_S", 0.0)
    machine.ended(2)
    machine.age(HOUR_S + retention.SETTLES_S)
    sweep = machine.sweep(ended_runs=HOUR_S)

    async def has_swept() -> bool:
        return sweep.totals.swept_at is not None

    sweep.start()
    await until_async(has_swept, "it has swept once")
    await sweep.stop()

    assert machine.rows == machine.folders == []


async def test_of_too_many_runs_the_oldest_are_removed(machine: Machine) -> None:
    made = machine.ended(5)
    machine.age(retention.SETTLES_S + 1)

    await machine.sweep(max_ended_runs=2).sweep()

    assert machine.rows == machine.folders == [str(run.key) for run in made[3:]]


async def test_runs_that_ended_while_the_clock_was_ahead_take_no_place_of_newer_ones(
    machine: Machine,
) -> None:
    machine.store.step_wall_clock(timedelta(days=365))
    ahead = machine.ended(3)
    machine.store.step_wall_clock(-timedelta(days=365))
    newer = machine.ended(3)
    machine.age(retention.SETTLES_S + 1)

    await machine.sweep(max_ended_runs=2).sweep()

    assert machine.rows == sorted(str(run.key) for run in (*ahead, *newer[1:]))


async def test_without_a_policy_everything_stays(machine: Machine) -> None:
    machine.ended(2)
    machine.age(1000 * DAY_S)
    before = machine.store.dump()

    await machine.sweep().sweep()

    assert (machine.store.dump(), len(machine.folders)) == (before, 2)


async def test_parts_are_removed_and_their_runs_stay(machine: Machine) -> None:
    (run,) = machine.ended()
    machine.age(DAY_S)

    await machine.sweep(outputs=DAY_S / 2).sweep()
    attempt = machine.runs / str(run.key) / "1"
    assert [path.name for path in attempt.iterdir()] == ["workspace"]
    await machine.sweep(workspaces=DAY_S / 2, events=DAY_S / 2).sweep()

    assert (machine.folders, machine.rows) == ([], [str(run.key)])
    assert machine.store.rows("SELECT * FROM run_event WHERE run = ?", run.key) == []


async def test_a_batch_is_followed_by_a_pause_that_grows_with_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "BATCH", 2)
    monkeypatch.setattr(sweep_module, "PAUSE_MOST_S", 1000.0)
    machine.ended(6)
    machine.age(DAY_S)
    seconds = iter(range(1000))
    monkeypatch.setattr(sweep_module, "monotonic", lambda: float(next(seconds)))

    await machine.sweep(ended_runs=60.0).sweep()

    assert machine.rows == []
    assert len(machine.pauses) >= 3
    assert min(machine.pauses) >= 4.0
    assert {pause % 4.0 for pause in machine.pauses} == {0.0}


class Killed(BaseException):
    """The service is killed here."""


class KilledFiles(RunFiles):
    """Files whose service is killed before, or in the middle of, step number `at`."""

    def __init__(self, runs: Path, at: int) -> None:
        super().__init__(runs)
        self.left = at

    def _step(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Killed

    def remove(self, kind: RetentionKind, key: int) -> None:
        self._step()
        super().remove(kind, key)

    def _move(self, name: str, folder: int, key: int) -> None:
        super()._move(name, folder, key)
        self._step()

    def _delete(self, name: str, removed: int, emptied: Any) -> None:
        self._step()
        super()._delete(name, removed, emptied)


POLICY: dict[str, Any] = {"ended_runs": 3 * DAY_S, "outputs": DAY_S / 2, "workspaces": DAY_S / 2}


async def test_a_kill_at_any_step_leaves_no_file_without_a_row_after_the_next_sweep(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_module, "BATCH", 1)
    kills = 0
    for at in range(1000):
        machine.ended(2)
        machine.age(2 * DAY_S)
        kept = machine.ended(2)
        machine.age(1.5 * DAY_S)
        try:
            await machine.sweep(KilledFiles(machine.runs, at), **POLICY).sweep()
        except Killed:
            kills += 1
        assert set(machine.folders) <= set(machine.rows)  # never files without rows

        machine.store.restart()
        await machine.sweep(**POLICY).sweep()

        assert machine.rows == sorted(str(run.key) for run in kept)
        assert [path for path in machine.runs.rglob("*") if path.name != ".removed"] == []
        if kills == at:
            break
    assert kills > 20


async def test_a_failed_commit_keeps_the_rows_and_the_next_sweep_removes_them(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.ended(3)
    machine.age(DAY_S)
    sweep = machine.sweep(ended_runs=60.0)
    with monkeypatch.context() as broken:

        def fail(*_: object, **__: object) -> int:
            raise OSError("no disk")

        broken.setattr(retention, "remove_runs", fail)
        with pytest.raises(OSError, match="no disk"):
            await sweep.sweep()
    assert (len(machine.rows), machine.folders) == (3, [])

    await sweep.sweep()

    assert machine.rows == []


async def test_a_folder_that_stays_keeps_its_row_and_stops_no_other(machine: Machine) -> None:
    made = machine.ended(3)
    machine.age(DAY_S)

    class Refusing(RunFiles):
        def remove(self, kind: RetentionKind, key: int) -> None:
            if key == made[0].key:
                raise PermissionError(1, os.strerror(1))
            super().remove(kind, key)

    sweep = machine.sweep(Refusing(machine.runs), ended_runs=60.0)

    with structlog.testing.capture_logs() as logged:
        for _ in range(3):
            await sweep.sweep()

    assert machine.rows == machine.folders == [str(made[0].key)]
    assert [line for line in logged if line["event"] == "retention.not_removed"] == [
        {
            "event": "retention.not_removed", "log_level": "warning",
            "place": f"runs/{made[0].key}", "reason": "Operation not permitted",
        }
    ]  # fmt: skip
    assert sweep.totals.not_removed == 1


async def test_folders_of_unknown_runs_stay_at_any_age_and_are_reported_once(
    machine: Machine,
) -> None:
    """They may be of a newer state of the store, or of another store, and their runs alive."""
    machine.ended()
    for key in (1001, 1002):
        (machine.runs / str(key) / "1").mkdir(parents=True)
        os.utime(machine.runs / str(key), (1000, 1000))
    machine.age(1000 * DAY_S)
    sweep = machine.sweep(ended_runs=DAY_S)

    with structlog.testing.capture_logs() as logged:
        for _ in range(2):
            await sweep.sweep()

    assert machine.folders == ["1001", "1002"]
    assert [line for line in logged if line["event"] == "retention.unknown_folders"] == [
        {
            "event": "retention.unknown_folders", "log_level": "warning",
            "folders": 2, "examples": ["runs/1001", "runs/1002"],
        }
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name", ["0", "007", "\u0663", "9" * 20, str(2**63), "-1", "+1", "1_0", "x"]
)
async def test_a_folder_whose_name_is_no_key_is_not_of_a_run(machine: Machine, name: str) -> None:
    for _ in range(3):
        machine.ended()
    machine.age(2 * DAY_S)
    (machine.runs / name).mkdir()

    with structlog.testing.capture_logs() as logged:
        await machine.sweep(ended_runs=DAY_S).sweep()

    assert (machine.rows, machine.folders) == ([], [name])
    assert [line["event"] for line in logged] == ["retention.swept"]


async def test_readers_of_output_get_the_right_answer_before_the_files_of_a_run_go(
    machine: Machine,
) -> None:
    """Otherwise a kill between files and rows would leave runs with an empty output."""
    (run,) = machine.ended()
    machine.age(DAY_S)
    gone: list[bool] = []

    class Watched(RunFiles):
        def remove(self, kind: RetentionKind, key: int) -> None:
            gone.append(retention.is_output_removed(machine.store.db, run))
            machine.store.db.close()  # that of this thread
            raise Killed

    with pytest.raises(Killed):
        await machine.sweep(Watched(machine.runs), ended_runs=60.0).sweep()

    assert gone == [True]


async def test_files_whose_move_failed_are_moved_by_the_next_sweep(machine: Machine) -> None:
    """Meanwhile callers already get the answer that the files are removed."""
    (run,) = machine.ended()
    machine.age(DAY_S)
    failures = iter([True])

    class Failing(RunFiles):
        def remove(self, kind: RetentionKind, key: int) -> None:
            if next(failures, False):
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            super().remove(kind, key)

    sweep = machine.sweep(Failing(machine.runs), outputs=60.0)
    log_of_run = machine.runs / str(run.key) / "1" / "stdout.log"

    await sweep.sweep()
    assert log_of_run.exists()
    await sweep.sweep()

    assert not log_of_run.exists()


async def test_runs_that_a_sweep_found_and_had_no_time_for_lose_their_output_in_the_next(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = machine.ended(2)
    machine.age(DAY_S)
    sweep = machine.sweep(outputs=60.0)
    removable = retention.removable_parts

    def find_slowly(*args: Any, **named: Any) -> Any:
        monkeypatch.setattr(sweep, "_ends_s", -math.inf)
        return removable(*args, **named)

    monkeypatch.setattr(retention, "removable_parts", find_slowly)
    assert not await sweep.sweep(within_s=60.0)
    assert not retention.is_output_removed(machine.store.db, run)
    monkeypatch.setattr(retention, "removable_parts", removable)

    await sweep.sweep()

    assert retention.is_output_removed(machine.store.db, run)


async def test_a_run_that_was_kept_loses_its_output_once_nothing_needs_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most sweeps continue after the last run of the sweep before them."""
    monkeypatch.setattr(sweep_module, "WHOLE_EVERY", 3)
    kept, _ = machine.ended(2)
    machine.store.set(kept, recovery_state="QUARANTINED")
    machine.age(DAY_S)
    sweep = machine.sweep(outputs=60.0)
    await sweep.sweep()
    machine.store.set(kept, recovery_state="NONE")

    found = []
    for _ in range(3):
        await sweep.sweep()
        found.append(retention.is_output_removed(machine.store.db, kept))

    assert found == [False, False, True]


async def test_over_many_rounds_rows_stay_flat_and_no_living_run_is_removed(
    machine: Machine,
) -> None:
    waiting = machine.store.waiting()
    sizes: list[int] = []
    sweep = machine.sweep(ended_runs=DAY_S)
    for _ in range(4):
        machine.ended(20)
        machine.store.advance(2 * DAY_S)
        sweep.clock = FakeClock(wall=machine.store.now)
        await sweep.sweep()
        sizes.append(sum(len(rows) for rows in machine.store.dump().values()))

    assert machine.store.get(waiting).status is RunStatus.WAITING_USER
    assert sizes == [sizes[0]] * 4


async def test_a_new_sqlite_file_returns_its_free_pages(machine: Machine) -> None:
    for run in machine.ended(50):
        machine.store.set(run, output="x" * 40_000)
    machine.age(DAY_S)
    before = pages(machine.store.db)

    sweep = machine.sweep(ended_runs=60.0)
    await sweep.sweep()

    assert sweep.totals.pages_freed == before - pages(machine.store.db)
    assert retention.free_pages(machine.store.db) <= sweep_module.PAGES
    assert pages(machine.store.db) < before - 200


async def test_a_transaction_returns_all_the_pages_that_it_may(machine: Machine) -> None:
    db = machine.store.db
    made = machine.ended(50)
    for size in (40_000, 1):
        for run in made:
            machine.store.set(run, output="x" * size)
    before = pages(db)

    def give_back(number: int, within_s: float) -> int:
        retention.give_back_pages(db, owner=machine.store.owner, pages=number, within_s=within_s)
        return before - pages(db)

    assert [give_back(256, 600), give_back(100, 600), give_back(100, 0)] == [256, 356, 357]


async def test_pages_are_returned_for_a_part_of_each_sweep(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a sweep of a store with millions of free pages would take hours."""
    monkeypatch.setattr(sweep_module, "GIVE_BACK_S", 5.5)
    monkeypatch.setattr(sweep_module, "PAGES", 1)
    (run,) = machine.ended()
    for size in (400_000, 1):
        machine.store.set(run, output="x" * size)
    seconds = iter(range(1000))
    monkeypatch.setattr(sweep_module, "monotonic", lambda: float(next(seconds)))
    sweep = machine.sweep(outputs=DAY_S)

    await sweep.sweep()

    assert 0 < sweep.totals.pages_freed < 6


async def test_an_older_file_keeps_its_pages_until_it_is_vacuumed(machine: Machine) -> None:
    db = machine.store.db
    db.execute("PRAGMA auto_vacuum = NONE")
    db.execute("VACUUM")
    for run in machine.ended(50):
        machine.store.set(run, output="x" * 40_000)
    machine.age(DAY_S)
    await machine.sweep(ended_runs=60.0).sweep()
    assert retention.free_pages(db) == 0

    # The commands of docs/operations.md, while the service is stopped.
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    db.execute("VACUUM")

    (mode,) = db.fetch_all("PRAGMA auto_vacuum")
    assert mode == (retention.AUTO_VACUUM_INCREMENTAL,)


def pages(db: Database) -> int:
    ((count,),) = db.fetch_all("PRAGMA page_count")
    return int(count)
