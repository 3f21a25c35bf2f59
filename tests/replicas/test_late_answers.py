"""The answer to the COMMIT of a turn's end is late: meanwhile its run goes on to the next turn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from support.api import status_word
from support.engines import GOOD_ENGINES
from support.pg_proxy import proxied
from support.service import Home
from support.stores import query
from support.waiting import until

QUESTION: Final = {"questions": [{"kind": "confirm", "prompt": "Shall I go on?"}]}
END_OF_TURN: Final = "INSERT INTO interaction"
LAUNCHES: Final = (
    "SELECT l.instance, l.attempt, l.turn, l.state FROM process_lease l"
    " JOIN run r ON r.id = l.run WHERE r.run_id = 'asks' ORDER BY l.id"
)
EVENTS: Final = (
    "SELECT e.kind FROM run_event e JOIN run r ON r.id = e.run WHERE r.run_id = 'asks'"
    " ORDER BY e.no"
)
ONE_OF_EACH: Final = [
    ("STARTED",), ("ASKED",), ("ANSWERED",), ("STARTED",), ("SUCCEEDED",)
]  # fmt: skip


def test_a_run_whose_end_of_a_turn_was_committed_unheard_is_answered_and_continued_once(
    new_home: Callable[..., Home], postgresql_url: str
) -> None:
    with proxied(postgresql_url) as proxy:
        home = new_home(database=proxy.url, engines=GOOD_ENGINES)
        service, api = home.start()
        proxy.stall_answer_after(END_OF_TURN)
        api.create("resumable", QUESTION, run_id="asks")
        api.until_status("asks", "WAITING_USER")
        assert proxy.lost.is_set()

        api.reply("asks", 1, "yes")
        other = api.create("resumable").run_id  # behind it in the queue
        assert status_word(api.until_ended(other)) == "SUCCEEDED"
        assert status_word(api.get("asks")) == "QUEUED"
        proxy.cut()

        until(lambda: ("SUCCEEDED",) in query(home, EVENTS), "the run has ended")
        assert query(home, EVENTS) == ONE_OF_EACH
        assert query(home, LAUNCHES) == [
            ("default", 1, 1, "CLOSED"), ("default", 1, 2, "CLOSED")
        ]  # fmt: skip
        assert service.stop() == 0


def test_a_peer_may_continue_a_run_whose_end_of_a_turn_its_owner_has_not_heard_of(
    new_home: Callable[..., Home], postgresql_url: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {
        "engines": GOOD_ENGINES,
        "shared_workspaces": True,
        "runs_dir": str(tmp_path / "volume"),
    }
    with proxied(postgresql_url) as proxy:
        owner = new_home(database=proxy.url, instance="a", **settings)
        service, api = owner.start()
        proxy.stall_answer_after(END_OF_TURN)
        api.create("resumable", QUESTION, run_id="asks")
        api.until_status("asks", "WAITING_USER")
        assert proxy.lost.is_set()
        peer = new_home(database=postgresql_url, instance="b", **settings)
        _, through_peer = peer.start()

        through_peer.reply("asks", 1, "yes")
        assert status_word(through_peer.until_ended("asks")) == "SUCCEEDED"
        proxy.cut()

        service.until_event("execution.turn_ended")
        assert query(peer, EVENTS) == ONE_OF_EACH
        assert query(peer, LAUNCHES) == [("a", 1, 1, "CLOSED"), ("b", 1, 2, "CLOSED")]
        assert service.stop() == 0
