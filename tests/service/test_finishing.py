"""`finish_s`: a planned stop lets the turns under way end by themselves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refused
from support.engines import GOOD_ENGINES, script
from support.service import Home, ServiceProcess
from support.waiting import until

NewHome = Callable[..., Home]

UNTIL_TOLD: str = """
import json, pathlib, sys, time
message = json.loads(sys.stdin.readline())
print(json.dumps({"type": "session", "value": "s"}), flush=True)
while not pathlib.Path(message["input"]["file"]).exists():
    time.sleep(0.02)
if message["input"].get("asks") and message["type"] == "start":
    print(json.dumps({"type": "ask", "kind": "open_text", "prompt": "?"}), flush=True)
else:
    print(json.dumps({"type": "result", "output": {}}), flush=True)
"""
ENGINES = {**GOOD_ENGINES, "told": script(UNTIL_TOLD)}


def start(new_home: NewHome, *, finish_s: float = 600.0) -> tuple[Home, ServiceProcess, Api]:
    home = new_home(engines=ENGINES, finish_s=finish_s, max_concurrent=2)
    service, api = home.start()
    return home, service, api


def working(home: Home, api: Api, *, asks: bool = False) -> tuple[str, Path]:
    """Return a run whose agent works until a file is made, and that file."""
    file = home.path / f"go-{asks}"
    run_id = api.create("told", {"file": str(file), "asks": asks}).run_id
    until(lambda: home.agents_of(run_id), "the agent works")
    return run_id, file


def finishing(service: ServiceProcess) -> None:
    service.terminate()
    service.until_event("service.finishing")


def test_a_turn_under_way_ends_by_itself(new_home: NewHome) -> None:
    home, service, api = start(new_home)
    run_id, file = working(home, api)

    finishing(service)
    file.touch()

    assert service.exit_code() == 0
    assert service.events("service.finished")[0]["turns_left"] == 0
    _, api = home.start()
    assert api.until_status(run_id, "SUCCEEDED").recovery.recovery_reason == ""


def test_meanwhile_health_says_not_serving_and_no_run_is_created(new_home: NewHome) -> None:
    home, service, api = start(new_home)
    run_id, file = working(home, api)

    finishing(service)

    assert api.health_of() == "NOT_SERVING"
    assert api.get(run_id).run_id == run_id
    refusal = refused(lambda: api.create("told", {"file": "x"}))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    file.touch()
    assert service.exit_code() == 0


def test_meanwhile_a_watch_goes_on(new_home: NewHome) -> None:
    home, service, api = start(new_home)
    run_id, file = working(home, api)
    watch = api.runs.WatchRun(pb.WatchRunRequest(run_id=run_id), timeout=60.0)
    next(watch)

    finishing(service)
    file.touch()

    kinds = [answer.event.kind for answer in watch if answer.HasField("event")]
    assert kinds[-1] == run_pb2.RUN_EVENT_KIND_SUCCEEDED
    assert service.exit_code() == 0


def test_meanwhile_a_queued_run_is_not_launched(new_home: NewHome) -> None:
    home, service, api = start(new_home)
    asking, file = working(home, api, asks=True)
    other, _ = working(home, api)
    finishing(service)

    file.touch()
    api.until_status(asking, "WAITING_USER")
    api.reply(asking, 1, "yes")

    assert api.until_status(asking, "QUEUED").status
    api.cancel(other)
    assert service.exit_code() == 0
    _, api = home.start()
    assert api.until_status(asking, "SUCCEEDED").recovery.recovery_reason == (
        "accepted_reply_redriven"
    )
    assert api.until_status(other, "CANCELED").run_id == other


def test_a_turn_that_does_not_end_in_time_is_interrupted(new_home: NewHome) -> None:
    home, service, api = start(new_home, finish_s=0.3)
    run_id, _ = working(home, api)

    finishing(service)

    assert service.exit_code() == 0
    assert service.events("service.finished")[0]["turns_left"] == 1
    assert home.agents() == []
    _, api = home.start()
    assert api.until_status(run_id, "FAILED").error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"


def test_a_sticky_wait_is_not_waited_for(new_home: NewHome) -> None:
    _, service, api = start(new_home)
    run_id = api.create("sticky", {"questions": [{"prompt": "?"}]}).run_id
    api.until_status(run_id, "WAITING_USER")

    service.terminate()

    assert service.exit_code() == 0
    assert service.events("service.finishing") == []


def test_a_second_signal_cuts_the_time_short(new_home: NewHome) -> None:
    home, service, api = start(new_home)
    run_id, _ = working(home, api)
    finishing(service)

    service.terminate()

    assert service.exit_code() == 143
    _, api = home.start()
    assert api.until_status(run_id, "FAILED").error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
