"""A service that is killed between the exit of its agents and the record of their ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from support.api import Api, status_word
from support.engines import script
from support.service import Home
from support.waiting import until

NewHome = Callable[..., Home]

SAYS: Final = script(
    """
import json, os, sys, time
task = json.loads(sys.stdin.readline())
if task["type"] == "resume":
    print(json.dumps({"type": "result", "output": {"reply": task["reply"]["response"]}}))
    sys.exit()
print(json.dumps({"type": "session", "value": "s"}), flush=True)
while not os.path.exists(task["input"]["go"]):
    time.sleep(0.01)
print(json.dumps(task["input"]["says"]), flush=True)
if "uses" in task["input"]:
    used = {"input_tokens": task["input"]["uses"], "output_tokens": 1}
    print(json.dumps({"type": "usage", **used}), flush=True)
sys.exit(int(task["input"].get("code", 0)))
"""
)
RESULT: Final = {"type": "result", "output": {"done": True}}
QUESTION: Final = {"type": "ask", "kind": "confirm", "prompt": "Ship?"}
RUNS: Final[dict[str, dict[str, Any]]] = {
    "succeeds": {"says": RESULT},
    "asks": {"says": QUESTION, "uses": 40},
    "asks-in-vain": {"says": QUESTION, "uses": 40},
    "fails": {"says": RESULT, "code": 3},
    "canceled": {"says": RESULT},
}
EXPECTED: Final = {
    "succeeds": "result_found_in_output",
    "asks": "question_found_in_output",
    "asks-in-vain": "budget_used_up",
    "fails": "running_interrupted",
    "canceled": "cancel_completed",
}


def journals(home: Home) -> list[str]:
    return [path.read_text() for path in (home.data / "runs").glob("*/1/shim-1.log")]


def in_turn(home: Home, go: Path) -> None:
    """Wait until every agent has named its session, and waits for `go`."""
    recorded = "SELECT count(*) FROM run WHERE session_value IS NOT NULL"
    until(lambda: home.rows(recorded) == [(len(RUNS),)], f"the agents wait for {go.name}")


@contextmanager
def writes_locked(home: Home) -> Iterator[None]:
    """Let the service commit nothing."""
    with home.store(writable=True) as store:
        store.execute("BEGIN IMMEDIATE")
        yield
        store.rollback()


def reasons(api: Api) -> dict[str, str]:
    return {run_id: api.get(run_id).recovery.recovery_reason for run_id in RUNS}


def test_results_and_questions_of_agents_that_ended_before_the_kill_are_found(
    new_home: NewHome, tmp_path: Path
) -> None:
    home, go = new_home(engines={"says": SAYS}, max_concurrent=len(RUNS)), tmp_path / "go"
    service, api = home.start()
    for run_id, given in RUNS.items():
        budget = {"max_tokens": 41} if run_id == "asks-in-vain" else {}
        api.create("says", {**given, "go": str(go)}, run_id=run_id, **budget)
    in_turn(home, go)
    with writes_locked(home):
        go.touch()
        until(
            lambda: all(
                "agent.exited" in text and "output.kept" in text for text in journals(home)
            ),
            "every agent has ended, and its output is kept",
        )
        page = api.recovery.PlanRecovery(recovery_pb.PlanRecoveryRequest(), timeout=10.0)
        service.kill()
    with home.store(writable=True) as store:
        store.execute("UPDATE run SET cancel_requested_at = 1 WHERE run_id = 'canceled'")
        store.commit()

    _, api = home.start()

    assert reasons(api) == EXPECTED
    planned = {one.run_id: one.recovery_reason for one in page.decisions}
    assert planned == EXPECTED | {"canceled": "result_found_in_output"}  # before its cancel
    counts = {one.rule: one.count for one in page.plan.decisions}
    assert counts == {
        "result_found_in_output": 2, "question_found_in_output": 1, "running_interrupted": 1,
        "budget_used_up": 1,
    }  # fmt: skip
    run = api.get("succeeds")
    assert (status_word(run), MessageToDict(run.output)) == ("SUCCEEDED", {"done": True})
    assert run.recovery.recovery_state == run_pb2.RECOVERY_STATE_SUCCEEDED_RECONCILED
    asks = api.get("asks")
    assert (status_word(asks), asks.pending_interaction.prompt) == ("WAITING_USER", "Ship?")
    assert (asks.usage.input_tokens, asks.usage.output_tokens) == (40, 1)
    api.reply("asks", 1, "yes")
    assert MessageToDict(api.until_status("asks", "SUCCEEDED").output) == {"reply": "yes"}
    assert status_word(api.get("fails")) == "FAILED"
    assert api.get("asks-in-vain").error.code == "BUDGET_EXCEEDED"
    assert explained(api, "succeeds") == {
        "RESULT": "The process had exited with 0. Its whole output was kept and has a result.",
        "QUESTION": "No question was found in completely kept output of a process that had exited"
        " with 0.",
    }


def explained(api: Api, run_id: str) -> dict[str, str]:
    request = recovery_pb.ExplainRecoveryRequest(run_id=run_id)
    (one,) = api.recovery.ExplainRecovery(request, timeout=10.0).explanations
    return {fact.name: fact.source for fact in one.facts if fact.name in {"RESULT", "QUESTION"}}
