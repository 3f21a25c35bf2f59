"""Backups of a running service with the folders of its runs, which continue after a restore."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import pytest
from runrecovery_service import offline
from runrecovery_service.config.settings import Settings
from runrecovery_service.domain.start_errors import BackupRefused, DataDirRefused
from runrecovery_service.runs_backup import RunsCopy
from support.engines import script
from support.service import Home
from support.service_forker import run_command
from support.stores import key_of

NewHome = Callable[..., Home]
KEEPS_SESSION: Final = """
import json, os, sys
message = json.loads(sys.stdin.readline())
if message["type"] == "resume":
    print(json.dumps({"type": "result", "output": {"kept": open("session").read()}}), flush=True)
else:
    open("session", "w").write("what the agent knows")
    print(json.dumps({"type": "session", "value": "s"}), flush=True)
    print(json.dumps({"type": "ask", "kind": "open_text", "prompt": "What next?"}), flush=True)
"""


@pytest.fixture
def home(new_home: NewHome) -> Home:
    """A home with a running service, and two runs that wait."""
    home = new_home(engines={"keeps": script(KEEPS_SESSION)})
    _, api = home.start()
    for run_id in ("first", "second"):
        api.create("keeps", run_id=run_id)
        api.until_status(run_id, "WAITING_USER")
    return home


def test_a_restored_backup_with_runs_continues_them_in_their_sessions(
    home: Home, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.db"
    options = ("--config", home.config, "--data-dir", home.data)

    done = run_command("backup", *options, "--with-runs", copy, cwd=home.path)
    home.services[0].kill()
    shutil.rmtree(home.data)
    home.data.mkdir()
    copy.rename(home.database)
    copy.with_name("copy.db.runs").rename(home.data / "runs")
    _, api = home.start()
    api.reply("first", 1, "yes")

    assert done.returncode == 0
    assert f"copied to {copy}.runs: 2 folders of runs (" in done.stdout
    assert done.stdout.splitlines()[-1] == (
        "runs that wait: 2, of which 2 have the files of that moment"
    )
    assert api.until_ended("first").output["kept"] == "what the agent knows"


def test_a_run_that_was_answered_during_the_copy_is_named_and_a_later_run_is_not_copied(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api, real = home.services[0].api(), RunsCopy.copy

    def answer_first(self: RunsCopy, keys: Iterable[int]) -> None:
        api.reply("first", 1, "yes")
        api.until_ended("first")
        api.create("keeps", run_id="later")
        api.until_status("later", "WAITING_USER")
        real(self, keys)

    monkeypatch.setattr(RunsCopy, "copy", answer_first)
    settings = Settings(data_dir=home.data)

    made = offline.backup(settings, tmp_path / "copy.db", with_runs=True)

    assert (made.folders, made.waiting, made.changed) == (2, 2, ("first",))
    assert not (tmp_path / "copy.db.runs" / str(key_of(home, "later"))).exists()


def test_a_backup_that_fails_leaves_nothing(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, copy = Settings(data_dir=home.data), tmp_path / "copy.db"

    def fail(_: RunsCopy, __: Iterable[int]) -> None:
        raise DataDirRefused("a file", "could not be copied")

    with monkeypatch.context() as patch:
        patch.setattr(RunsCopy, "copy", fail)
        with pytest.raises(DataDirRefused):
            offline.backup(settings, copy, with_runs=True)
    assert list(tmp_path.glob("copy*")) == []

    copy.write_text("mine")
    with pytest.raises(BackupRefused):
        offline.backup(settings, copy, with_runs=True)
    assert [path.name for path in tmp_path.glob("copy*")] == ["copy.db"]
    assert copy.read_text() == "mine"
