"""RESTART_POLICY_RESUME with real processes: an interrupted turn does not fail its run."""

from __future__ import annotations

import signal
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import run_pb2
from support.api import Api, refused
from support.engines import GOOD_ENGINES, EngineSpec, agent
from support.pages import code_blocks
from support.processes import send_signal
from support.service import Home
from support.waiting import until

NewHome = Callable[..., Home]
ENGINES = {
    **GOOD_ENGINES,
    "resumed": agent(
        "interruptible",
        resumes_interrupted=True,
        restart_policy="resume",
        session_file="{workspace}/{value}.json",
    ),
    "able": agent("interruptible", resumes_interrupted=True),
}


def until_in_turn(home: Home, run_id: str, *, handle: bool = True) -> None:
    """Wait until the process works, and its session is on record if it names one."""
    recorded = "SELECT session_value IS NOT NULL FROM run WHERE run_id = ?"
    until(
        lambda: home.agents_of(run_id) and home.rows(recorded, run_id) == [(handle,)],
        "the agent works",
    )


def output_of(run: run_pb2.Run) -> dict[str, Any]:
    return MessageToDict(run.output)


def succeeded(api: Api, run_id: str) -> tuple[run_pb2.Run, dict[str, Any]]:
    run = api.until_status(run_id, "SUCCEEDED")
    return run, output_of(run)


def test_a_killed_service_completes_the_turn_that_it_left(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES)
    service, api = home.start()
    run_id = api.create("resumed").run_id
    until_in_turn(home, run_id)
    service.kill()

    _, api = home.start()

    run, output = succeeded(api, run_id)
    assert run.recovery.recovery_reason == "interrupted_turn_resumed"
    assert (run.attempt, run.resume_count) == (1, 1)
    told = output["interrupted"]
    assert (told["cause"], told["times"]) == ("restart", 1)
    assert told["at"] == run.recovery.recovered_at.ToDatetime().isoformat() + "+00:00"
    assert told["notice"].startswith("The service that runs you was restarted. At 20")
    assert "reply" not in told


def test_a_planned_stop_in_the_middle_of_many_turns_fails_none(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES, max_concurrent=8)
    service, api = home.start()
    run_ids = [api.create("resumed").run_id for _ in range(8)]
    for run_id in run_ids:
        until_in_turn(home, run_id)
    assert service.stop() == 0
    assert home.agents() == []

    _, api = home.start()

    for run_id in run_ids:
        run, output = succeeded(api, run_id)
        assert (run.attempt, output["interrupted"]["times"]) == (1, 1)


def test_the_reply_of_the_interrupted_turn_is_sent_again(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES)
    service, api = home.start()
    run = api.create("resumed", {"asks": True})
    api.until_status(run.run_id, "WAITING_USER")
    api.reply(run.run_id, 1, "blue")
    until_in_turn(home, run.run_id)
    until(
        lambda: home.rows("SELECT 1 FROM interaction WHERE state = 'DELIVERED'"), "it has the reply"
    )
    service.kill()

    _, api = home.start()

    _, output = succeeded(api, run.run_id)
    assert output["interrupted"]["reply"] == {"interaction_id": 1.0, "response": "blue"}


def test_a_turn_without_a_session_starts_again(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES)
    service, api = home.start()
    run_id = api.create("resumed", {"no_session": True}).run_id
    until_in_turn(home, run_id, handle=False)
    service.kill()

    _, api = home.start()

    run, output = succeeded(api, run_id)
    assert run.recovery.recovery_reason == "interrupted_before_session"
    assert output == {"interrupted": None, "attempt": 2.0}


def test_a_turn_whose_session_is_gone_starts_again(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES)
    service, api = home.start()
    run_id = api.create("resumed").run_id
    until_in_turn(home, run_id)
    service.kill()
    (session,) = home.data.rglob("session-*.json")
    session.unlink()

    _, api = home.start()

    run, output = succeeded(api, run_id)
    assert run.recovery.recovery_reason == "interrupted_before_session"
    assert output["attempt"] == 2


def test_a_turn_whose_shim_was_killed_is_resumed(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES)
    _, api = home.start()
    run_id = api.create("resumed").run_id
    until_in_turn(home, run_id)

    (shim,) = home.shims_of(run_id)
    send_signal(shim, signal.SIGKILL)

    run, output = succeeded(api, run_id)
    assert output["interrupted"]["cause"] == "shim_lost"
    assert run.recovery.recovery_state == run_pb2.RECOVERY_STATE_NONE


def test_a_caller_chooses_the_policy(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES)
    _, api = home.start()

    assert api.create("resumed").restart_policy == run_pb2.RESTART_POLICY_RESUME
    assert api.create("able").restart_policy == run_pb2.RESTART_POLICY_FAIL
    resumed = api.create("able", restart_policy=run_pb2.RESTART_POLICY_RESUME)
    assert resumed.restart_policy == run_pb2.RESTART_POLICY_RESUME
    failed = api.create("resumed", restart_policy=run_pb2.RESTART_POLICY_FAIL)
    assert failed.restart_policy == run_pb2.RESTART_POLICY_FAIL


def test_an_engine_that_cannot_be_resumed_in_a_turn_is_refused(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES)
    _, api = home.start()

    refusal = refused(lambda: api.create("resumable", restart_policy=run_pb2.RESTART_POLICY_RESUME))

    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields == ("restart_policy",)
    assert "resumes_interrupted" in refusal.message


@pytest.mark.parametrize("policy", ["fail", "requeue"])
def test_the_policy_of_an_engine_is_that_of_its_runs(new_home: NewHome, policy: str) -> None:
    engines = {"e": agent("interruptible", restart_policy=policy)}
    home = new_home(engines=engines)
    _, api = home.start()

    run = api.create("e")

    assert run_pb2.RestartPolicy.Name(run.restart_policy) == f"RESTART_POLICY_{policy.upper()}"


def test_the_engine_of_the_page_asks_about_the_step_in_which_it_was_killed(
    new_home: NewHome, tmp_path: Path
) -> None:
    (code,) = code_blocks("docs/interruptions.md", language="python")
    engine = tmp_path / "steps.py"
    engine.write_text(code, "utf-8")
    (table,) = code_blocks("docs/interruptions.md", language="toml")
    keys = tomllib.loads(table)["engines"]["steps"]
    command = [sys.executable, *keys.pop("command")[1:-1], str(engine)]
    home = new_home(engines={"steps": EngineSpec(command=command, more=keys)})
    did, go_on = tmp_path / "did", tmp_path / "go on"
    waits = f"echo two >> {did}; until test -e '{go_on}'; do sleep 0.1; done"
    steps = [f"echo one >> {did}", waits, f"echo three >> {did}"]
    service, api = home.start()
    run_id = api.create("steps", {"steps": steps}).run_id
    until(lambda: did.exists() and did.read_text() == "one\ntwo\n", "the second step runs")
    service.kill()
    service, api = home.start()
    asked = api.until_status(run_id, "WAITING_USER").pending_interaction
    service.kill()
    _, api = home.start()

    api.reply(run_id, asked.interaction_id, "yes")

    _, output = succeeded(api, run_id)
    assert asked.prompt == f"Has {waits!r} taken effect?"
    assert output == {"steps": 3.0}
    assert did.read_text() == "one\ntwo\nthree\n"
