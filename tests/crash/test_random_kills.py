"""Acknowledged calls survive kills at random moments while clients work.

CAMPAIGN_ROUNDS=200 pytest tests/crash/test_random_kills.py for more.
"""

from __future__ import annotations

import os
import random
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import pytest
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, status_word
from support.engines import GOOD_ENGINES, script
from support.service import Home
from support.waiting import until

NewHome = Callable[..., Home]

ROUNDS: Final = int(os.environ.get("CAMPAIGN_ROUNDS", "10"))
WORKERS: Final = 3
SLOTS: Final = 3
ENDED: Final = {"SUCCEEDED", "FAILED", "CANCELED"}
# Quick to start and to end, so that a round sees many changes of state.
QUICK: Final = """
import json, signal, sys, time
message = json.loads(sys.stdin.readline())
say = lambda **fields: print(json.dumps(fields), flush=True)
if message["input"].get("stubborn"):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
reply = message.get("interrupted", message).get("reply")
if message["input"].get("asks") and reply is None:
    say(type="session", value="s")
    say(type="ask", kind="open_text", prompt="?")
else:
    answer = reply and reply["response"]
    say(type="result", output={"answer": answer, "attempt": message["attempt"]})
"""


@dataclass(slots=True)
class Acknowledged:
    """The calls that the service has acknowledged."""

    created: dict[str, bool] = field(default_factory=dict)
    """Run ids, and whether the run asks."""
    replied: dict[str, str] = field(default_factory=dict)
    canceled: set[str] = field(default_factory=set)


class Worker(threading.Thread):
    """A client that creates, answers and cancels runs until its service is gone."""

    def __init__(self, address: str, known: Acknowledged, seed: int) -> None:
        super().__init__(daemon=True)
        self._address = address
        self._known = known
        self._dice = random.Random(seed)  # noqa: S311 - choices, not secrets
        self.broken: BaseException | None = None

    def run(self) -> None:
        try:
            with Api(self._address, timeout_s=5.0) as api:
                self._work(api)
        except grpc.RpcError as error:
            code: Any = error
            if code.code() is not grpc.StatusCode.UNAVAILABLE:
                self.broken = error
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            self.broken = error

    def _work(self, api: Api) -> None:
        while True:
            if self._dice.random() < 0.2:
                self._cancel_a_stubborn_one(api)
            asks = self._dice.random() < 0.6
            run_id = f"c-{uuid.uuid4()}"
            policy = self._dice.choice(list(run_pb2.RestartPolicy.values()))
            api.create("quick", {"asks": asks}, run_id=run_id, restart_policy=policy)
            self._known.created[run_id] = asks
            choice = self._dice.random()
            if choice < 0.25:
                self._cancel(api, run_id)
            elif asks and choice < 0.8:
                self._reply(api, run_id)

    def _cancel_a_stubborn_one(self, api: Api) -> None:
        """Cancel a run whose process takes its time to end, so that a kill comes in between."""
        run_id = f"c-{uuid.uuid4()}"
        api.create("quick", {"stubborn": True}, run_id=run_id)
        self._known.created[run_id] = False
        until(lambda: status_word(api.get(run_id)) == "RUNNING", "it runs")
        self._cancel(api, run_id)

    def _cancel(self, api: Api, run_id: str) -> None:
        try:
            api.cancel(run_id)
        except grpc.RpcError as error:
            code: Any = error
            if code.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise
        else:
            self._known.canceled.add(run_id)

    def _reply(self, api: Api, run_id: str) -> None:
        run = until(lambda: self._waiting_or_over(api, run_id), "it waits")
        if run is not None and status_word(run) == "WAITING_USER":
            answer = uuid.uuid4().hex
            api.reply(run_id, 1, answer)
            self._known.replied[run_id] = answer

    def _waiting_or_over(self, api: Api, run_id: str) -> run_pb2.Run | None:
        run = api.get(run_id)
        return run if status_word(run) in {"WAITING_USER", *ENDED} else None


def play(home: Home, known: Acknowledged, dice: random.Random) -> None:
    """Start the service, let clients work, and kill it at a random moment."""
    service, _ = home.start()
    workers = [Worker(service.address, known, dice.getrandbits(64)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    ends = time.monotonic() + dice.uniform(0.02, 0.6)
    until(lambda: time.monotonic() >= ends, "the moment has come")
    service.kill()
    for worker in workers:
        worker.join(timeout=10)
        assert not worker.is_alive()
        if worker.broken is not None:
            raise worker.broken


def pages(api: Api) -> list[run_pb2.Run]:
    """Return all runs."""
    found: list[run_pb2.Run] = []
    token = ""
    while True:
        request = pb.ListRunsRequest(page_size=1000, page_token=token)
        answer = api.runs.ListRuns(request, timeout=10)
        found += answer.runs
        token = answer.next_page_token
        if not token:
            return found


def assert_all_survived(home: Home, api: Api, known: Acknowledged) -> None:
    """Assert that every acknowledged call has its effect in the store."""
    runs = {run.run_id: run for run in pages(api)}
    assert known.created.keys() <= runs.keys()
    for run_id in known.canceled:
        assert status_word(runs[run_id]) == "CANCELED", runs[run_id]
    answers = dict(
        home.rows(
            "SELECT r.run_id, i.response FROM interaction i JOIN run r ON r.id = i.run"
            " WHERE i.replied_at IS NOT NULL"
        )
    )
    for run_id, answer in known.replied.items():
        assert answers[run_id] == f'"{answer}"'
        run = runs[run_id]
        # One that was killed after its reply was delivered may have started from the beginning.
        assert status_word(run) in ENDED or run.attempt > 1
        if status_word(run) == "SUCCEEDED" and run.attempt == 1:
            assert run.output["answer"] == answer
    for run in runs.values():
        history = api.recovery_info(run.run_id).history if run.recovery.recovery_count else []
        assert len(history) == run.recovery.recovery_count
        assert not (run.holds_slot and status_word(run) in ENDED)


@pytest.mark.timeout(120 + 5 * ROUNDS)
def test_every_acknowledged_call_survives_any_number_of_kills(new_home: NewHome) -> None:
    home = new_home(
        engines={**GOOD_ENGINES, "quick": script(QUICK, resumes_interrupted=True)},
        max_concurrent=SLOTS,
        cancel_grace_s=0.3,
    )
    seed = int(os.environ.get("CAMPAIGN_SEED", time.time_ns()))
    print(f"CAMPAIGN_SEED={seed}")
    dice, known = random.Random(seed), Acknowledged()  # noqa: S311 - moments, not secrets

    for _ in range(ROUNDS):
        play(home, known, dice)
    _, api = home.start()
    until(lambda: not {"QUEUED", "RUNNING"} & {status_word(r) for r in pages(api)}, "all is still")

    assert len(known.created) > ROUNDS
    assert known.canceled
    assert_all_survived(home, api, known)
    until(lambda: home.agents() == [], "no agent lives", timeout_s=1.0)
    open_leases = home.rows("SELECT count(*) FROM process_lease WHERE state <> 'CLOSED'")
    assert open_leases == [(0,)]
    held = [api.create("resumable", {"hold": True}) for _ in range(SLOTS + 1)]
    until(lambda: len(home.agents()) == SLOTS, "every slot can be had")
    assert status_word(api.get(held[-1].run_id)) == "QUEUED"
    for run in held:
        with suppress(grpc.RpcError):
            api.cancel(run.run_id)
