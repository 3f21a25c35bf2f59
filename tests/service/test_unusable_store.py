"""An unusable store: a start and `check` give the same reason, and leave nothing behind."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from support.service import Home
from support.service_forker import run_command

NewHome = Callable[..., Home]
MENDING: Final = "docs/operations.md, *A damaged database*, says how to repair it"


def run(folder: Path, *words: str) -> tuple[int, str]:
    """Run the command in a folder; return its exit code and its output without log lines."""
    done = run_command(*words, cwd=folder)
    lines = (done.stdout + done.stderr).splitlines()
    return done.returncode, "\n".join(line for line in lines if not line.startswith("{"))


def refusals(folder: Path, *options: str) -> tuple[tuple[int, str], tuple[int, str]]:
    """Return the refusals of a start and of `check`, without the note that there is no engine."""
    code, text = run(folder, "check", *options)
    problems = [line for line in text.splitlines() if not line.startswith("note: no engine")]
    start = run(folder, "serve", "--listen", "127.0.0.1:0", *options)
    return start, (code, "\n".join(problems))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--database", "sqlite:////nonexistent/x.db"],
         "/nonexistent/x.db: its directory /nonexistent does not exist"),
        (["--database", "sqlite:////usr"], "/usr: is a directory, not a database file"),
        (["--data-dir", "/proc/version/x"], "/proc/version/x: Not a directory"),
        (["--data-dir", "/" + "n" * 300], "/" + "n" * 300 + ": File name too long"),
    ],
    ids=["no directory", "a directory", "below a file", "too long"],
)  # fmt: skip
def test_an_impossible_path_is_refused_and_nothing_is_created(
    tmp_path: Path, options: list[str], said: str
) -> None:
    start, check = refusals(tmp_path, *options)

    assert start == (4, f"error: {said}")
    assert check == (1, said)
    assert list(tmp_path.iterdir()) == []
    assert not Path("/usr.lock").exists()


def test_a_database_in_memory_is_a_mistake_of_the_configuration(tmp_path: Path) -> None:
    start, check = refusals(tmp_path, "--database", "sqlite:///:memory:")

    assert (start[0], check[0]) == (2, 2)
    assert "in memory is lost with the process" in start[1]
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"b\xffd")
    folder.mkdir()

    start, check = refusals(folder, "--data-dir", "data")

    said = f"{tmp_path}/b\\xffd/data: the path is not valid UTF-8"
    assert (start, check) == ((4, f"error: {said}"), (1, said))


def test_a_removed_working_directory_is_reported(tmp_path: Path) -> None:
    program = "import os, sys; os.rmdir(os.getcwd()); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-m", "runrecovery_service", "serve", "--data-dir", "data"]
    gone = tmp_path / "gone"
    gone.mkdir()

    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        cwd=gone,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert done.returncode == 4
    assert done.stderr.splitlines()[-1] == (
        "error: data: is relative, and the working directory was removed"
    )
    assert "Traceback" not in done.stderr


def cut(database: Path) -> None:
    os.truncate(database, 20_000)


def overwrite(database: Path) -> None:
    with database.open("r+b") as file:
        file.seek(100)
        file.write(b"x" * 8000)


@pytest.mark.parametrize("damage", [cut, overwrite])
def test_a_damaged_database_is_refused_with_the_way_to_repair_it(
    new_home: NewHome, damage: Callable[[Path], None]
) -> None:
    home = new_home()
    service, _ = home.start()
    service.stop()
    damage(home.database)

    start, check = refusals(home.path, "--data-dir", str(home.data))

    said = f"{home.database}: is damaged (database disk image is malformed); {MENDING}"
    assert (start, check) == ((4, f"error: {said}"), (1, said))


def test_a_shared_directory_is_used_with_a_warning(new_home: NewHome) -> None:
    home = new_home()
    home.data.mkdir()
    home.data.chmod(0o2777)
    group = home.data.stat().st_gid

    service, _ = home.start()
    service.stop()

    (told,) = service.events("service.data_dir_shared")
    assert told["writable_by"] == f"group {group}, every user"
    assert stat.S_IMODE(home.data.stat().st_mode) == 0o2777
    for file in ("lock", "runrecovery.db", "runrecovery.db.installed"):
        assert stat.S_IMODE((home.data / file).stat().st_mode) == 0o600
    code, said = run(home.path, "check", "--data-dir", str(home.data))
    assert code == 0
    assert f"note: {home.data}: may also be changed by group {group}, every user" in said
