"""After the database lost commits, callers of a lost run see nothing of the run with its key."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Final

import grpc
import pytest
from runrecovery.v1 import run_service_pb2 as pb
from support.api import CALL_TIMEOUT_S, refused
from support.engines import script
from support.processes import living_process, send_signal
from support.service import Home
from support.stores import change, query
from support.waiting import until

NewHome = Callable[..., Home]

WORKS: Final = "import sys, time; sys.stdin.readline(); time.sleep(600)"
ENGINES: Final = {"works": script(WORKS)}
ROWS: Final = "SELECT run_id, status, error_code, version FROM run ORDER BY id"


def test_a_watch_of_a_lost_run_ends_and_sends_nothing_of_another_run(
    new_database_url: Callable[[], str], new_home: NewHome
) -> None:
    home = new_home(database=new_database_url(), engines=ENGINES, max_concurrent=1)
    _, api = home.start()
    api.create("works", run_id="holds-the-slot")
    until(lambda: home.agents_of("holds-the-slot"), "the agent runs")
    api.create("works", run_id="lost")
    watch = api.runs.WatchRun(pb.WatchRunRequest(run_id="lost"), timeout=CALL_TIMEOUT_S)
    assert next(iter(watch)).snapshot.run_id == "lost"

    change(home, "UPDATE run SET run_id = 'of-another-caller' WHERE run_id = 'lost'")
    api.cancel("of-another-caller")

    refusal = refused(lambda: list(watch))
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND")


def test_a_service_whose_run_was_lost_ends_as_fenced_and_says_why(
    new_database_url: Callable[[], str], new_home: NewHome
) -> None:
    home = new_home(database=new_database_url(), engines=ENGINES)
    service, api = home.start()
    api.create("works", run_id="lost")
    (pid,) = until(lambda: home.agents_of("lost"), "the agent runs")
    agent = living_process(pid)
    assert agent is not None
    change(home, "UPDATE run SET run_id = 'of-another-caller'")
    before = query(home, ROWS)

    send_signal(agent, signal.SIGTERM)

    assert service.exit_code() == 10
    assert "the database no longer has run 'lost'; it lost a commit" in service.text
    assert before == query(home, ROWS)


@pytest.mark.parametrize("lost", ["UPDATE {} SET epoch = 1", "DELETE FROM {}"])
def test_a_service_whose_claim_was_lost_ends_as_fenced_and_names_no_other_service(
    new_database_url: Callable[[], str], new_home: NewHome, lost: str
) -> None:
    home = new_home(database=new_database_url(), engines=ENGINES, lease_ttl_s=3)
    assert home.start()[0].stop() == 0
    service, _ = home.start()

    for table in ("instance_epoch", "instance"):
        change(home, lost.format(table))

    assert service.exit_code() == 10
    assert (
        "error: the database no longer has this start's claim of instance 'default'\n"
        "hint: no newer start is known; start again, and the recorded runs are recovered\n"
    ) in service.text
    service, _ = home.start()
    assert service.stop() == 0
