"""A file of the SQLite store is removed, replaced or overwritten under the running service."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from support.api import Api
from support.service import Home, ServiceProcess
from support.service_forker import run_command

NewHome = Callable[..., Home]


def remove_log(home: Home) -> None:
    for suffix in ("-wal", "-shm"):
        home.database.with_name(home.database.name + suffix).unlink()


def replace_database(home: Home) -> None:
    copy = home.path / "copy.db"
    copy.write_bytes(home.database.read_bytes())
    copy.rename(home.database)


def create_until_refused(api: Api) -> list[str]:
    """Create runs until one is refused; return the acknowledged ones."""
    made: list[str] = []
    try:
        while True:
            made.append(api.create("resumable", {}).run_id)
    except grpc.RpcError:
        return made


def rescued_copy(service: ServiceProcess) -> Path:
    found = re.search(r"a sound copy of the store is\s+(\S+)", service.text)
    assert found is not None, service.text
    return Path(found.group(1))


def rows(path: Path, sql: str) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(f"file:{path}?immutable=1", uri=True)) as store:
        return store.execute(sql).fetchall()


@pytest.mark.parametrize("damage", [remove_log, replace_database])
def test_acknowledged_runs_are_in_the_copy_that_the_service_leaves_after_the_loss(
    new_home: NewHome, damage: Callable[[Home], None]
) -> None:
    home = new_home()
    service, api = home.start()
    before = [api.create("resumable", {}).run_id for _ in range(5)]

    damage(home)
    late = create_until_refused(api)

    assert late == []
    assert service.exit_code() == 4
    copy = rescued_copy(service)
    for suffix in ("", "-wal", "-shm"):
        home.database.with_name(home.database.name + suffix).unlink(missing_ok=True)
    copy.rename(home.database)
    _, api = home.start()
    assert {api.get(run_id).run_id for run_id in before} == set(before)


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_nothing_is_acknowledged_once_a_file_was_cut_short_in_place(
    new_home: NewHome, suffix: str
) -> None:
    home = new_home()
    service, api = home.start()
    api.create("resumable", {})

    os.truncate(f"{home.database}{suffix}", 0)

    assert create_until_refused(api) == []
    assert service.exit_code() == 4
    said = " ".join(service.text.split())
    assert f"{home.database.name}{suffix} was cut short or overwritten" in said
    assert "no copy could be made" in said


def test_a_stop_right_after_the_loss_damages_nothing_and_reports_the_loss(
    new_home: NewHome,
) -> None:
    home = new_home(drain_delay_s=0.0)
    service, api = home.start()
    run_id = api.create("resumable", {}).run_id

    remove_log(home)
    service.terminate()

    assert service.exit_code() == 4
    assert rows(home.database, "PRAGMA integrity_check") == [("ok",)]
    assert rows(rescued_copy(service), "SELECT run_id FROM run") == [(run_id,)]


def test_a_backup_beside_a_service_whose_wal_was_removed_exits_with_4_and_leaves_no_file(
    new_home: NewHome,
) -> None:
    home = new_home()
    service, api = home.start()
    api.create("resumable", {})
    service.popen.send_signal(signal.SIGSTOP)  # or it would end before the backup begins
    remove_log(home)
    copy = home.path / "copy.db"

    options = ("--config", home.config, "--data-dir", home.data)
    done = run_command("backup", copy, *options, cwd=home.path)
    service.popen.send_signal(signal.SIGCONT)

    assert done.returncode == 4
    assert "commits that were acknowledged" in " ".join(done.stderr.split())
    assert not copy.exists()
    assert service.exit_code() == 4


def test_a_start_after_a_kill_and_a_removed_wal_exits_with_4_until_the_marker_is_removed(
    new_home: NewHome,
) -> None:
    home = new_home()
    service, api = home.start()
    run_id = api.create("resumable", {}).run_id
    api.until_ended(run_id)
    service.kill()
    remove_log(home)

    refused = home.spawn()

    assert refused.exit_code() == 4
    assert "remove runrecovery.db.installed" in " ".join(refused.text.split())
    home.database.with_name("runrecovery.db.installed").unlink()
    _, api = home.start()
    with pytest.raises(grpc.RpcError) as missing:
        api.get(run_id)
    assert missing.value.code() is grpc.StatusCode.NOT_FOUND
