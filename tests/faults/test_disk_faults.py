"""A disk that fails to sync, is slow, read-only or full: nothing that was acknowledged is lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from faults import failing_disk
from faults.failing_disk import BROKEN, READ_ONLY, FailingDisk
from support.api import Api, refused, status_word
from support.engines import GOOD_ENGINES, script
from support.service import Home
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
