"""Real replicas on one PostgreSQL: one is killed or frozen, and its peer goes on with its runs."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2
from support.api import CALL_TIMEOUT_S, Api, status_word
from support.engines import GOOD_ENGINES, script
from support.owner_history import HISTORY, OVERLAPPING, STALE_WRITES
from support.service import Home
from support.stores import change, query
from support.waiting import until

NewHome = Callable[..., Home]

REQUEUE: Final = run_pb2.RESTART_POLICY_REQUEUE
QUESTION: Final = {"kind": "confirm", "prompt": "Shall I go on?"}
ENGINES: Final = {
    **GOOD_ENGINES,
    "works": script("import sys, time; sys.stdin.readline(); time.sleep(600)"),
}
TTL_S: Final = 3.0
LAUNCHES: Final = (
    "SELECT l.attempt, l.instance, l.state, l.closed_at FROM process_lease l"
    " JOIN run r ON r.id = l.run WHERE r.run_id = ? ORDER BY l.id"
)


GIVEN_AWAY: Final = (
    "SELECT 1 FROM run WHERE run_id = ?"
    " AND updated_at + 1000000 < extract(epoch FROM clock_timestamp()) * 1000000"
)


def keep_history(home: Home) -> None:
    """Record every change of a run from now on."""
    for statement in HISTORY:
        change(home, statement)


@pytest.fixture
def new_replica(new_home: NewHome, postgresql_url: str) -> Callable[..., Home]:
    """Make homes of replicas on one database."""

    def make(name: str, **settings: Any) -> Home:
        return new_home(
            database=postgresql_url,
            instance=name,
            engines=ENGINES,
            lease_ttl_s=TTL_S,
            log_level="debug",
            **settings,
        )

    return make


def report_of(api: Api) -> recovery_pb2.Reconciliation:
    """Return the latest report."""
    (latest,) = api.recovery.ListReconciliations(
        recovery_service_pb2.ListReconciliationsRequest(page_size=1), timeout=CALL_TIMEOUT_S
    ).reconciliations
    return latest


def until_working(home: Home, run_id: str) -> None:
    """Wait for the agent of a run."""
    until(lambda: home.agents_of(run_id), "the agent runs")


def start_two(new_replica: Callable[..., Home], **settings: Any) -> tuple[Any, ...]:
    """Start two replicas, and record what happens to runs."""
    first, second = new_replica("a", **settings), new_replica("b", **settings)
    service, api = first.start()
    keep_history(first)
    return first, service, api, second, *second.start()


def test_a_peer_goes_on_with_the_runs_of_a_killed_replica_which_finds_its_own_again(
    new_replica: Callable[..., Home],
) -> None:
    first, service, api, second, peer, through_peer = start_two(new_replica)
    api.create("works", run_id="works", restart_policy=REQUEUE)
    api.create("resumable", {"questions": [QUESTION]}, run_id="asks")
    until_working(first, "works")
    api.until_status("asks", "WAITING_USER")

    service.kill()

    assert peer.until_event("takeover.completed")["recovered_instance"] == "a"
    until_working(second, "works")
    report = report_of(through_peer)
    assert (report.trigger, report.instance, report.recovered_instance) == (
        recovery_pb2.RECONCILIATION_TRIGGER_TAKEOVER, "b", "a",
    )  # fmt: skip
    assert {count.rule: count.count for count in report.decisions} == {
        "requeued": 1, "waiting_for_its_host": 1,
    }  # fmt: skip
    assert [row[:3] for row in query(first, LAUNCHES, "works")] == [
        (1, "a", "CLOSED"), (2, "b", "RUNNING"),
    ]  # fmt: skip
    _, again = first.start()
    again.reply("asks", 1, "yes")
    assert status_word(again.until_ended("asks")) == "SUCCEEDED"
    assert status_word(again.get("works")) == "RUNNING"
    assert query(first, STALE_WRITES) == []
    assert query(first, OVERLAPPING) == []
    assert peer.popen.poll() is None


def test_a_frozen_replica_that_wakes_up_after_its_lease_writes_nothing_and_exits_with_10(
    new_replica: Callable[..., Home],
) -> None:
    first, service, api, second, peer, _ = start_two(new_replica)
    api.create("works", run_id="works", restart_policy=REQUEUE)
    until_working(first, "works")

    service.popen.send_signal(signal.SIGSTOP)
    peer.until_event("takeover.completed")
    until_working(second, "works")
    before = query(first, "SELECT run_id, owner, owner_epoch, status, version FROM run")
    service.popen.send_signal(signal.SIGCONT)

    assert service.exit_code() == 10
    assert query(first, "SELECT run_id, owner, owner_epoch, status, version FROM run") == before
    assert query(first, STALE_WRITES) == []
    assert query(first, OVERLAPPING) == []
    assert first.agents_of("works") == []


def test_with_shared_workspaces_a_peer_answers_for_the_waiting_runs_of_a_killed_replica(
    new_replica: Callable[..., Home], tmp_path: Any
) -> None:
    settings = {"shared_workspaces": True, "runs_dir": str(tmp_path / "volume")}
    first, service, api, _, peer, through_peer = start_two(new_replica, **settings)
    api.create("resumable", {"questions": [QUESTION]}, run_id="asks")
    api.until_status("asks", "WAITING_USER")

    service.kill()
    peer.until_event("takeover.completed")
    through_peer.reply("asks", 1, "yes")

    assert status_word(through_peer.until_ended("asks")) == "SUCCEEDED"
    assert [row[:2] for row in query(first, LAUNCHES, "asks")] == [(1, "a"), (1, "b")]
    assert query(first, STALE_WRITES) == []


def test_a_planned_stop_hands_its_queue_and_its_waiting_runs_over_without_waiting_for_a_lease(
    new_home: NewHome, postgresql_url: str, tmp_path: Path
) -> None:
    first, second = (
        new_home(
            database=postgresql_url,
            instance=name,
            engines=ENGINES,
            max_concurrent=1,
            lease_ttl_s=600.0,  # a takeover would come too late for this test
            shared_workspaces=True,
            runs_dir=str(tmp_path / "volume"),
        )
        for name in ("a", "b")
    )
    service, api = first.start()
    api.create("resumable", {"questions": [QUESTION]}, run_id="asks")
    api.until_status("asks", "WAITING_USER")
    _, through_peer = second.start()
    for replica, held in ((api, "held-a"), (through_peer, "held-b")):
        replica.create("works", run_id=held, restart_policy=REQUEUE)
        replica.until_status(held, "RUNNING")
    api.create("resumable", run_id="queued")
    through_peer.create("resumable", run_id="of-the-peer")  # no service has a free slot
    until(lambda: query(first, GIVEN_AWAY, "of-the-peer"), "an idle service would take it")
    through_peer.reply("asks", 1, "yes")  # queued at its owner: no service has a free slot

    assert service.stop() == 0

    owners = query(first, "SELECT run_id, owner, status FROM run ORDER BY run_id")
    assert owners == [
        ("asks", "b", "QUEUED"), ("held-a", "b", "QUEUED"),
        ("held-b", "b", "RUNNING"), ("of-the-peer", "b", "QUEUED"), ("queued", "b", "QUEUED"),
    ]  # fmt: skip
    through_peer.cancel("held-b")
    through_peer.until_status("held-a", "RUNNING")  # a run keeps its place in the queue
    through_peer.cancel("held-a")
    assert status_word(through_peer.until_ended("queued")) == "SUCCEEDED"
    assert status_word(through_peer.until_ended("asks")) == "SUCCEEDED"
    assert query(first, OVERLAPPING) == []
