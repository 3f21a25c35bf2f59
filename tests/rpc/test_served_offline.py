"""The commands that work on a data directory without a service."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.service import EngineSpec, Home

NewHome = Callable[..., Home]


def run(home: Home, *arguments: str | Path) -> tuple[int, str]:
    """Run a subcommand on a home's data directory; return its exit code and all that it said."""
    command = [sys.executable, "-m", "runrecovery_service", arguments[0]]
    options = ["--config", str(home.config), "--data-dir", str(home.database.parent)]
    done = subprocess.run(
        [*command, *options, *map(str, arguments[1:])],
        capture_output=True,
        text=True,
        check=False,
        cwd=home.database.parent.parent,
    )
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
    copy.rename(home.database)
    _, api = home.start()

    assert (code, "found sound" in said) == (0, True)
    assert api.get("kept").run_id == "kept"


def test_a_backup_overwrites_nothing(stopped: Home, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text("mine")

    code, _ = run(stopped, "backup", there)

    assert (code, there.read_text()) == (8, "mine")


def test_check_says_that_a_database_is_gone(stopped: Home) -> None:
    healthy = run(stopped, "check")[0]
    stopped.database.unlink()

    code, said = run(stopped, "check")

    assert (healthy, code) == (0, 1)
    assert "is gone" in said


def test_check_says_where_a_cli_could_write_nothing(new_home: NewHome) -> None:
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


def test_a_lock_names_its_holder_while_it_is_held_only(new_home: NewHome) -> None:
    home = new_home()
    service, _ = home.start()
    lock = home.database.parent / "lock"

    held = lock.read_text()
    service.stop()

    assert f"pid {service.pid}" in held
    assert lock.read_text() == ""
