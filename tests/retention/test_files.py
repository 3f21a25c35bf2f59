"""All files of ended runs are removed, of whatever kind, and no other files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from runrecovery_service.domain.retention import RetentionKind
from runrecovery_service.retention.files import Emptied, RunFiles

RUNS, OUTPUTS, WORKSPACES = RetentionKind.RUNS, RetentionKind.OUTPUTS, RetentionKind.WORKSPACES


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    folder = tmp_path / "data" / "runs"
    folder.mkdir(parents=True)
    return folder


def make_run(runs: Path, key: int = 7, attempts: int = 1) -> Path:
    for attempt in range(1, attempts + 1):
        folder = runs / str(key) / str(attempt)
        (folder / "workspace" / "deep").mkdir(parents=True)
        (folder / "permissions").mkdir()
        for name, size in (("stdout.log", 10), ("stderr.log", 20), ("shim-1.log", 3)):
            (folder / name).write_bytes(b"x" * size)
        (folder / "stderr.log.truncated").touch()
        (folder / "workspace" / "deep" / "file").write_bytes(b"x" * 100)
    return runs / str(key)


def empty(runs: Path) -> Emptied:
    return RunFiles(runs).empty(should_stop=lambda: False)


def left(runs: Path) -> list[str]:
    return sorted(str(path.relative_to(runs)) for path in runs.rglob("*"))


def test_a_whole_run_is_removed_with_all_its_attempts(runs: Path) -> None:
    make_run(runs, 7, attempts=2)
    kept = make_run(runs, 8)
    before = left(kept)

    RunFiles(runs).remove(RUNS, 7)
    emptied = empty(runs)

    assert (emptied.size, emptied.problems) == (266, {})
    assert [path for path in left(runs) if not path.startswith("8")] == [".removed"]
    assert left(kept) == before


def test_output_is_removed_alone_and_the_rest_of_the_run_stays(runs: Path) -> None:
    run = make_run(runs)

    RunFiles(runs).remove(OUTPUTS, 7)

    assert empty(runs).size == 30
    assert left(run / "1") == [
        "permissions", "shim-1.log", "workspace", "workspace/deep", "workspace/deep/file",
    ]  # fmt: skip


def test_workspaces_are_removed_alone_and_the_output_stays(runs: Path) -> None:
    run = make_run(runs)

    RunFiles(runs).remove(WORKSPACES, 7)

    assert empty(runs).size == 103
    assert left(run / "1") == ["stderr.log", "stderr.log.truncated", "stdout.log"]


def test_the_last_part_takes_the_empty_folders_with_it(runs: Path) -> None:
    make_run(runs, attempts=2)

    RunFiles(runs).remove(OUTPUTS, 7)
    RunFiles(runs).remove(WORKSPACES, 7)
    empty(runs)

    assert left(runs) == [".removed"]


@pytest.mark.parametrize("kind", [RUNS, OUTPUTS, WORKSPACES])
def test_a_run_without_files_needs_nothing(runs: Path, kind: RetentionKind) -> None:
    RunFiles(runs).remove(kind, 7)

    assert left(runs) in ([], [".removed"])


@pytest.mark.parametrize("kind", [RUNS, OUTPUTS, WORKSPACES])
def test_a_removal_leaves_no_folder_open(runs: Path, kind: RetentionKind) -> None:
    make_run(runs, attempts=2)

    RunFiles(runs).remove(kind, 7)
    empty(runs)

    opened = [os.path.realpath(one) for one in Path("/proc/self/fd").iterdir()]
    assert [name for name in opened if name.startswith(str(runs))] == []


def test_links_are_removed_and_never_followed(runs: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (outside / "folder").mkdir(parents=True)
    (outside / "folder" / "file").write_text("precious")
    run = make_run(runs)
    workspace = run / "1" / "workspace"
    (workspace / "to-folder").symlink_to(outside)
    (workspace / "to-file").symlink_to(outside / "folder" / "file")
    (workspace / "second-name").hardlink_to(outside / "folder" / "file")
    (run / "2").symlink_to(outside)  # in the place of an attempt

    RunFiles(runs).remove(OUTPUTS, 7)
    RunFiles(runs).remove(RUNS, 7)

    assert empty(runs).problems == {}
    assert left(runs) == [".removed"]
    assert (outside / "folder" / "file").read_text() == "precious"


@pytest.mark.parametrize("kind", [RUNS, OUTPUTS, WORKSPACES])
def test_a_link_in_the_place_of_a_run_leads_nowhere(
    runs: Path, tmp_path: Path, kind: RetentionKind
) -> None:
    outside = tmp_path / "outside"
    make_run(tmp_path, 1).rename(outside)
    before = left(outside)
    (runs / "7").symlink_to(outside)

    RunFiles(runs).remove(kind, 7)
    empty(runs)

    assert left(outside) == before


def test_folders_without_permissions_are_removed(runs: Path) -> None:
    deep = make_run(runs) / "1" / "workspace" / "deep"
    (deep / "deeper").mkdir()
    (deep / "deeper" / "file").touch()
    for folder in (deep / "deeper", deep, deep.parent, deep.parent.parent):
        folder.chmod(0)

    RunFiles(runs).remove(WORKSPACES, 7)
    RunFiles(runs).remove(RUNS, 7)

    assert (empty(runs).problems, left(runs)) == ({}, [".removed"])


def test_a_tree_deeper_than_the_stack_and_the_longest_path_is_removed(runs: Path) -> None:
    folder = os.open(make_run(runs) / "1" / "workspace", os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("subfolder", dir_fd=folder)
        below = os.open("subfolder", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = below
    os.close(folder)

    RunFiles(runs).remove(RUNS, 7)

    assert (empty(runs).problems, left(runs)) == ({}, [".removed"])


def test_files_that_a_crash_left_are_deleted_later(runs: Path) -> None:
    make_run(runs)
    RunFiles(runs).remove(RUNS, 7)
    stops = iter([False, True])
    RunFiles(runs).empty(should_stop=lambda: next(stops))
    assert left(runs) != [".removed"]

    assert (empty(runs).problems, left(runs)) == ({}, [".removed"])


def test_files_that_the_system_refuses_to_delete_stay_and_all_others_are_deleted(
    runs: Path, mounted: Callable[[Path], Path]
) -> None:
    """A file system that is mounted in a workspace does not belong to the run."""
    foreign = mounted(make_run(runs) / "1" / "workspace" / "mount")
    (foreign / "precious").write_text("x")

    RunFiles(runs).remove(RUNS, 7)
    emptied = empty(runs)

    ((name, reason),) = emptied.problems.items()
    assert reason == "Device or resource busy"
    assert name.startswith("7-")  # the run
    assert [path.name for path in runs.rglob("precious")] == ["precious"]
    assert emptied.size == 133


@pytest.fixture
def mounted() -> object:
    """A function that mounts a small file system, or skips the test where that is not permitted."""
    made: list[Path] = []

    def mount(place: Path) -> Path:
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
        if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("mounting needs root")
        made.append(place)
        return place

    yield mount
    for place in made:
        found = Path("/proc/self/mounts").read_text().split()
        for word in found:
            if word.endswith("/mount") and str(place.parents[4]) in word:
                subprocess.run(["umount", word], check=True)


def test_folders_of_runs_are_listed_by_key(runs: Path, tmp_path: Path) -> None:
    for key in (10, 9):
        make_run(runs, key)
    (runs / "11").symlink_to(tmp_path)
    (runs / "12").touch()
    (runs / "notes").mkdir()

    assert RunFiles(runs).run_keys() == [9, 10]


@pytest.mark.parametrize("foreign", ["link", "file"])
def test_a_foreign_entry_with_the_name_of_the_folder_for_removed_files_is_renamed(
    runs: Path, tmp_path: Path, foreign: str
) -> None:
    make_run(runs)
    (tmp_path / "precious").touch()
    if foreign == "link":
        (runs / ".removed").symlink_to(tmp_path)
    else:
        (runs / ".removed").write_text("precious")

    RunFiles(runs).remove(RUNS, 7)
    emptied = empty(runs)

    assert (emptied.size, emptied.problems) == (133, {})
    (found,) = runs.glob(".removed.found-*")
    assert found.is_symlink() == (foreign == "link")
    assert (tmp_path / "precious").exists()
