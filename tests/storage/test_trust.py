"""Trust entries and their rows, over cuts at every step and over what others do meanwhile."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from runrecovery_service.agents import trust_keeper, trust_removal
from runrecovery_service.agents.blocking_store import ConnectionStore
from runrecovery_service.agents.trust_keeper import TrustKeeper, TrustRefused
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.reconciliation import TrustClearing
from runrecovery_service.domain.run import Run, RunStatus
from runrecovery_service.domain.turn import Succeeded
from runrecovery_service.storage import instances, trust
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.sql_dialects import DatabaseKind
from runrecovery_service.storage.trust import TrustEntry
from runrecovery_service.trust import codex, files, toml_text
from runrecovery_service.trust.entry import Added, Made, Outcome, Removal, Removals

from .conftest import CutDatabase, PowerCut, World, boot

BEFORE = b'# mine\nmodel = "m"\r\n\n[projects."/mine"]\ntrust_level = "untrusted"'


@dataclass
class Place:
    """A host with a CLI's file, and the workspaces of a service."""

    path: Path
    world: World
    host_id: str = "host"

    @property
    def file(self) -> Path:
        """The CLI's file."""
        return self.path / "config.toml"

    @property
    def env(self) -> Mapping[str, str]:
        """What the CLI gets."""
        return {"CODEX_HOME": str(self.path)}

    def keeper(self, db: Database | None = None) -> TrustKeeper:
        """A keeper of the epoch that writes."""
        world = self.world
        return TrustKeeper(
            host_id=self.host_id,
            owner=world.owner,
            store=ConnectionStore(db or world.db),
            clock=world.ticking_clock,
        )

    def workspace(self, run: Run) -> Path:
        """The workspace of a run's attempt; it need not be there."""
        return self.path / "runs" / str(run.key) / f"workspace-{run.attempt}"

    def add(self, run: Run, db: Database | None = None) -> None:
        """Let the CLI trust the workspace of a run."""
        self.keeper(db).add(self.world.get(run), "codex", self.workspace(run), self.env)

    def running(self) -> Run:
        """A run at work, with its entry."""
        run = self.world.running().run
        self.add(run)
        return run

    def waiting(self) -> Run:
        """A run that waits, with its entry."""
        run = self.world.waiting()
        self.add(run)
        return run

    def trusts(self, run: Run) -> bool:
        """Whether the file has the entry."""
        entry = f'"{self.workspace(run)}"'.encode()
        return self.file.exists() and entry in self.file.read_bytes()

    def rows(self) -> list[tuple[int, str]]:
        """Run and folder of each row of what is not known to be out."""
        sql = "SELECT run, folder FROM trust_entry WHERE removed_at IS NULL"
        return [(key, folder) for key, folder in self.world.rows(sql)]


@pytest.fixture
def place(world: World, tmp_path: Path) -> Place:
    made = Place(path=tmp_path / "codex", world=world)
    made.path.mkdir()
    made.file.write_bytes(BEFORE)
    return made


def outcomes(done: TrustClearing) -> list[tuple[str, str]]:
    return [(one.run_id, one.outcome) for one in done.removals]


def token_of(place: Place) -> str:
    """The token of the place, which is made if there is none."""
    found: list[str | None] = []
    files.edit(
        place.file, lambda text: Removal(text=text, outcome=Outcome.GONE), begin=found.append
    )
    assert found[0] is not None
    return found[0]


def move_away(place: Place, name: str = "away") -> Path:
    """Unmount the file system of the file, as it were."""
    return place.path.rename(place.path.with_name(name))


def move_back(place: Place, name: str = "away") -> None:
    """Mount it again."""
    if place.path.exists():
        shutil.rmtree(place.path)
    place.path.with_name(name).rename(place.path)


def put_other(place: Place) -> None:
    """Put another file system into its place, on which we have been at work too."""
    place.file.write_bytes(b'model = "other"\n')
    token_of(place)


def kill(place: Place, run: Run) -> None:
    place.world.set(run, status="FAILED")


# -- whose entries go -----------------------------------------------------------------------------


def test_the_entry_of_a_living_run_stays_and_that_of_a_dead_one_goes(place: Place) -> None:
    before = place.running()
    text = place.file.read_bytes()
    dead = place.running()
    kill(place, dead)

    done = place.keeper().remove_stale()

    assert outcomes(done) == [(dead.run_id, "removed")]
    assert (done.removals[0].file, done.removals[0].folder) == (
        str(place.file), str(place.workspace(dead))
    )  # fmt: skip
    assert place.file.read_bytes() == text
    assert place.rows() == [(before.key, str(place.workspace(before)))]
    assert place.keeper().remove_stale() == TrustClearing()


@pytest.mark.parametrize(
    "gone",
    [
        {"status": "SUCCEEDED"},
        {"status": "CANCELED"},
        {"recovery_state": "QUARANTINED"},
        {"attempt": 2},
        {"id": 999_999},
    ],
    ids=["succeeded", "canceled", "quarantined", "superseded", "no such run"],
)
def test_who_needs_no_entry_loses_it(place: Place, gone: dict[str, Any]) -> None:
    place.world.set(place.running(), **gone)

    done = place.keeper().remove_stale()

    assert [one.outcome for one in done.removals] == ["removed"]
    assert place.file.read_bytes() == BEFORE
    assert place.rows() == []


@pytest.mark.parametrize("status", ["QUEUED", "RUNNING", "WAITING_USER"])
def test_who_is_alive_keeps_it(place: Place, status: str) -> None:
    run = place.running()
    place.world.set(run, status=status)

    assert place.keeper().remove_stale() == TrustClearing()
    assert place.trusts(run)


def test_entries_of_another_instance_go_too(place: Place) -> None:
    dead = place.running()
    kill(place, dead)
    place.world.owner = instances.claim(place.world.db, boot("other"), now=place.world.now)

    place.keeper().remove_stale()

    assert place.file.read_bytes() == BEFORE


def test_who_has_the_file_takes_it_out_whatever_his_host_is_called(place: Place) -> None:
    kill(place, place.running())
    place.host_id = "another host"

    done = place.keeper().remove_stale()

    assert (place.file.read_bytes(), place.rows(), len(done.removals)) == (BEFORE, [], 1)


def test_a_shared_store_has_entries_of_other_hosts_which_stay(place: Place) -> None:
    kill(place, place.running())
    place.host_id = "another host"
    move_away(place)
    place.path.mkdir()
    put_other(place)
    text = place.file.read_bytes()
    kill(place, place.running())

    done = place.keeper().remove_stale()

    assert (place.file.read_bytes(), len(place.rows()), len(done.removals)) == (text, 1, 1)
    # A SQLite store is one service's, whatever its host was called before.
    alone = place.world.db.dialect.kind is DatabaseKind.SQLITE
    assert len(done.warnings) == alone
    ((away,),) = place.world.rows("SELECT away FROM trust_entry WHERE removed_at IS NULL")
    assert (away is not None) == alone
    assert place.keeper().remove_stale().warnings == ()


def test_a_wait_in_a_shared_store_keeps_its_entry_while_another_service_starts(
    place: Place,
) -> None:
    run = place.waiting()
    text = place.file.read_bytes()
    place.world.owner = instances.claim(place.world.db, boot("other"), now=place.world.now)

    assert place.keeper().remove_stale() == TrustClearing()
    assert (place.file.read_bytes(), [key for key, _ in place.rows()]) == (text, [run.key])


def test_an_earlier_attempt_puts_nothing_on_record(place: Place) -> None:
    run = place.world.running().run
    late = place.world.get(run)
    place.world.set(run, attempt=2)

    with pytest.raises(Fenced):
        place.keeper().add(late, "codex", place.workspace(late), place.env)

    assert (place.file.read_bytes(), place.rows()) == (BEFORE, [])


def test_an_end_takes_out_what_is_of_that_run_alone(place: Place) -> None:
    other = place.running()
    text = place.file.read_bytes()
    turn = place.world.running()
    place.add(turn.run)

    done = place.keeper().remove_run(turn.run)

    assert outcomes(done) == [(turn.run.run_id, "removed")]
    assert place.file.read_bytes() == text
    assert [key for key, _ in place.rows()] == [other.key]
    assert place.world.end(turn, Succeeded({})).status is RunStatus.SUCCEEDED


def test_a_service_that_was_taken_over_takes_nothing_out_and_puts_nothing_in(place: Place) -> None:
    run = place.running()
    late, text = place.keeper(), place.file.read_bytes()
    place.world.set(run, owner_epoch=place.world.restart().epoch)

    assert late.remove_run(run) == TrustClearing()
    with pytest.raises(Fenced):
        late.add(run, "codex", place.workspace(run).with_name("other"), place.env)

    assert place.file.read_bytes() == text
    assert place.trusts(run)


def test_what_was_there_before_comes_back_or_is_left(place: Place) -> None:
    dead = [place.world.running().run for _ in range(4)]
    untrusted, trusted, changed, gone = dead
    place.file.write_text(
        f'[projects."{place.workspace(untrusted)}"]\ntrust_level = "untrusted" # mine\n'
        f'[projects."{place.workspace(trusted)}"]\ntrust_level = "trusted"\n'
    )
    text = place.file.read_bytes()
    place.add(untrusted)
    place.add(trusted)
    with_both = place.file.read_bytes()
    place.add(changed)
    users = place.file.read_bytes().replace(with_both, b"").replace(b'"trusted"', b'"untrusted"')
    place.file.write_bytes(with_both)
    place.add(gone)
    place.file.write_bytes(with_both + users)
    for run in dead:
        kill(place, run)

    done = place.keeper().remove_stale()

    assert dict(outcomes(done)) == {
        untrusted.run_id: "restored", trusted.run_id: "not_ours", changed.run_id: "changed",
        gone.run_id: "gone",
    }  # fmt: skip
    assert place.file.read_bytes() == text + users
    assert place.rows() == []


def test_a_second_launch_in_a_workspace_changes_nothing(place: Place) -> None:
    run = place.running()
    text, rows = place.file.read_bytes(), place.rows()

    place.add(run)

    assert (place.file.read_bytes(), place.rows()) == (text, rows)
    kill(place, run)
    place.keeper().remove_stale()
    assert place.file.read_bytes() == BEFORE


# -- cuts -----------------------------------------------------------------------------------------


def test_a_cut_between_the_record_and_the_entry_leaves_a_row_that_goes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place.world.running().run
    with monkeypatch.context() as patch:
        patch.setattr(files, "_replace", _die)
        with pytest.raises(PowerCut):
            place.add(run)
    assert (place.file.read_bytes(), len(place.rows())) == (BEFORE, 1)
    kill(place, run)

    assert outcomes(place.keeper().remove_stale()) == [(run.run_id, "gone")]
    assert (place.file.read_bytes(), place.rows()) == (BEFORE, [])


def test_a_cut_between_the_removal_and_its_row_leaves_a_row_that_goes(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place.running()
    kill(place, run)
    with monkeypatch.context() as patch:
        patch.setattr(trust, "record_outcome", _die)
        assert len(place.keeper().remove_stale().failures) == 1
    assert (place.file.read_bytes(), len(place.rows())) == (BEFORE, 1)

    assert outcomes(place.keeper().remove_stale()) == [(run.run_id, "gone")]
    assert (place.file.read_bytes(), place.rows()) == (BEFORE, [])


def _die(*_: object, **__: object) -> None:
    raise PowerCut


def test_a_cut_at_any_statement_of_a_launch_or_a_clearing_is_made_good(place: Place) -> None:
    world = place.world
    for at in range(40):
        run = world.running().run
        try:
            place.add(run, CutDatabase(world.db, at))
            launched = True
        except PowerCut:
            launched = False
        assert launched <= place.trusts(run)
        assert place.trusts(run) <= (run.key in dict(place.rows()))
        kill(place, run)
        with suppress(PowerCut):
            place.keeper(CutDatabase(world.db, at)).remove_stale()
        place.keeper().remove_stale()

        assert (place.file.read_bytes(), place.rows()) == (BEFORE, [])
    assert launched


# -- what others do meanwhile ---------------------------------------------------------------------


def at_the_lock(monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    """Do something once, right after an edit has got the lock of its file."""
    look = files._read
    pending = [do]

    def looked(target: Path) -> Any:
        if pending:
            pending.pop()()
        return look(target)

    monkeypatch.setattr(files, "_read", looked)


def test_a_run_that_is_set_back_before_the_lock_is_had_keeps_its_entry(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place.waiting()
    kill(place, run)
    text = place.file.read_bytes()
    at_the_lock(monkeypatch, lambda: place.world.set(run, status="WAITING_USER"))

    assert place.keeper().remove_stale() == TrustClearing()
    assert place.file.read_bytes() == text
    assert len(place.rows()) == 1


def test_a_run_that_is_set_back_during_the_edit_keeps_its_row_and_gets_its_entry_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place.waiting()
    kill(place, run)
    text, put = place.file.read_bytes(), files._replace

    def put_late(*given: Any) -> bool:
        place.world.set(run, status="QUEUED")
        return put(*given)

    with monkeypatch.context() as patch:
        patch.setattr(files, "_replace", put_late)
        place.keeper().remove_stale()
    assert len(place.rows()) == 1  # its launch may be about to count on it

    place.add(run)
    assert place.file.read_bytes() == text
    kill(place, run)
    place.keeper().remove_stale()
    assert (place.file.read_bytes(), place.rows()) == (BEFORE, [])


def test_a_file_that_another_program_writes_meanwhile_loses_nothing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, text = place.running(), place.file.read_bytes()
    kill(place, run)
    theirs = b"# theirs\n"
    at_the_lock(monkeypatch, lambda: place.file.write_bytes(theirs + text))

    place.keeper().remove_stale()

    assert place.file.read_bytes() == theirs + BEFORE


# -- what cannot be done ---------------------------------------------------------------------------


def test_a_file_that_cannot_be_read_keeps_no_other_from_being_cleared(place: Place) -> None:
    bad = replace(place, path=place.path / "bad")
    bad.path.mkdir()
    for one in (bad, place):
        kill(place, one.running())
    broken = bad.file.read_bytes() + b'[projects\n"secret" ='
    bad.file.write_bytes(broken)

    done = place.keeper().remove_stale()

    assert [one.file for one in done.removals] == [str(place.file)]
    assert len(done.failures) == 1
    assert done.failures[0].startswith(f"{bad.file}: not_parsable")
    assert "secret" not in done.failures[0]
    assert (place.file.read_bytes(), bad.file.read_bytes()) == (BEFORE, broken)
    assert [folder for _, folder in place.rows()] == [str(bad.path / "runs/1/workspace-1")]


def test_a_damaged_row_keeps_no_other_from_going(place: Place) -> None:
    runs = [place.running() for _ in range(3)]
    for run in runs:
        kill(place, run)
    with place.world.db.transaction():
        sql = "UPDATE trust_entry SET added = '{' WHERE run = ?"
        place.world.db.execute(sql, (runs[0].key,))
        place.world.db.execute("UPDATE trust_entry SET cli = 'x' WHERE run = ?", (runs[1].key,))

    done = place.keeper().remove_stale()

    assert outcomes(done) == [(runs[2].run_id, "removed")]
    assert sorted(done.kept) == sorted(
        f"{place.file}: the record of {place.workspace(run)} is damaged" for run in runs[:2]
    )
    assert [place.trusts(run) for run in runs] == [True, True, False]
    assert place.keeper().remove_stale() == TrustClearing()  # said once


@pytest.mark.parametrize(
    "added",
    [
        '[true, "{", [], "", ""]', '[true, 1, [], "", ""]', '[1, null, [], "", ""]',
        '[true, null, "file", "", ""]', '[true, null, [], "x", ""]', '[true, null, []]',
        "[" * 100_000,
    ],
    ids=["previous", "no text", "no flag", "no list", "no blank", "short", "deep"],
)  # fmt: skip
def test_no_damage_to_a_row_keeps_others_from_going(place: Place, added: str) -> None:
    runs = [place.running() for _ in range(3)]
    for run in runs:
        kill(place, run)
    with place.world.db.transaction():
        sql = "UPDATE trust_entry SET added = ? WHERE run = ?"
        place.world.db.execute(sql, (added, runs[1].key))

    done = place.keeper().remove_stale()

    assert [place.trusts(run) for run in runs] == [False, True, False]
    assert len(done.kept) == 1
    assert [key for key, _ in place.rows()] == [runs[1].key]


def test_an_entry_that_leads_to_a_defect_keeps_no_other_from_going(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [place.running() for _ in range(5)]
    for run in runs:
        kill(place, run)
    spoilt = str(place.workspace(runs[2]))
    remove_all = codex.CodexEditor.remove_all

    def fail(self: Any, text: bytes | None, entries: Mapping[str, Added]) -> Removals:
        if spoilt in entries:
            raise LookupError
        return remove_all(self, text, entries)

    monkeypatch.setattr(codex.CodexEditor, "remove_all", fail)

    done = place.keeper().remove_stale()

    assert [place.trusts(run) for run in runs] == [False, False, True, False, False]
    assert len(done.removals) == 4
    assert done.kept == (f"{place.file}: {spoilt}: LookupError",)


@pytest.mark.parametrize(
    ("env", "name", "says"),
    [
        ({}, "w", "HOME is not an absolute path"),
        ({"CODEX_HOME": "here"}, "w", "CODEX_HOME is not an absolute path"),
        ({"CODEX_HOME": "/nowhere/\udcff"}, "w", "is not UTF-8 text"),
        (None, "\udcff", "is not UTF-8 text"),
        (None, "/".join(["w" * 200] * 10), "is too long"),
    ],
    ids=["no home", "relative home", "odd home", "odd workspace", "long workspace"],
)
def test_what_cannot_be_on_record_is_refused_before_anything_is_done(
    place: Place, env: dict[str, str] | None, name: str, says: str
) -> None:
    run = place.world.running().run

    with pytest.raises(TrustRefused, match=says):
        place.keeper().add(run, "codex", place.path / name, place.env if env is None else env)

    assert (place.file.read_bytes(), place.rows()) == (BEFORE, [])


def test_a_file_behind_a_link_is_on_record_by_its_own_name(place: Place) -> None:
    link = replace(place, path=place.path.with_name("link"))
    link.path.mkdir()
    link.file.symlink_to(place.file)
    run = place.world.running().run
    place.keeper().add(run, "codex", place.workspace(run), link.env)

    assert place.world.rows("SELECT file FROM trust_entry") == [(str(place.file),)]
    kill(place, run)
    place.keeper().remove_stale()
    assert link.file.is_symlink()
    assert place.file.read_bytes() == BEFORE


# -- what is not there -----------------------------------------------------------------------------


def vanish(place: Place, how: str) -> None:
    """Have the file of a dead run's entry not be there."""
    kill(place, place.running())
    if how == "lock":
        files.lock_file(place.file).unlink()
        return
    move_away(place)
    if how != "folder":
        place.path.mkdir()
    if how == "other":
        put_other(place)


def come_back(place: Place, how: str) -> None:
    """Have it be there again."""
    if how != "lock":
        move_back(place)


PLACES = ["folder", "empty folder", "other"]
GONE_FOR_GOOD = trust_removal.PLACE_GONE.total_seconds()


@pytest.mark.parametrize("how", PLACES)
def test_what_is_not_mounted_stays_on_record_until_it_is_back(place: Place, how: str) -> None:
    vanish(place, how)
    left = sorted(place.path.iterdir()) if place.path.exists() else None

    first, *more = [place.keeper().remove_stale() for _ in range(3)]

    assert (first.removals, first.failures, len(first.kept)) == ((), (), 1)
    assert first.kept[0].startswith(f"{place.file}: entries stay on record: its folder, or")
    assert more == [TrustClearing()] * 2  # said once
    assert len(place.rows()) == 1
    assert (sorted(place.path.iterdir()) if place.path.exists() else None) == left
    come_back(place, how)
    assert [one.outcome for one in place.keeper().remove_stale().removals] == ["removed"]
    assert (place.file.read_bytes(), place.rows()) == (BEFORE, [])


@pytest.mark.parametrize("how", [*PLACES, "lock"])
def test_what_is_not_mounted_for_a_week_is_forgotten(place: Place, how: str) -> None:
    vanish(place, how)
    place.keeper().remove_stale()

    place.world.wait(GONE_FOR_GOOD - 60)
    assert place.keeper().remove_stale() == TrustClearing()
    place.world.wait(61)

    assert [one.outcome for one in place.keeper().remove_stale().removals] == ["gone"]
    assert place.world.rows("SELECT * FROM trust_entry") == []


def test_a_run_whose_lock_was_removed_leaves_no_entry(place: Place) -> None:
    run = place.waiting()
    files.lock_file(place.file).unlink()
    place.add(run)  # its next turn
    kill(place, run)

    place.keeper().remove_stale()

    assert place.file.read_bytes() == BEFORE


@pytest.mark.parametrize("text", [None, b"", b" \n\n"], ids=["absent", "empty", "blank"])
def test_a_file_that_an_editor_is_writing_anew_is_waited_for(
    place: Place, text: bytes | None
) -> None:
    kill(place, place.running())
    written = b"# edited\n" + place.file.read_bytes()
    place.file.unlink() if text is None else place.file.write_bytes(text)

    done = place.keeper().remove_stale()

    assert (done.removals, done.kept) == (
        (), (f"{place.file}: entries stay on record: it is not there, or empty",)
    )  # fmt: skip
    assert place.keeper().remove_stale() == TrustClearing()
    place.file.write_bytes(written)
    place.keeper().remove_stale()
    assert (place.file.read_bytes(), place.rows()) == (b"# edited\n" + BEFORE, [])


def test_a_file_that_stays_away_for_a_minute_is_gone(place: Place) -> None:
    kill(place, place.running())
    place.file.unlink()

    outs = []
    for _ in range(4):
        outs += [one.outcome for one in place.keeper().remove_stale().removals]
        place.world.wait(15)
    assert outs == []
    place.world.wait(15)

    assert [one.outcome for one in place.keeper().remove_stale().removals] == ["gone"]
    assert place.world.rows("SELECT * FROM trust_entry") == []


def test_a_week_without_the_folder_is_no_minute_without_the_file(place: Place) -> None:
    kill(place, place.running())
    text = place.file.read_bytes()
    move_away(place)
    place.keeper().remove_stale()
    place.world.wait(3600)
    move_back(place)
    place.file.unlink()

    assert place.keeper().remove_stale().removals == ()

    place.file.write_bytes(text)
    place.keeper().remove_stale()
    assert place.file.read_bytes() == BEFORE


def test_a_file_of_our_making_that_somebody_has_deleted_is_gone(place: Place) -> None:
    place.file.unlink()
    kill(place, place.running())
    place.file.unlink()

    assert [one.outcome for one in place.keeper().remove_stale().removals] == ["gone"]
    assert not place.file.exists()


def test_what_is_away_is_not_looked_for_all_the_time(place: Place) -> None:
    vanish(place, "folder")
    assert place.keeper().stale_files() == [str(place.file)]
    place.keeper().remove_stale()

    assert place.keeper().stale_files() == []
    place.world.wait(trust_removal.AWAY_CHECK.total_seconds())
    assert place.keeper().stale_files() == [str(place.file)]


def test_a_host_that_is_called_otherwise_twice_gives_back_what_was_there_first(
    place: Place,
) -> None:
    run = place.running()
    users = place.file.read_bytes().replace(b'level = "trusted"', b'level = "untrusted"')
    place.file.write_bytes(users)
    place.host_id = "renamed"
    place.add(run)
    kill(place, run)

    place.keeper().remove_stale()

    assert place.file.read_bytes() == users


# -- what comes back -------------------------------------------------------------------------------


def test_an_entry_that_a_cli_writes_back_goes_again(place: Place) -> None:
    kill(place, place.running())
    read = place.file.read_bytes()
    place.keeper().remove_stale()
    looks = []

    for at in range(100):  # the sweep
        if at in (1, 30):
            place.file.write_bytes(read)  # by whoever had read it before
        if place.keeper().stale_files():
            looks.append(at)
            place.keeper().remove_stale_in(str(place.file), lock_wait_s=1)
        if at == 20:
            assert place.file.read_bytes() == BEFORE

    assert len(looks) == 2
    assert place.file.read_bytes() == BEFORE
    assert place.world.rows("SELECT * FROM trust_entry") == []


def test_a_defect_keeps_no_row_of_what_was_taken_out_for_ever(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill(place, place.running())
    place.keeper().remove_stale()

    def fail(*_: object) -> Removals:
        raise LookupError

    monkeypatch.setattr(codex.CodexEditor, "remove_all", fail)
    for _ in range(2):
        assert place.keeper().remove_stale() == TrustClearing()
        place.world.wait(60)

    assert place.world.rows("SELECT * FROM trust_entry") == []


def test_a_start_takes_out_what_came_back(place: Place) -> None:
    run = place.running()
    kill(place, run)
    read = place.file.read_bytes()
    place.keeper().remove_stale()
    place.file.write_bytes(read)

    assert outcomes(place.keeper().remove_stale()) == [(run.run_id, "removed")]
    assert place.file.read_bytes() == BEFORE


def test_an_end_is_looked_at_again_too(place: Place) -> None:
    turn = place.world.running()
    place.add(turn.run)
    read = place.file.read_bytes()
    place.keeper().remove_run(turn.run)
    place.world.end(turn, Succeeded({}))
    place.file.write_bytes(read)

    assert place.keeper().remove_run(turn.run) == TrustClearing()
    place.world.wait(5)
    assert place.keeper().stale_files() == [str(place.file)]
    place.keeper().remove_stale_in(str(place.file), lock_wait_s=1)
    assert place.file.read_bytes() == BEFORE


def test_what_was_taken_out_is_put_in_anew_for_a_run_that_is_set_back(place: Place) -> None:
    run = place.waiting()
    kill(place, run)
    text = place.file.read_bytes()
    place.keeper().remove_stale()
    place.world.set(run, status="QUEUED")
    place.add(run)
    place.world.wait(100)

    assert place.keeper().remove_stale() == TrustClearing()
    assert place.file.read_bytes() == text
    assert place.rows() == [(run.key, str(place.workspace(run)))]


def test_a_clock_that_is_set_back_keeps_no_row_for_ever(place: Place) -> None:
    kill(place, place.running())
    place.keeper().remove_stale()
    place.world.step(timedelta(days=-30))

    assert place.keeper().stale_files() == [str(place.file)]
    place.keeper().remove_stale_in(str(place.file), lock_wait_s=1)
    assert place.world.rows("SELECT * FROM trust_entry") == []


def test_an_entry_that_a_user_makes_while_ours_is_put_in_is_his(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = place.world.running().run
    users = BEFORE + f'\n[projects."{place.workspace(run)}"]\ntrust_level = "trusted"\n'.encode()
    put, pending = files._replace, [users]

    def put_late(*given: Any) -> bool:
        if pending:
            place.file.write_bytes(pending.pop())
        return put(*given)

    monkeypatch.setattr(files, "_replace", put_late)
    place.add(run)
    kill(place, run)

    assert outcomes(place.keeper().remove_stale()) == [(run.run_id, "not_ours")]
    assert place.file.read_bytes() == users


# -- in parts --------------------------------------------------------------------------------------


def test_what_there_is_no_time_for_is_left_to_the_next_look(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust_keeper, "CHUNK", 2)
    for _ in range(5):
        kill(place, place.running())
    asked = iter([False, False, True])  # before the file, and after each of two edits

    first = place.keeper().remove_stale(lambda: next(asked))

    assert (len(first.removals), first.failures, first.kept) == (4, (), (trust_keeper.LEFT,))
    assert len(place.rows()) == 1
    rest = place.keeper().remove_stale()
    assert (len(rest.removals), rest.warnings) == (1, ())
    assert (place.file.read_bytes(), place.rows()) == (BEFORE, [])


def test_no_file_is_begun_when_there_is_no_time(place: Place) -> None:
    kill(place, place.running())

    assert place.keeper().remove_stale(lambda: True) == TrustClearing(kept=(trust_keeper.LEFT,))
    assert len(place.rows()) == 1


def test_rows_that_stay_do_not_keep_later_ones_from_their_turn(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trust_keeper, "CHUNK", 2)
    runs = [place.running() for _ in range(6)]
    for run in runs:
        kill(place, run)
    with place.world.db.transaction():
        sql = "UPDATE trust_entry SET added = '{' WHERE run IN (?, ?, ?)"
        place.world.db.execute(sql, tuple(run.key for run in runs[3:]))

    assert len(place.keeper().remove_stale().removals) == 3


# -- many ------------------------------------------------------------------------------------------


def test_thousands_of_entries_go_with_a_few_looks_at_the_file(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, many = place.world, 1500
    parses: list[int] = []
    run = world.running().run
    added = Added(owned=True, made=frozenset({Made.FOLDER}), lead="\n", trail="\n")
    here = token_of(place)
    with world.db.transaction():
        for at in range(many):
            entry = TrustEntry(
                file=str(place.file), folder=f"/w/{at}", place=here, cli="codex",
                run_key=run.key, run_id=run.run_id, attempt=1, added=added.to_json(),
            )  # fmt: skip
            trust.record_entry(world.db, entry, host_id="host", owner=world.owner, now=world.now)
    text = "".join(f'\n[projects."/w/{at}"]\ntrust_level = "trusted"\n' for at in range(many))
    place.file.write_bytes(BEFORE + b"\n" + text.encode())
    kill(place, run)
    parse = toml_text.parse

    def counted(body: str) -> toml_text.Document:
        parses.append(len(body))
        return parse(body)

    monkeypatch.setattr(toml_text, "parse", counted)

    done = place.keeper().remove_stale()

    assert (len(done.removals), done.failures) == (many, ())
    assert place.file.read_bytes() == BEFORE + b"\n"
    assert place.rows() == []
    # Two for each edit. On a slow machine an edit takes 100 entries, on a fast one up to 500.
    assert len(parses) <= 32


def test_what_is_kept_of_an_entry_is_opaque_to_the_store(place: Place) -> None:
    run = place.running()

    ((kept,),) = place.world.rows("SELECT added FROM trust_entry")

    standing = trust.recorded_entries(place.world.db, "host", str(place.file), token_of(place))
    assert standing == {str(place.workspace(run)): kept}
    assert json.loads(kept)[0] is True


def test_of_two_words_for_a_folder_that_of_this_place_counts_else_the_newest(place: Place) -> None:
    folder = str(place.workspace(place.running()))
    here, ((kept,),) = token_of(place), place.world.rows("SELECT added FROM trust_entry")
    for token, later in (("0" * 32, 1), ("1" * 32, 2)):
        place.world.db.execute(
            "INSERT INTO trust_entry (file, folder, place, host_id, cli, run, attempt, instance,"
            " added, created_at) SELECT file, folder, ?, host_id, cli, run, attempt, instance,"
            " ?, created_at + ? FROM trust_entry WHERE place = ?",
            (token, f"of {token[0]}", later, here),
        )

    def standing(token: str) -> dict[str, str]:
        return trust.recorded_entries(place.world.db, "host", str(place.file), token)

    assert standing(here) == {folder: kept}
    assert standing("0" * 32) == {folder: "of 0"}
    assert standing("f" * 32) == {folder: "of 1"}


# -- who takes no lock of ours ---------------------------------------------------------------------


@dataclass
class Hasty:
    """A CLI that rewrites its file when it likes to, without any lock: here, at every fifth step of
    our edits, between our look at the file and our replacement of it."""

    file: Path
    steps: int = 0
    writes: int = 0

    def step(self) -> None:
        """Be another process, which is just at it."""
        self.steps += 1
        if self.steps % 5 == 0:
            self.writes += 1
            document = json.loads(self.file.read_bytes())
            document["count"] += 1
            new = self.file.with_name("new")
            new.write_text(json.dumps(document, indent=1))
            new.replace(self.file)

    def before(self, do: Callable[..., Any]) -> Callable[..., Any]:
        """Have it take a step before each call."""

        def stepped(*given: Any, **named: Any) -> Any:
            self.step()
            return do(*given, **named)

        return stepped


def test_two_services_and_a_cli_that_takes_no_lock_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "cli" / ".claude.json"
    file.parent.mkdir()
    mine = {"mine": [1.5, "é"], "projects": {"/mine": {}}}
    file.write_text(json.dumps({"count": 0, **mine}))
    hasty = Hasty(file)
    monkeypatch.setattr(files, "_write", hasty.before(files._write))
    monkeypatch.setattr(files, "_swap", hasty.before(files._swap))

    def serve(name: str) -> int:
        """One service, with a store of its own; returns how many of its runs were trusted."""
        home = tmp_path / name
        home.mkdir()
        db = open_database("", home)
        world = World(db=db, owner=instances.claim(db, boot(), now=World.now))
        place, trusted = Place(path=home, world=world), 0
        for at in range(10):
            turn = world.running()
            folder = place.workspace(turn.run)
            env = {"CLAUDE_CONFIG_DIR": str(file.parent)}
            place.keeper().add(turn.run, "claude", folder, env)
            trusted += str(folder) in json.loads(file.read_bytes())["projects"]
            if at % 2:
                place.keeper().remove_run(turn.run)
            world.end(turn, Succeeded({}))
            place.keeper().remove_stale()
        left = place.rows()
        db.close()
        assert left == []
        return trusted

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(serve, "ab")) == [10, 10]

    assert hasty.writes > 10
    assert json.loads(file.read_bytes()) == {"count": hasty.writes, **mine}
