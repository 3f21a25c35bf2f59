"""A service with retention removes old runs for good, and callers are told so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import grpc
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refused
from support.service import Home
from support.service_forker import run_command
from support.stores import change, key_of

NewHome = Callable[..., Home]
HOUR_US: Final = 3_600_000_000
QUESTION: Final = {"kind": "open_text", "prompt": "What next?"}


def make_old(home: Home, run_id: str, hours: int) -> None:
    """Let a run have ended earlier; its service is stopped."""
    moved = "UPDATE run SET ended_at = ended_at - ? WHERE run_id = ?"
    change(home, moved, hours * HOUR_US, run_id)
    closed = "UPDATE process_lease SET closed_at = closed_at - ? WHERE run = ?"
    change(home, closed, hours * HOUR_US, key_of(home, run_id))


def test_an_operator_prunes_a_running_service(new_home: NewHome) -> None:
    retention = {"ended_runs": "2d", "outputs": "12h", "events": "12h"}
    home = new_home(retention=retention)
    service, api = home.start()
    for run_id in ("old", "middle", "young"):
        api.create("resumable", {"result": {"x": 1}}, run_id=run_id)
    api.create("resumable", {"questions": [QUESTION]}, run_id="waiting")
    for run_id in ("old", "middle", "young"):
        api.until_ended(run_id)
    api.until_status("waiting", "WAITING_USER")
    service.stop()
    make_old(home, "old", hours=72)
    make_old(home, "middle", hours=24)
    keys = {run_id: key_of(home, run_id) for run_id in ("old", "middle", "young", "waiting")}
    service, api = home.start()

    def prune(*options: str) -> list[str]:
        done = run_command("prune", *options, "--server", service.address, cwd=home.path)
        assert done.returncode == 0, done.stderr
        return [" ".join(line.split()[:2]) for line in done.stdout.splitlines()[2:-1]]

    would = prune("--dry-run")
    assert api.get("old").run_id == "old"
    removed = prune()

    assert would == removed == ["runs 1", "outputs 1", "events 1"]
    assert refused(lambda: api.get("old")).reason == "RUN_NOT_FOUND"
    gone = refused(lambda: api.output("middle"))
    assert (gone.code, gone.reason) == (grpc.StatusCode.NOT_FOUND, "OUTPUT_REMOVED")
    behind = refused(lambda: watch_all(api, "middle"))
    assert (behind.code, behind.reason) == (grpc.StatusCode.OUT_OF_RANGE, "WATCH_HISTORY_PRUNED")
    assert api.get("middle").output["x"] == 1
    assert api.output("young")
    api.reply("waiting", 1, "done")
    api.until_ended("waiting")
    folders = {path.name for path in (home.data / "runs").iterdir() if path.name.isdecimal()}
    assert folders == {str(key) for run_id, key in keys.items() if run_id != "old"}
    assert home.rows("SELECT count(*) FROM process_lease WHERE run = ?", keys["old"]) == [(0,)]
    assert watch_all(api, "young")[0].event.kind == run_pb2.RUN_EVENT_KIND_CREATED


def watch_all(api: Api, run_id: str) -> list[pb.WatchRunResponse]:
    """Return every event of an ended run."""
    request = pb.WatchRunRequest(run_id=run_id, after_sequence=0)
    return list(api.runs.WatchRun(request, timeout=10))
