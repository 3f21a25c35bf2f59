"""Webhooks get the events of each run in order, also when the owner of the run dies and returns."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from pathlib import Path

from replicas.dead_instance import Pair, deliver, until_blocked
from runrecovery_service.storage import takeover, webhook_outbox
from support.engines import GOOD_ENGINES
from support.service import Home
from support.stores import query
from support.waiting import until
from support.webhook_receiver import OK, SECRET, Received, Receiver, status

DELIVERIES = "SELECT run, sequence, instance FROM webhook_delivery ORDER BY run, sequence"


def never() -> bool:
    return False


def test_an_instance_that_returns_takes_the_deliveries_of_its_own_runs_back(pair: Pair) -> None:
    waiting, moved = pair.dead.waiting(), pair.dead.create()
    for sequence in (1, 2):
        deliver(pair, waiting, sequence)
    deliver(pair, moved, 1)
    pair.expire()
    pair.take_over()
    takeover.take_deliveries(pair.db, pair.owner, stopping=never)
    assert {instance for _, _, instance in pair.dead.rows(DELIVERIES)} == {"b"}

    pair.dead.restart()
    taken = webhook_outbox.take_back(pair.dead.db, pair.dead.owner, stopping=never, rows=1)

    assert taken == 2
    assert pair.dead.rows(DELIVERIES) == [
        (waiting.key, 1, "a"), (waiting.key, 2, "a"), (moved.key, 1, "b"),
    ]  # fmt: skip
    assert takeover.take_deliveries(pair.db, pair.owner, stopping=never) == 0


def test_an_instance_that_returns_waits_for_a_successor_that_takes_its_deliveries(
    pair: Pair,
) -> None:
    run = pair.dead.waiting()
    pair.expire()
    pair.take_over()
    deliver(pair, run, 1)

    def restart() -> None:
        pair.dead.restart()
        webhook_outbox.take_back(pair.dead.db, pair.dead.owner, stopping=never)
        pair.dead.db.close()

    thread = threading.Thread(target=restart)
    with pair.db.transaction():
        taken = takeover.take_deliveries(pair.db, pair.owner, stopping=never)
        thread.start()
        until_blocked(pair.db, thread)
    thread.join()

    assert taken == 1
    assert pair.dead.rows(DELIVERIES) == [(run.key, 1, "a")]


class RefusesQuestions:
    """Answers 503 to each WAITING_USER event until `answers_all`."""

    answers_all = False

    def __call__(self, connection: socket.socket, request: Received) -> None:
        if self.answers_all or request.facts["type"] != "WAITING_USER":
            connection.sendall(OK)
        else:
            status(503)(connection, request)


def test_a_run_that_ends_at_its_host_again_is_reported_after_what_its_successor_has_to_deliver(
    new_home: Callable[..., Home], postgresql_url: str, tmp_path: Path
) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)
    behave = RefusesQuestions()
    with Receiver(behave) as receiver:
        webhook = {
            "name": "chat",
            "url": receiver.url,
            "secret_file": str(secret),
            "allow_private": ["127.0.0.1"],
            "events": ["WAITING_USER", "ENDED"],
        }
        first, second = (
            new_home(
                database=postgresql_url,
                instance=name,
                engines=GOOD_ENGINES,
                lease_ttl_s=3.0,
                webhooks=[webhook],
            )
            for name in ("a", "b")
        )
        service, api = first.start()
        peer, _ = second.start()
        question = {"kind": "confirm", "prompt": "Shall I go on?"}
        api.create("resumable", {"questions": [question]}, run_id="asks")
        api.until_status("asks", "WAITING_USER")
        service.kill()
        peer.until_event("takeover.completed")

        _, again = first.start()
        again.reply("asks", 1, "yes")
        again.until_ended("asks")
        tries = len(receiver.received)
        until(lambda: len(receiver.received) > tries, "a try after the end of the run")
        behave.answers_all = True
        until(lambda: not query(first, DELIVERIES), "everything is delivered")

        types = [request.facts["type"] for request in receiver.received]
        assert set(types[:-1]) == {"WAITING_USER"}
        assert types[-1] == "ENDED"
