"""A service with retention removes old runs; calls about them get the documented answers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import Final

import grpc
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refusal_of, refused
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


def test_runs_are_removed_while_callers_page_watch_and_create(new_home: NewHome) -> None:
    home = new_home(max_concurrent=1, retention={"ended_runs": "2d"})
    service, api = home.start()
    api.create("resumable", {"hold": True}, run_id="holds")
    ids = [f"run-{number:02}" for number in range(18)]
    for run_id in ids:  # newest first in the list: run-17
        api.create("resumable", run_id=run_id)
        api.cancel(run_id)
    service.stop()
    old = {run_id for number, run_id in enumerate(ids) if number % 3}
    for run_id in old:
        make_old(home, run_id, hours=72)
    service, api = home.start()
    api.create("resumable", {"questions": [QUESTION]}, run_id="waits")
    api.until_status("waits", "WAITING_USER")
    paged = Paged(api)

    over = Event()
    with ThreadPoolExecutor(2) as beside:
        watched = beside.submit(watch_all, api, "waits")
        before = paged.next()
        made = beside.submit(create_until, api, over)
        before += paged.next()
        prune = recovery_pb.PruneRequest()
        while not api.recovery.Prune(prune, timeout=60).done:
            pass
        after = paged.rest()
        api.reply("waits", 1, "done")
        events = watched.result(timeout=60)
        over.set()
        created = made.result(timeout=60)

    assert before == ["waits", "run-17", "run-16", "run-15", "run-14", "run-13"]
    assert after == ["run-12", "run-09", "run-06", "run-03", "run-00", "holds"]
    assert {run_id for run_id in ids if is_gone(api, run_id)} == old
    assert events[-1].event.kind == run_pb2.RUN_EVENT_KIND_SUCCEEDED
    assert [event.sequence for event in events] == [*range(1, len(events) + 1)]
    assert not any(is_gone(api, run_id) for run_id in created)


class Paged:
    """Reads the list of runs page by page, three to a page."""

    def __init__(self, api: Api) -> None:
        self.api, self.token = api, ""

    def next(self) -> list[str]:
        request = pb.ListRunsRequest(page_size=3, page_token=self.token)
        answer = self.api.runs.ListRuns(request, timeout=60)
        self.token = answer.next_page_token
        return [run.run_id for run in answer.runs]

    def rest(self) -> list[str]:
        found = self.next()
        while self.token:
            found += self.next()
        return found


def create_until(api: Api, over: Event) -> list[str]:
    """Create and cancel runs."""
    made: list[str] = []
    while not over.is_set() and len(made) < 60:
        made.append(api.create("resumable").run_id)
        api.cancel(made[-1])
    return made


def is_gone(api: Api, run_id: str) -> bool:
    try:
        api.get(run_id)
    except grpc.RpcError as error:
        return refusal_of(error).reason == "RUN_NOT_FOUND"
    return False


def watch_all(api: Api, run_id: str) -> list[pb.WatchRunResponse]:
    """Return every event of an ended run."""
    request = pb.WatchRunRequest(run_id=run_id, after_sequence=0)
    return list(api.runs.WatchRun(request, timeout=60))
