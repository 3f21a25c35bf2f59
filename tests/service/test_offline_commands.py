"""The commands that work on a data directory without a service."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.engines import EngineSpec
from support.service import Home
from support.service_forker import run_command

NewHome = Callable[..., Home]


def run(home: Home, *arguments: str | Path) -> tuple[int, str]:
    """Run a subcommand on a home's data directory; return its exit code and its output."""
    options = ("--config", home.config, "--data-dir", home.data)
    done = run_command(arguments[0], *options, *arguments[1:], cwd=home.path)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def stopped(new_home: NewHome) -> Home:
    """A home whose service has run once."""
    home = new_home()
    service, api = home.start()
    api.until_ended(api.create("resumable", {"result": {"x": 1}}, run_id="kept").run_id)
    service.stop()
    return home


def test_a_backup_of_a_running_service_can_be_started_from(
    new_home: NewHome, tmp_path: Path
) -> None:
    home = new_home()
    service, api = home.start()
    api.until_ended(api.create("resumable", {}, run_id="kept").run_id)
    copy = tmp_path / "copy.db"

    code, said = run(home, "backup", copy)
    service.stop()
    home.database.unlink()
    home.database.with_name("runrecovery.db.installed").unlink()
    copy.rename(home.database)
    _, api = home.start()

    assert code == 0
    assert "verified; runs: 1 of instance 'default'" in said
    assert api.get("kept").run_id == "kept"


def a_file(path: Path, _: Home) -> None:
    path.write_text("mine")


def a_folder(path: Path, _: Home) -> None:
    path.mkdir()


def a_pipe(path: Path, _: Home) -> None:
    os.mkfifo(path)


def a_socket(path: Path, _: Home) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def a_link_to_nothing(path: Path, _: Home) -> None:
    path.symlink_to(path.with_name("nothing"))


def a_link_to_itself(path: Path, _: Home) -> None:
    path.symlink_to(path)


def a_link_to_the_database(path: Path, home: Home) -> None:
    path.symlink_to(home.database)


def a_log_of_an_earlier_copy(path: Path, _: Home) -> None:
    path.with_name("copy.db-wal").write_text("mine")


THERE = (
    a_file,
    a_folder,
    a_pipe,
    a_socket,
    a_link_to_nothing,
    a_link_to_itself,
    a_link_to_the_database,
    a_log_of_an_earlier_copy,
)


def found(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Return the entries of a folder, without following links."""
    states = {path.name: path.lstat() for path in folder.iterdir()}
    return {name: (s.st_ino, s.st_mode, s.st_size) for name, s in states.items()}


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """The home of a stopped service, which no test changes."""
    with Home(tmp_path_factory.mktemp("kept")) as home:
        service, _ = home.start()
        service.stop()
        yield home


@pytest.mark.parametrize("make", THERE, ids=lambda make: make.__name__)
def test_a_backup_overwrites_and_removes_nothing(
    kept: Home, tmp_path: Path, make: Callable[[Path, Home], None]
) -> None:
    make(tmp_path / "copy.db", kept)
    before = found(tmp_path), found(kept.data), kept.database.read_bytes()

    code, said = run(kept, "backup", tmp_path / "copy.db")

    assert code == 8
    assert "exists; a backup overwrites nothing" in said
    assert (found(tmp_path), found(kept.data), kept.database.read_bytes()) == before


def test_a_backup_onto_another_name_of_the_database_changes_nothing(
    stopped: Home, tmp_path: Path
) -> None:
    (tmp_path / "copy.db").hardlink_to(stopped.database)
    before = stopped.database.read_bytes()

    code, _ = run(stopped, "backup", tmp_path / "copy.db")

    assert code in {4, 8}
    assert (tmp_path / "copy.db").samefile(stopped.database)
    assert stopped.database.read_bytes() == before


@pytest.mark.parametrize("suffix", ["-wal", "-shm", "-journal"])
def test_a_backup_takes_no_name_that_sqlite_uses_beside_the_database(
    kept: Home, suffix: str
) -> None:
    before = found(kept.data)

    code, _ = run(kept, "backup", kept.data / f"runrecovery.db{suffix}")

    assert (code, found(kept.data)) == (8, before)


@pytest.mark.parametrize(
    ("dest", "why"),
    [
        ("none/copy.db", "No such file or directory"),
        ("file/copy.db", "Not a directory"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_backup_that_cannot_be_written_says_why(
    kept: Home, tmp_path: Path, dest: str, why: str
) -> None:
    (tmp_path / "file").touch()

    code, said = run(kept, "backup", tmp_path / dest)

    assert (code, said) == (4, f"error: {tmp_path / dest}: could not be written: {why}\n")


def test_check_says_that_a_database_is_gone(stopped: Home) -> None:
    healthy = run(stopped, "check")[0]
    stopped.database.unlink()

    code, said = run(stopped, "check")

    assert (healthy, code) == (0, 1)
    assert "is gone" in said


def test_check_names_the_folders_that_a_cli_cannot_write(new_home: NewHome) -> None:
    more = {"preset": "claude", "agent_home": "/proc/1/agents"}
    home = new_home(engines={"claude": EngineSpec(command=(sys.executable,), more=more)})

    code, said = run(home, "check")

    assert code == 1
    assert "/proc/1 cannot be written to" in " ".join(said.split())


def test_check_names_an_engine_whose_cli_has_no_known_home(stopped: Home) -> None:
    engine = stopped.engines["resumable"]
    homeless = {**engine.more, "trust": "claude", "env_allow": ["PATH"]}
    stopped.engines["homeless"] = EngineSpec(command=engine.command, more=homeless)
    stopped.write_config()

    code, said = run(stopped, "check")

    assert code == 1
    assert "engine 'homeless': HOME is not an absolute path" in said


def test_check_leaves_no_file_behind(stopped: Home) -> None:
    before = sorted(stopped.database.parent.iterdir())

    run(stopped, "check")

    assert sorted(stopped.database.parent.iterdir()) == before


def test_check_says_which_file_of_a_cli_cannot_be_edited(new_home: NewHome, tmp_path: Path) -> None:
    more = {"preset": "codex", "agent_home": str(tmp_path)}
    home = new_home(engines={"codex": EngineSpec(command=(sys.executable,), more=more)})
    none = run(home, "check")
    (tmp_path / "config.toml").write_text("[projects\n")

    code, said = run(home, "check")

    assert none[0] == 0
    assert code == 1
    assert "engine 'codex'" in said
    assert "config.toml" in said
    assert (tmp_path / "config.toml").read_text() == "[projects\n"


def test_migrate_makes_no_database_where_there_is_none(stopped: Home) -> None:
    done = run(stopped, "migrate")
    stopped.database.unlink()

    code, _ = run(stopped, "migrate")

    assert done[0] == 0
    assert (code, stopped.database.exists()) == (4, False)


def test_a_lock_file_names_its_holder_only_while_it_is_held(new_home: NewHome) -> None:
    home = new_home()
    service, _ = home.start()
    lock = home.database.parent / "lock"

    held = lock.read_text()
    service.stop()

    assert f"pid {service.pid}" in held
    assert lock.read_text() == ""
