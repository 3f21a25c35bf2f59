"""PostgreSQL's primary fails, and its standby answers in its place: read-only, then promoted."""

from __future__ import annotations

import json
from collections.abc import Callable

import grpc
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict
from runrecovery.v1 import run_pb2
from support.api import Api, refusal_of, refused
from support.engines import script
from support.pg_proxy import proxied
from support.service import Home, ServiceProcess
from support.service_forker import run_command
from support.stores import query
from support.waiting import until

from bench.postgres import ScratchPostgres, memory_place, run_postgres, run_standby

READ_ONLY = "it is a standby, or default_transaction_read_only is set"
HOLDS = "import time; input(); time.sleep(600)"


def assert_refused(home: Home, place: str) -> None:
    """Check that a start and `check` say that the database is read-only."""
    sentence = (
        "the PostgreSQL database: is read-only (connection failed: connection to server"
        f" {place} failed: session is read-only); {READ_ONLY}\n"
    )

    service = home.spawn()
    checked = run_command("check", "--config", home.config, cwd=home.path)

    assert service.exit_code() == 6, service.text
    assert service.text == f"error: {sentence}"
    assert (checked.returncode, checked.stdout, checked.stderr) == (1, sentence, "")


def test_a_database_that_can_only_be_read_is_exit_6(
    new_home: Callable[..., Home], postgresql_url: str
) -> None:
    named = conninfo_to_dict(postgresql_url)
    with psycopg.connect(postgresql_url, autocommit=True) as server:
        setting = f"ALTER DATABASE {named['dbname']} SET default_transaction_read_only = on"
        server.execute(setting.encode())

    assert_refused(new_home(database=postgresql_url), f'on socket "{named["host"]}/.s.PGSQL.5432"')


def causes(service: ServiceProcess) -> set[str]:
    """Return why the lease was not renewed, as the log has it."""
    return {str(event.get("cause")) for event in service.events("service.lease_not_renewed")}


def has_run(server: ScratchPostgres, run_id: str) -> bool:
    """Return whether the server has a run."""
    with psycopg.connect(server.url("runs")) as connection:
        found = connection.execute("SELECT 1 FROM run WHERE run_id = %s", (run_id,)).fetchone()
    return found is not None


@pytest.mark.timeout(300)
def test_a_failover_to_a_standby_ends_the_service_and_loses_no_run(
    new_home: Callable[..., Home],
) -> None:
    with (
        run_postgres("fsync=off", place=memory_place()) as primary,
        run_standby(primary, "fsync=off") as standby,
        proxied(primary.create("runs")) as proxy,
    ):
        home = new_home(
            database=proxy.url, engines={"holds": script(HOLDS)}, max_concurrent=1, lease_ttl_s=9
        )
        service, api = home.start()
        running = api.create("holds")
        queued = api.create("holds", restart_policy=run_pb2.RESTART_POLICY_REQUEUE)
        api.until_status(running.run_id, "RUNNING")
        until(lambda: has_run(standby, queued.run_id), "the standby has both runs")

        proxy.direct_to(standby.url("runs"))
        until(lambda: api.health_of() == "NOT_SERVING", "health says that the database fails")

        assert service.exit_code() == 10
        assert f"the database is read-only; {READ_ONLY}" in causes(service)
        until(lambda: not home.agents(), "no agent lives")
        address = conninfo_to_dict(proxy.url)
        assert_refused(home, f'at "{address["host"]}", port {address["port"]}')

        with psycopg.connect(standby.url("runs"), autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")
        service, api = home.start()
        interrupted = api.get(running.run_id)
        assert interrupted.error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
        api.until_status(queued.run_id, "RUNNING")
        assert service.stop() == 0


def stop_receiving(standby: ScratchPostgres) -> None:
    """Let a standby get nothing more of its primary."""
    with psycopg.connect(standby.url("runs"), autocommit=True) as connection:
        connection.execute("ALTER SYSTEM SET primary_conninfo = ''")
        connection.execute("SELECT pg_reload_conf()")
        receivers = "SELECT count(*) FROM pg_stat_wal_receiver"
        until(lambda: connection.execute(receivers).fetchone() == (0,), "the standby is cut off")


def outcome_of_create(api: Api) -> str | None:
    """Create a run; return "created", or why not; None while connections are the old ones."""
    try:
        api.create("holds")
    except grpc.RpcError as error:
        reason = refusal_of(error).reason
        return None if reason == "STORAGE_UNAVAILABLE" else reason
    return "created"


def status_if_answered(api: Api, run_id: str) -> int | None:
    """Return the status of a run; None while a call meets a connection to the old server."""
    try:
        return api.get(run_id).status
    except grpc.RpcError as error:
        if refusal_of(error).reason != "STORAGE_UNAVAILABLE":
            raise
        return None


@pytest.mark.timeout(300)
@pytest.mark.parametrize("lost", [0, 64])
def test_a_promoted_standby_is_used_unless_it_lacks_acknowledged_commits(
    new_home: Callable[..., Home], lost: int
) -> None:
    with (
        run_postgres("fsync=off", place=memory_place()) as primary,
        run_standby(primary, "fsync=off") as standby,
        proxied(primary.create("runs")) as proxy,
    ):
        home = new_home(
            database=proxy.url, engines={"holds": script(HOLDS)}, max_concurrent=1, lease_ttl_s=600
        )
        service, api = home.start()
        running = api.create("holds")
        until(lambda: home.agents_of(running.run_id), "the agent lives, and its launch is recorded")
        kept = api.create("holds")
        until(lambda: has_run(standby, kept.run_id), "the standby has both runs")
        stop_receiving(standby)
        gone = [api.create("holds").run_id for _ in range(lost)]

        with psycopg.connect(standby.url("runs"), autocommit=True) as connection:
            connection.execute("SELECT pg_promote()")
        proxy.direct_to(standby.url("runs"))

        outcome = until(lambda: outcome_of_create(api), "the promoted standby answers")
        if not lost:
            assert outcome == "created"
            (failover,) = service.events("storage.failover")
            assert (failover["before"], failover["after"]) == (1, 2)
            # Other connections may still be those to the old server.
            seen = until(lambda: status_if_answered(api, running.run_id), "calls are answered")
            assert seen == run_pb2.RUN_STATUS_RUNNING
            assert service.stop() == 0
            return
        assert outcome == "SHUTTING_DOWN"
        assert service.exit_code() == 10
        (loss,) = service.events("storage.commits_lost")
        assert str(loss["reason"]).startswith("the database has lost commits that it acknowledged")
        service, api = home.start()
        ((warnings,),) = query(home, "SELECT warnings FROM reconciliation ORDER BY id DESC LIMIT 1")
        warning = f"an earlier start of this instance ended: {loss['reason']}"
        assert json.loads(warnings) == [f"{warning}; see docs/postgresql.md#failover"]
        assert query(home, "SELECT count(*) FROM run") == [(2,)]
        assert refused(lambda: api.get(gone[0])).code is grpc.StatusCode.NOT_FOUND
        assert not (home.data / ".lost-commits").exists()
        assert service.stop() == 0


def promote(standby: ScratchPostgres) -> None:
    """Make a standby the primary."""
    with psycopg.connect(standby.url("runs"), autocommit=True) as connection:
        connection.execute("SELECT pg_promote()")


def renewal_of(server: ScratchPostgres) -> int:
    """Return the end of the lease in microseconds, as the server has it."""
    with psycopg.connect(server.url("runs")) as connection:
        row = connection.execute(
            "SELECT lease_until FROM instance WHERE name = 'default'"
        ).fetchone()
    assert row is not None
    return int(row[0])


def noted_renewal(home: Home) -> int:
    """Return the end of the lease that the service has noted; 0: none, or it has stopped."""
    place = home.data / ".last-renewal"
    return int(json.loads(place.read_text())["lease_until_us"]) if place.exists() else 0


@pytest.mark.timeout(300)
@pytest.mark.parametrize("ends", ["killed", "stopped"])
@pytest.mark.parametrize("is_lost", [False, True], ids=["kept", "lost"])
def test_a_service_that_was_down_during_a_failover_says_at_its_start_what_was_lost(
    new_home: Callable[..., Home], ends: str, *, is_lost: bool
) -> None:
    with (
        run_postgres("fsync=off", place=memory_place()) as primary,
        run_standby(primary, "fsync=off") as standby,
        proxied(primary.create("runs")) as proxy,
    ):
        home = new_home(
            database=proxy.url, engines={"holds": script(HOLDS)}, max_concurrent=1, lease_ttl_s=9
        )
        service, api = home.start()
        kept = api.create("holds").run_id
        until(lambda: has_run(standby, kept), "the standby has the run")
        if is_lost:
            stop_receiving(standby)
        gone = api.create("holds").run_id
        if ends == "killed":
            seen = renewal_of(primary)
            until(lambda: noted_renewal(home) > seen, "a later renewal is noted")
            service.kill()
        else:
            assert service.stop() == 0
        if not is_lost:
            last = renewal_of(primary)
            until(lambda: renewal_of(standby) == last, "the standby has everything")

        promote(standby)
        proxy.direct_to(standby.url("runs"))
        # Another service writes to the new primary first: positions of the log prove nothing.
        other = new_home(database=standby.url("runs"), instance="other")
        assert other.start()[0].stop() == 0
        service, api = home.start()

        losses = [str(event["reason"]) for event in service.events("storage.commits_lost")]
        ((warnings,),) = query(
            home,
            "SELECT warnings FROM reconciliation WHERE instance = 'default' ORDER BY id DESC"
            " LIMIT 1",
        )
        assert json.loads(warnings) == [
            f"{loss}; see docs/postgresql.md#failover" for loss in losses
        ]
        if not is_lost:
            assert losses == []
            assert api.get(gone).run_id == gone
        else:
            (loss,) = losses
            assert loss.startswith(
                "while this instance was down, the database has lost commits that it acknowledged"
                " after 2"
            )
            assert refused(lambda: api.get(gone)).code is grpc.StatusCode.NOT_FOUND
        assert service.stop() == 0
        service, _ = home.start()
        assert service.events("storage.commits_lost") == []
        assert service.stop() == 0
