"""A PostgreSQL server without a free connection: callers, health and a start say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc
import psycopg
import pytest
from support.api import refused, status_word
from support.service import Home
from support.waiting import until

from bench.postgres import ScratchPostgres, memory_place, scratch_postgres

NO_CONNECTION = (
    "the database has no connection left; raise its limit (max_connections, or that of the role,"
    " database or pooler), or end other clients"
)
ASKS = {"questions": [{"prompt": "?"}]}


class Server:
    """A server whose role `service` may have only as many connections as a test permits."""

    def __init__(self, server: ScratchPostgres, admin: psycopg.Connection[tuple[object, ...]]):
        self.url = f"postgresql://service@/runs?host={server.folder}"
        self._admin = admin

    def permit(self, connections: int) -> None:
        """Permit the role so many connections (-1: any number), and end those it has."""
        self._admin.execute(f"ALTER ROLE service CONNECTION LIMIT {connections}".encode())
        self._admin.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE usename = 'service'"
        )


@pytest.fixture
def server() -> Iterator[Server]:
    with scratch_postgres("fsync=off", place=memory_place()) as made:
        made.create("runs")
        with psycopg.connect(made.url("runs"), autocommit=True) as admin:
            admin.execute("CREATE ROLE service LOGIN")
            admin.execute("GRANT CREATE ON SCHEMA public TO service")
            yield Server(made, admin)


def test_no_free_connection_is_named_and_a_free_one_is_used(
    new_home: Callable[..., Home], server: Server
) -> None:
    home = new_home(database=server.url, lease_ttl_s=60.0)
    service, api = home.start()
    run_id = api.create("resumable", ASKS).run_id
    api.until_status(run_id, "WAITING_USER")

    server.permit(0)
    answers = [refused(lambda: api.get(run_id)) for _ in range(10)]
    until(lambda: api.health_of() == "NOT_SERVING", "health says that the database fails")
    second = new_home(database=server.url, instance="second").spawn()
    refusal = second.exit_code()
    server.permit(-1)
    until(lambda: api.health_of() == "SERVING", "health says that the database answers again")
    api.reply(run_id, 1, "yes")

    answer = answers[-1]
    assert (answer.code, answer.reason) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE")
    assert answer.message == NO_CONNECTION
    assert refusal == 6
    assert "has no connection left (connection failed: " in second.text
    assert 'too many connections for role "service"' in second.text
    assert NO_CONNECTION in {event["cause"] for event in service.events("storage.failed")}
    assert status_word(api.until_ended(run_id)) == "SUCCEEDED"
    assert service.stop() == 0
