"""The folders of runs are copied as they are, whatever their agents do meanwhile."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest
from runrecovery_service import runs_backup
from runrecovery_service.domain.start_errors import BackupRefused, DataDirRefused
from runrecovery_service.runs_backup import RunsCopy, runs_copy_of


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """The folders of two runs, and what is beside them."""
    runs = tmp_path / "runs"
    for key in (1, 2):
        workspace = runs / str(key) / "1" / "workspace"
        workspace.mkdir(parents=True)
        (workspace / "session").write_text(f"session of {key}")
    (runs / ".removed" / "3-x").mkdir(parents=True)
    (runs / ".store").write_text("abc\n")
    return runs


def copied(runs: Path, *keys: int) -> RunsCopy:
    copy = RunsCopy(runs, runs.with_name("copy"))
    copy.begin()
    copy.copy(keys)
    return copy


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_the_copy_lies_beside_that_of_the_database() -> None:
    assert runs_copy_of(Path("/b/one.db")) == Path("/b/one.db.runs")


def test_runs_that_the_copied_database_does_not_know_are_left_out(runs: Path) -> None:
    copy = copied(runs, 1, 7)

    assert names(copy.destination) == [
        ".store", "1", "1/1", "1/1/workspace", "1/1/workspace/session"
    ]  # fmt: skip
    assert (copy.folders, copy.size, copy.changed) == (1, 16, set())


def test_links_modes_and_times_are_kept_and_pipes_and_sockets_left_out(
    runs: Path, tmp_path: Path
) -> None:
    workspace = runs / "1" / "1" / "workspace"
    secret = tmp_path / "secret"
    secret.mkdir()
    (workspace / "link").symlink_to(secret)
    (workspace / "to-nothing").symlink_to("nothing")
    os.mkfifo(workspace / "pipe")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(workspace / "socket"))
    closed = workspace / "closed"
    closed.mkdir()
    (closed / "script").write_text("#!/bin/sh\n")
    (closed / "script").chmod(0o750)
    os.utime(workspace / "session", ns=(1, 1_700_000_000_123_456_789))
    os.utime(closed, ns=(1, 1_600_000_000_000_000_001))
    closed.chmod(0o500)

    made = copied(runs, 1).destination / "1" / "1" / "workspace"

    assert names(made) == ["closed", "closed/script", "link", "session", "to-nothing"]
    assert ((made / "link").readlink(), (made / "to-nothing").readlink()) == (
        secret, Path("nothing")
    )  # fmt: skip
    assert (made / "session").stat().st_mtime_ns == 1_700_000_000_123_456_789
    facts = (made / "closed").stat()
    assert (stat.S_IMODE(facts.st_mode), facts.st_mtime_ns) == (0o500, 1_600_000_000_000_000_001)
    assert stat.S_IMODE((made / "closed" / "script").stat().st_mode) == 0o750
    for folder in (closed, made / "closed"):
        folder.chmod(0o700)  # so that the test's folder can be removed


@pytest.mark.parametrize("what", ["file", "folder", "folder-for-a-file"])
def test_what_an_agent_removes_meanwhile_marks_its_run_and_stops_nothing(
    runs: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = runs / "1" / "1" / "workspace"
    (workspace / "build").mkdir()
    real = os.scandir

    def scandir(path: Path) -> list[os.DirEntry[str]]:
        found = list(real(path))
        if path == workspace and what == "file":
            (workspace / "session").unlink()
        elif path == workspace:
            (workspace / "build").rmdir()
            if what == "folder-for-a-file":
                (workspace / "build").write_text("now a file")
        return found

    monkeypatch.setattr(os, "scandir", scandir)
    copy = copied(runs, 1, 2)

    assert copy.changed == {1}
    assert (copy.destination / "2" / "1" / "workspace" / "session").read_text() == "session of 2"


def test_a_file_that_cannot_be_read_is_named(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, _: int) -> int:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(runs_backup, "open_regular", refuse)

    with pytest.raises(DataDirRefused, match=r"/runs/\.store: could not be copied: Permission"):
        copied(runs, 1)


@pytest.mark.parametrize(
    ("place", "why"), [("copy", "overwrites nothing"), ("runs/1/copy", "is in the folder of")]
)
def test_a_place_that_cannot_take_the_copy_is_refused(
    runs: Path, tmp_path: Path, place: str, why: str
) -> None:
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine").touch()
    before = names(tmp_path)

    with pytest.raises(BackupRefused, match=why):
        RunsCopy(runs, tmp_path / place).begin()

    assert names(tmp_path) == before
