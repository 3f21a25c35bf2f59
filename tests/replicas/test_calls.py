"""Callers reach every run through whichever service on the database answers them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import grpc
import pytest
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from support.api import Api, refused
from support.engines import GOOD_ENGINES, script
from support.service import Home

ASKS: Final = """
import json
input()
print(json.dumps({"type": "ask", "kind": "open_text", "prompt": "What?"}), flush=True)
answer = json.loads(input())["response"]
print(json.dumps({"type": "result", "output": {"answer": answer}}), flush=True)
"""
HOLDS: Final = "import time; input(); time.sleep(600)"
ENGINES: Final = {
    "resumable": GOOD_ENGINES["resumable"],
    "asks": script(ASKS, profile="sticky_process"),
    "holds": script(HOLDS),
}
QUESTION: Final = {"questions": [{"kind": "open_text", "prompt": "What?"}]}


@pytest.fixture
def services(postgresql_url: str, new_home: Callable[..., Home]) -> tuple[Api, Api]:
    """Two services on one database. Tests create runs at the first one."""
    owner, peer = (
        new_home(engines=ENGINES, database=postgresql_url, instance=name).start()[1]
        for name in ("owner", "peer")
    )
    return owner, peer


def test_replies_and_cancels_through_a_peer_reach_the_processes_of_the_owner(
    services: tuple[Api, Api],
) -> None:
    owner, peer = services
    sticky, resumable = owner.create("asks"), owner.create("resumable", QUESTION)
    held = owner.create("holds")
    for run in (sticky, resumable):
        owner.until_status(run.run_id, "WAITING_USER")
    owner.until_status(held.run_id, "RUNNING")

    peer.reply(sticky.run_id, 1, "blue")
    peer.reply(resumable.run_id, 1, "blue")
    peer.cancel(held.run_id)

    ended = [owner.until_ended(run.run_id).status for run in (sticky, resumable, held)]
    assert ended == [
        run_pb2.RUN_STATUS_SUCCEEDED,
        run_pb2.RUN_STATUS_SUCCEEDED,
        run_pb2.RUN_STATUS_CANCELED,
    ]
    assert dict(peer.get(sticky.run_id).output) == {"answer": "blue"}


def test_a_peer_names_the_instance_that_has_the_output(services: tuple[Api, Api]) -> None:
    owner, peer = services
    run = owner.create("resumable")
    owner.until_ended(run.run_id)
    assert owner.output(run.run_id)

    refusal = refused(lambda: peer.output(run.run_id))

    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.FAILED_PRECONDITION,
        "RUN_OF_ANOTHER_INSTANCE",
    )
    assert refusal.metadata == {"instance": "owner"}


def test_every_service_shows_all_instances(services: tuple[Api, Api]) -> None:
    owner, peer = services
    run = owner.create("asks")
    owner.until_status(run.run_id, "WAITING_USER")

    answers = [
        api.recovery.GetInstances(recovery_pb.GetInstancesRequest()) for api in (owner, peer)
    ]

    for answer in answers:
        seen = {
            one.name: (one.alive, sorted(one.engines), one.max_running, one.slots_held)
            for one in answer.instances
        }
        assert seen == {
            "owner": (True, ["asks", "holds", "resumable"], 4, 1),
            "peer": (True, ["asks", "holds", "resumable"], 4, 0),
        }


def test_an_idle_service_starts_what_a_busy_one_has_queued_and_gets_the_rest_at_its_stop(
    postgresql_url: str, new_home: Callable[..., Home]
) -> None:
    busy_home, idle_home = (
        new_home(engines=ENGINES, database=postgresql_url, instance=name, max_concurrent=1)
        for name in ("busy", "idle")
    )
    busy_service, busy = busy_home.start()
    held = busy.create("holds")
    busy.until_status(held.run_id, "RUNNING")
    _, idle = idle_home.start()

    taken = busy.create("resumable")
    assert busy.until_ended(taken.run_id).status == run_pb2.RUN_STATUS_SUCCEEDED

    held_there = idle.create("holds")  # now no service has a free slot
    idle.until_status(held_there.run_id, "RUNNING")
    queued = busy.create("resumable")
    assert busy_service.stop() == 0

    idle.cancel(held_there.run_id)
    assert idle.until_ended(queued.run_id).status == run_pb2.RUN_STATUS_SUCCEEDED
    assert idle.output(queued.run_id)
    assert idle.get(held.run_id).status == run_pb2.RUN_STATUS_FAILED
