"""Behind PgBouncer another server takes the place of the primary; the service stays connected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import grpc
import psycopg
import pytest
from service.test_postgresql_standby import (
    HOLDS,
    causes,
    has_run,
    outcome_of_create,
    promote,
    stop_receiving,
)
from support.api import refusal_of
from support.engines import script
from support.pg_proxy import Proxy, proxied
from support.pgbouncer import PROGRAM, pooled, set_what_is_needed
from support.service import Home
from support.waiting import until

from bench.postgres import ScratchPostgres, memory_place, run_postgres, run_standby

pytestmark = [
    pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed"),
    pytest.mark.timeout(300),
]
SETTINGS = {"pool_mode": "transaction", "ignore_startup_parameters": "options"}


def replace_server(proxy: Proxy, server: ScratchPostgres) -> None:
    """Let PgBouncer connect to another server. The service's connections to PgBouncer stay."""
    proxy.direct_to(server.url("runs"))


@pytest.mark.parametrize("lost", [0, 64])
def test_a_promoted_server_behind_a_pooler_is_used_unless_it_lacks_acknowledged_commits(
    new_home: Callable[..., Home], tmp_path: Path, lost: int
) -> None:
    with (
        run_postgres("fsync=off", place=memory_place()) as primary,
        run_standby(primary, "fsync=off") as standby,
        proxied(primary.create("runs")) as proxy,
    ):
        set_what_is_needed(primary.url("runs"))
        with pooled(proxy.url, tmp_path, **SETTINGS) as url:
            home = new_home(
                database=url, engines={"holds": script(HOLDS)}, max_concurrent=1, lease_ttl_s=600
            )
            service, api = home.start()
            kept = api.create("holds").run_id
            until(lambda: home.agents_of(kept), "the agent lives")
            kept = api.create("holds").run_id
            until(lambda: has_run(standby, kept), "the standby has both runs")
            stop_receiving(standby)
            for _ in range(lost):
                api.create("holds")

            promote(standby)
            replace_server(proxy, standby)

            outcome = until(lambda: outcome_of_create(api), "the promoted server answers")
            if lost:
                assert outcome == "SHUTTING_DOWN"
                assert service.exit_code() == 10
                assert len(service.events("storage.commits_lost")) == 1
                until(lambda: not home.agents(), "no agent lives")
            else:
                assert outcome == "created"
                assert len(service.events("storage.failover")) == 1
                assert service.stop() == 0


def test_a_standby_behind_a_pooler_answers_no_call_and_renews_no_lease(
    new_home: Callable[..., Home], tmp_path: Path
) -> None:
    with (
        run_postgres("fsync=off", place=memory_place()) as primary,
        run_standby(primary, "fsync=off") as standby,
        proxied(primary.create("runs")) as proxy,
    ):
        set_what_is_needed(primary.url("runs"))
        with pooled(proxy.url, tmp_path, **SETTINGS) as url:
            home = new_home(
                database=url, engines={"holds": script(HOLDS)}, max_concurrent=1, lease_ttl_s=15
            )
            service, api = home.start()
            until(lambda: has_run(standby, api.create("holds").run_id), "the standby follows")
            stop_receiving(standby)
            run_id = api.create("holds").run_id  # the standby does not have it

            replace_server(proxy, standby)
            answers: list[str] = []

            def has_ended() -> bool:
                try:
                    api.get(run_id)
                except grpc.RpcError as error:
                    answers.append(refusal_of(error).reason)
                return service.popen.poll() is not None

            until(has_ended, "the service ends")

            assert service.exit_code() == 10
            assert any("read-only" in cause for cause in causes(service))
            assert "RUN_NOT_FOUND" not in answers
            with psycopg.connect(standby.url("runs")) as connection:
                assert connection.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
