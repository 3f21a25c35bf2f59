"""Replicas behind PgBouncer in transaction mode, which has neither start-up options nor LISTEN."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import status_word
from support.engines import GOOD_ENGINES, script
from support.owner_history import HISTORY, STALE_WRITES
from support.pgbouncer import PROGRAM, pooled, set_what_is_needed
from support.service import Home
from support.stores import Rows, change, query
from support.waiting import patience_s, until

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed")

QUESTIONS = 4
ASKS = f"""
import json
input()
for number in range({QUESTIONS}):
    print(json.dumps({{"type": "ask", "kind": "open_text", "prompt": "What?"}}), flush=True)
    input()
print(json.dumps({{"type": "result", "output": {{}}}}), flush=True)
"""
ENGINES = {
    **GOOD_ENGINES,
    "asks": script(ASKS, profile="sticky_process"),
    "works": script("import time; input(); time.sleep(600)"),
}
QUESTION = {"kind": "confirm", "prompt": "Shall I go on?"}


def launches(home: Home, run_id: str) -> Rows:
    """Return the instance and the state of each launch of a run."""
    return query(
        home,
        "SELECT l.instance, l.state FROM process_lease l JOIN run r ON r.id = l.run"
        " WHERE r.run_id = ? ORDER BY l.id",
        run_id,
    )


@pytest.mark.parametrize("is_direct", [False, True], ids=["pooled", "direct"])
def test_a_peer_takes_over_a_killed_replica_and_replies_arrive(
    new_home: Callable[..., Home], postgresql_url: str, tmp_path: Path, *, is_direct: bool
) -> None:
    set_what_is_needed(postgresql_url)
    settings = {"pool_mode": "transaction", "ignore_startup_parameters": "options"}
    with pooled(postgresql_url, tmp_path, **settings) as url:
        first, second = (
            new_home(
                database=url,
                database_direct=postgresql_url if is_direct else "",
                instance=name,
                engines=ENGINES,
                lease_ttl_s=3.0,
                shared_workspaces=True,
                runs_dir=str(tmp_path / "volume"),
            )
            for name in ("a", "b")
        )
        service, api = first.start()
        for statement in HISTORY:
            change(first, statement)
        peer, through_peer = second.start()
        work = api.create("works", run_id="works", restart_policy=run_pb2.RESTART_POLICY_REQUEUE)
        asked = api.create("resumable", {"questions": [QUESTION, QUESTION]}, run_id="asks")
        until(lambda: launches(first, work.run_id) == [("a", "RUNNING")], "the agent runs")
        api.until_status(asked.run_id, "WAITING_USER")
        through_peer.reply(asked.run_id, 1, "yes")  # the owner is the other replica
        until(
            lambda: api.get(asked.run_id).pending_interaction.interaction_id == 2,
            "the owner asks its second question",
        )

        service.kill()

        assert peer.until_event("takeover.completed")["recovered_instance"] == "a"
        until(
            lambda: launches(first, work.run_id) == [("a", "CLOSED"), ("b", "RUNNING")],
            "the agent runs at the peer",
        )
        through_peer.reply(asked.run_id, 2, "yes")
        assert status_word(through_peer.until_ended(asked.run_id)) == "SUCCEEDED"
        assert query(first, STALE_WRITES) == []
        assert peer.stop() == 0


def test_without_listen_calls_reach_the_owner_and_watchers_at_a_peer_by_polls(
    new_home: Callable[..., Home], postgresql_url: str, tmp_path: Path
) -> None:
    set_what_is_needed(postgresql_url)
    settings = {"pool_mode": "transaction", "ignore_startup_parameters": "options"}
    with pooled(postgresql_url, tmp_path, **settings) as url:
        owner, peer = (
            new_home(database=url, instance=name, engines=ENGINES).start()[1]
            for name in ("owner", "peer")
        )
        asked, held = owner.create("asks"), owner.create("works")
        owner.until_status(held.run_id, "RUNNING")
        # Without polls each event would arrive with the next bookmark, after 15 s, and be too late.
        since_create = pb.WatchRunRequest(run_id=asked.run_id, after_sequence=1)
        watch = peer.runs.WatchRun(since_create, timeout=patience_s())

        peer.cancel(held.run_id)
        answered = 0
        for answer in watch:
            if answer.event.kind == run_pb2.RUN_EVENT_KIND_ASKED:
                answered = answer.event.interaction_id
                owner.reply(asked.run_id, answered, "blue")  # not through the watching service
            last = answer.event

        assert (answered, last.status) == (QUESTIONS, run_pb2.RUN_STATUS_SUCCEEDED)
        assert status_word(owner.until_ended(held.run_id)) == "CANCELED"
