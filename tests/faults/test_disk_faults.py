"""A disk that fails to sync, is slow, read-only or full: nothing that was acknowledged is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from faults import failing_disk
from faults.failing_disk import BROKEN, FULL, READ_ONLY, FailingDisk
from support.api import Api, Refusal, refused, status_word
from support.engines import GOOD_ENGINES, script
from support.service import Home
from support.service_forker import run_command
from support.waiting import until

NewHome = Callable[..., Home]
NOT_WRITTEN = (
    "the database cannot be written to: the system reports an I/O error; check the disk,"
    " read-only mounts, quotas, and the limit on file sizes (ulimit -f)"
)
# Ends when the test makes the file, so that its result comes while the disk fails.
TOLD = script(
    """
import json, sys, time
from pathlib import Path
given = json.loads(sys.stdin.readline())["input"]
print(json.dumps({"type": "progress", "message": "worked"}), flush=True)
while not Path(given["file"]).exists():
    time.sleep(0.02)
print(json.dumps({"type": "result", "output": {"text": "done"}}), flush=True)
"""
)
ENGINES = {**GOOD_ENGINES, "told": TOLD}
ASKS = {"questions": [{"prompt": "?"}]}


@pytest.fixture
def disk(tmp_path: Path) -> FailingDisk:
    """A disk for the data of `home`."""
    if failing_disk.COMPILER is None:
        pytest.skip("no compiler (cc)")
    folder = tmp_path / "disk"
    folder.mkdir()
    return failing_disk.build(folder, tmp_path / "home-0" / "data")


def test_the_disk_loses_what_it_failed_to_sync(disk: FailingDisk) -> None:
    program = """
import os, pathlib, sys
orders, name = map(pathlib.Path, sys.argv[1:])
file = os.open(name, os.O_RDWR | os.O_CREAT)
os.pwrite(file, b"kept", 0)
os.fsync(file)
os.pwrite(file, b"lost and more", 2)
orders.write_text("sync 5 0")
try:
    os.fsync(file)
except OSError as error:
    print(error.errno, os.pread(file, 100, 0))
"""
    disk.folder.mkdir(parents=True)
    command = [sys.executable, "-c", program, str(disk.orders), str(disk.folder / "file")]

    done = subprocess.run(
        command, env=os.environ | disk.env, capture_output=True, text=True, check=True
    )

    assert done.stdout == "5 b'kept'\n"


@pytest.fixture
def home(disk: FailingDisk, tmp_path: Path, new_home: NewHome) -> Home:
    """A home whose services use the disk."""
    made = new_home(engines=ENGINES, env=disk.env, may_fork=False)
    assert made.data == disk.folder
    return made


def until_health(api: Api, word: str) -> None:
    until(lambda: api.health_of() == word, f"health says {word}")


def assert_kept(home: Home, api: Api, acknowledged: set[str]) -> None:
    """Assert that the runs are there, and that the file is whole."""
    for run_id in acknowledged:
        api.until_ended(run_id)
    assert home.rows("PRAGMA integrity_check") == [("ok",)]


def test_a_failed_sync_acknowledges_nothing_and_loses_nothing(
    home: Home, disk: FailingDisk
) -> None:
    service, api = home.start()
    acknowledged = {api.create("resumable", run_id=f"before-{n}").run_id for n in range(3)}

    disk.fail(BROKEN, "sync")
    answer = refused(lambda: api.create("resumable", run_id="during"))
    until_health(api, "NOT_SERVING")
    seen = {run_id: status_word(api.get(run_id)) for run_id in acknowledged}
    disk.mend()
    until_health(api, "SERVING")
    acknowledged |= {api.create("resumable", run_id=f"after-{n}").run_id for n in range(3)}
    assert_kept(home, api, acknowledged)
    service.kill()
    _, api = home.start()

    assert (answer.code, answer.reason) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE")
    assert answer.message == NOT_WRITTEN
    assert seen.keys() == {"before-0", "before-1", "before-2"}
    assert_kept(home, api, acknowledged)


def test_a_kill_while_syncs_fail_loses_nothing(home: Home, disk: FailingDisk) -> None:
    service, api = home.start()
    acknowledged = {api.create("resumable", run_id=f"before-{n}").run_id for n in range(3)}
    for run_id in acknowledged:
        api.until_ended(run_id)

    disk.fail(BROKEN, "sync")
    refused(lambda: api.create("resumable", run_id="during"))
    service.kill()
    refusal = home.spawn().exit_code()
    disk.mend()
    _, api = home.start()

    assert refusal == 4
    assert_kept(home, api, acknowledged)


def test_a_read_only_disk_refuses_writes_until_it_is_writable(
    home: Home, disk: FailingDisk, tmp_path: Path
) -> None:
    service, api = home.start()
    api.create("told", {"file": str(tmp_path / "go")}, run_id="works")
    until(lambda: b"worked" in b"".join(p.data for p in api.output("works")), "it works")

    disk.fail(READ_ONLY, "open", "write", "sync")
    (tmp_path / "go").touch()
    answer = refused(lambda: api.create("resumable", run_id="during"))
    until_health(api, "NOT_SERVING")
    service.until_event("execution.write_retried")
    during = status_word(api.get("works"))
    disk.mend()
    until_health(api, "SERVING")

    assert (answer.reason, answer.message) == ("STORAGE_UNAVAILABLE", NOT_WRITTEN)
    assert during == "RUNNING"
    assert status_word(api.until_ended("works")) == "SUCCEEDED"
    assert status_word(api.until_ended(api.create("resumable").run_id)) == "SUCCEEDED"
    assert service.stop() == 0


def test_a_slow_disk_makes_calls_slow_and_nothing_else(home: Home, disk: FailingDisk) -> None:
    service, _ = home.start()

    disk.delay(200, "sync")
    with Api(service.address, timeout_s=60.0) as patient:
        run_id = patient.create("resumable", ASKS).run_id
        patient.until_status(run_id, "WAITING_USER")
        health = patient.health_of()
        patient.reply(run_id, 1, "yes")
        ended = patient.until_ended(run_id)

    assert (health, status_word(ended)) == ("SERVING", "SUCCEEDED")
    assert service.events("service.lease_not_renewed") == []
    assert service.stop() == 0


def test_a_full_disk_of_the_runs_costs_output_and_launches_but_no_result(
    disk: FailingDisk, tmp_path: Path, new_home: NewHome
) -> None:
    disk = replace(disk, folder=disk.folder / "runs")
    home = new_home(engines=ENGINES, env=disk.env, may_fork=False)
    service, api = home.start()
    api.create("told", {"file": str(tmp_path / "go")}, run_id="works")
    until(lambda: b"worked" in b"".join(p.data for p in api.output("works")), "it works")

    disk.fail(FULL, "open", "write")
    (tmp_path / "go").touch()
    kept = api.until_ended("works")
    failed = api.until_ended(api.create("resumable").run_id)
    disk.mend()
    later = api.until_ended(api.create("resumable").run_id)

    assert (status_word(kept), kept.output["text"]) == ("SUCCEEDED", "done")
    assert [event["run_id"] for event in service.events("execution.output_lost")] == ["works"]
    assert failed.error.code == "LAUNCH_FAILED"
    assert failed.error.message.startswith(f"No space left on device: {home.data}/runs/")
    assert status_word(later) == "SUCCEEDED"
    assert service.stop() == 0


@pytest.fixture
def small_disk(new_home: NewHome) -> Iterator[Home]:
    """A home with its data on a file system of 16 MiB, where mounting is permitted."""
    made = new_home(engines=ENGINES, min_free_bytes=0)
    made.data.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(made.data)]
    if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("mounting needs root")
    yield made
    made.clear()
    subprocess.run(["umount", "--lazy", str(made.data)], check=True)


def fill(home: Home) -> Path:
    """Fill the disk of a home to its last byte, and return the file to remove."""
    ballast = home.data / "ballast"
    with ballast.open("wb") as file, suppress(OSError):
        while True:
            os.write(file.fileno(), bytes(4096))
    return ballast


def test_a_full_disk_keeps_results_and_acknowledged_runs(small_disk: Home, tmp_path: Path) -> None:
    home = small_disk
    service, api = home.start()
    api.create("told", {"file": str(tmp_path / "go")}, run_id="works")
    until(lambda: b"worked" in b"".join(p.data for p in api.output("works")), "it works")
    waits = api.create("resumable", ASKS).run_id
    api.until_status(waits, "WAITING_USER")

    ballast = fill(home)
    refusal = until_refused(api)
    (tmp_path / "go").touch()
    until_health(api, "NOT_SERVING")
    service.until_event("execution.write_retried")
    during = status_word(api.get("works"))
    ballast.unlink()
    until_health(api, "SERVING")
    ended = api.until_ended("works")
    ballast = fill(home)
    until_refused(api)
    service.kill()
    start = home.spawn()
    code = start.exit_code()
    ballast.unlink()
    _, api = home.start()

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "STORAGE_FULL")
    assert during == "RUNNING"
    assert (status_word(ended), ended.output["text"]) == ("SUCCEEDED", "done")
    assert code == 6, start.text
    api.reply(waits, 1, "yes")
    assert status_word(api.until_ended(waits)) == "SUCCEEDED"
    assert home.rows("PRAGMA integrity_check") == [("ok",)]


def until_refused(api: Api) -> Refusal:
    """Create runs until one is refused: the log may have pages that can be used again."""
    return refused(lambda: [api.create("resumable", {"text": "x" * 9000}) for _ in range(500)])


def test_a_start_on_a_read_only_disk_is_refused_and_changes_nothing(small_disk: Home) -> None:
    home = small_disk
    service, api = home.start()
    waits = api.create("resumable", ASKS).run_id
    api.until_status(waits, "WAITING_USER")
    assert service.stop() == 0

    subprocess.run(["mount", "-o", "remount,ro", str(home.data)], check=True)
    start = home.spawn()
    code = start.exit_code()
    subprocess.run(["mount", "-o", "remount,rw", str(home.data)], check=True)
    _, api = home.start()

    assert code == 4
    assert start.text == f"error: {home.data}: is on a read-only file system\n"
    assert status_word(api.get(waits)) == "WAITING_USER"


def test_a_backup_to_a_full_disk_is_refused_and_leaves_nothing(small_disk: Home) -> None:
    home, copy = small_disk, small_disk.data / "copy.db"
    _, api = home.start()
    api.until_ended(api.create("resumable").run_id)
    ballast = fill(home)
    before = sorted(home.data.iterdir())

    refused_copy = run_command("backup", "--data-dir", home.data, copy, cwd=home.path)
    left = sorted(home.data.iterdir())
    ballast.unlink()
    made = run_command("backup", "--data-dir", home.data, copy, cwd=home.path)

    said = f"error: {copy}: could not be written: database or disk is full\n"
    assert (refused_copy.returncode, refused_copy.stderr) == (4, said)
    assert left == before
    assert (made.returncode, copy.exists()) == (0, True)
