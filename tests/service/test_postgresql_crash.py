"""One service whose PostgreSQL server crashes, stays away for a while, and comes back."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest
from support.api import Refusal, refused
from support.engines import script
from support.service import Home
from support.waiting import until

from bench.postgres import crash, memory_place, run_postgres, start_again

ENDS_AT_GO = """
import json, os, time
task = json.loads(input())
while not os.path.exists(task["input"]["go"]):
    time.sleep(0.01)
print(json.dumps({"type": "result", "output": {"done": True}}), flush=True)
"""
LEASE_S = 60
"""The service gives up after 40 s. The test needs some 15 s of them."""


@pytest.mark.timeout(300)
def test_a_database_that_is_away_for_less_than_the_lease_costs_no_agent_and_no_run(
    new_home: Callable[..., Home],
) -> None:
    with run_postgres("fsync=off", place=memory_place()) as server:
        home = new_home(
            database=server.create("runs"),
            engines={"ends_at_go": script(ENDS_AT_GO)},
            max_concurrent=1,
            lease_ttl_s=LEASE_S,
        )
        service, api = home.start()
        go = str(home.path / "go")
        running, queued = (api.create("ends_at_go", {"go": go}) for _ in range(2))
        until(lambda: home.agents_of(running.run_id), "the agent lives")

        crash(server)
        until(lambda: api.health_of() == "NOT_SERVING", "health says that the database is away")

        unavailable = (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE")
        calls: tuple[Callable[[], object], ...] = (
            lambda: api.get(running.run_id),
            lambda: api.get("no-such-run"),
            lambda: api.cancel(queued.run_id),
            lambda: api.create("ends_at_go", {"go": go}),
        )
        assert [_answer(refused(call)) for call in calls] == [unavailable] * len(calls)
        assert home.agents_of(running.run_id)
        (home.path / "go").touch()
        until(lambda: not home.agents_of(running.run_id), "the agent has ended")

        with start_again(server, "fsync=off"):
            for run in (running, queued):
                assert api.until_status(run.run_id, "SUCCEEDED").attempt == 1
            until(lambda: api.health_of() == "SERVING", "health says that the database is back")
            assert service.stop() == 0


def _answer(refusal: Refusal) -> tuple[grpc.StatusCode, str]:
    return refusal.code, refusal.reason
