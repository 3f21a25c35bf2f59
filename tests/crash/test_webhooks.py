"""Deliveries of webhooks over kills of the service: none is missing, and each run's are in order.

WEBHOOK_KILLS=20 WEBHOOK_RUNS=6 pytest tests/crash/test_webhooks.py for more.
"""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
from standardwebhooks import Webhook
from support.api import Api, status_word
from support.engines import GOOD_ENGINES, script
from support.service import Home
from support.waiting import until
from support.webhook_receiver import OK, SECRET, Received, Receiver, status

NewHome = Callable[..., Home]

KILLS: Final = int(os.environ.get("WEBHOOK_KILLS", "2"))
RUNS: Final = int(os.environ.get("WEBHOOK_RUNS", "3"))
EVENTS: Final = (
    "SELECT r.run_id, e.no, 'WAITING_USER' FROM run_event e JOIN run r ON r.id = e.run"
    " WHERE e.kind = 'ASKED'"
    " UNION ALL SELECT r.run_id, e.no, 'ENDED' FROM run_event e JOIN run r ON r.id = e.run"
    " WHERE e.kind IN ('SUCCEEDED', 'FAILED', 'CANCELED')"
    " UNION ALL SELECT r.run_id, e.sequence, 'RECOVERED'"
    " FROM recovery_event e JOIN run r ON r.id = e.run"
)
ASKS: Final = """
import json, sys
message = json.loads(sys.stdin.readline())
if message["type"] == "start":
    print(json.dumps({"type": "session", "value": "s"}), flush=True)
    print(json.dumps({"type": "ask", "kind": "open_text", "prompt": "?"}), flush=True)
else:
    print(json.dumps({"type": "result", "output": {}}), flush=True)
"""


class Unreliable:
    """Answers most requests, and otherwise fails, hangs or closes the connection."""

    def __init__(self, dice: random.Random) -> None:
        self.dice = dice

    def __call__(self, connection: socket.socket, request: Received) -> None:
        chance = self.dice.random()
        if chance < 0.15:
            status(503)(connection, request)
        elif chance < 0.2:
            connection.recv(1)  # until the service gives up
        elif chance < 0.9:
            connection.sendall(OK)


def assert_none_is_missing_and_order_is_kept(home: Home, receiver: Receiver) -> None:
    """Assert that every event of every run has arrived, first in order, and repeated by its id."""
    first: dict[str, tuple[str, int, str]] = {}
    for request in receiver.received:
        facts = Webhook(SECRET).verify(request.body, dict(request.headers))
        event = (facts["run_id"], facts["sequence"], facts["type"])
        assert first.setdefault(request.id, event) == event
    assert len(set(first.values())) == len(first)
    assert sorted(first.values()) == sorted(home.rows(EVENTS))
    for run_id in {run_id for run_id, *_ in first.values()}:
        sequences = [sequence for run, sequence, _ in first.values() if run == run_id]
        assert sequences == sorted(sequences)


def until_received(receiver: Receiver, count: int) -> None:
    """Wait until the receiver has had so many requests."""
    until(lambda: len(receiver.received) >= count, f"{count} requests")


def answer_all(api: Api, runs: list[str]) -> None:
    """Answer the questions that wait."""
    for run_id in runs:
        run = api.get(run_id)
        if status_word(run) == "WAITING_USER":
            api.reply(run_id, run.pending_interaction.interaction_id, "go on")


@pytest.mark.timeout(120 + 10 * KILLS)
def test_kills_of_the_service_lose_no_delivery_and_keep_the_order_of_each_run(
    new_home: NewHome, tmp_path: Path
) -> None:
    seed = int(os.environ.get("CAMPAIGN_SEED", time.time_ns()))
    print(f"CAMPAIGN_SEED={seed}")
    dice = random.Random(seed)  # noqa: S311 - moments, not secrets
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    with Receiver(Unreliable(dice)) as receiver:
        home = new_home(
            engines={**GOOD_ENGINES, "asks": script(ASKS)},
            webhooks=[
                {
                    "name": "chat",
                    "url": receiver.url,
                    "secret_file": str(secret),
                    "allow_private": ["127.0.0.1"],
                    "timeout_s": 0.5,
                }
            ],
        )
        runs: list[str] = []
        for number in range(KILLS):
            service, api = home.start()
            answer_all(api, runs)
            created = [f"run-{number}-{index}" for index in range(RUNS)]
            runs += [api.create("asks", run_id=run_id).run_id for run_id in created]
            until_received(receiver, len(receiver.received) + 1 + dice.randrange(RUNS))
            service.kill()
        _, api = home.start()
        answer_all(api, runs)
        still = {"SUCCEEDED", "FAILED", "WAITING_USER"}
        until(lambda: all(status_word(api.get(run)) in still for run in runs), "all is still")
        until(
            lambda: home.rows("SELECT count(*) FROM webhook_delivery") == [(0,)], "all has arrived"
        )

        assert_none_is_missing_and_order_is_kept(home, receiver)
        assert {word for (word,) in home.rows("SELECT DISTINCT status FROM run")} <= still
    log = home.logs()
    assert [word for word in (SECRET, "hidden", json.dumps(str(secret))) if word in log] == []
