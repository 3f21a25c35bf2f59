"""One service on a PostgreSQL database that is cut off, goes silent, or refuses."""

from __future__ import annotations

import resource
import sqlite3
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from datetime import datetime
from typing import TypeAlias

import grpc
import psycopg
import pytest
from support.api import Api, refused
from support.engines import script
from support.pg_proxy import Proxy, proxied
from support.service import Home, ServiceProcess
from support.stores import query
from support.waiting import until

HOLDS = "import time; input(); time.sleep(600)"
ASKS = """
import json
input()
print(json.dumps({"type": "ask", "kind": "open_text", "prompt": "What?"}), flush=True)
input()
print(json.dumps({"type": "result", "output": {"done": True}}), flush=True)
"""
ASKS_AND_ENDS = """
import json, os, time
task = json.loads(input())
while not os.path.exists(task["input"]["go"]):
    time.sleep(0.01)
print(json.dumps({"type": "session", "value": "s"}), flush=True)
print(json.dumps({"type": "ask", "kind": "open_text", "prompt": "What?"}), flush=True)
"""
ENGINES = {
    "holds": script(HOLDS),
    "asks": script(ASKS, profile="sticky_process"),
    "asks_and_ends": script(ASKS_AND_ENDS),
}
Outage: TypeAlias = AbstractContextManager[None]


@pytest.fixture
def proxy(postgresql_url: str) -> Iterator[Proxy]:
    """The proxy between the test's services and their database."""
    with proxied(postgresql_url) as proxy:
        yield proxy


@pytest.fixture
def home(proxy: Proxy, new_home: Callable[..., Home]) -> Home:
    """A home of services whose database is behind the proxy."""
    return new_home(engines=ENGINES, database=proxy.url, max_queued=1_000_000)


@contextmanager
def traffic(api: Api) -> Iterator[None]:
    """Change other runs all the time, so that announced changes, too, wake the service."""
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(0.2):
            try:
                run = api.create("holds")
                api.cancel(run.run_id)
            except grpc.RpcError:
                continue

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


# -- the answer to a COMMIT is lost --------------------------------------------------------------


def test_a_cancel_whose_commit_was_not_answered_is_carried_out_amid_other_traffic(
    home: Home, proxy: Proxy
) -> None:
    service, api = home.start()
    run = api.create("holds")
    api.until_status(run.run_id, "RUNNING")
    until(lambda: home.agents_of(run.run_id), "the agent lives")
    with traffic(api):
        request_id = str(uuid.uuid4())
        proxy.lose_answer_after(request_id)

        refusal = refused(lambda: api.cancel(run.run_id, request_id=request_id))

        assert proxy.lost.is_set()
        assert refusal.code is grpc.StatusCode.UNAVAILABLE
        until(lambda: not home.agents_of(run.run_id), "the agent is ended")
    assert service.stop() == 0


def test_a_reply_whose_commit_was_not_answered_is_delivered_amid_other_traffic(
    home: Home, proxy: Proxy
) -> None:
    service, api = home.start()
    run = api.create("asks")
    api.until_status(run.run_id, "WAITING_USER")
    with traffic(api):
        request_id = str(uuid.uuid4())
        proxy.lose_answer_after(request_id)

        refusal = refused(lambda: api.reply(run.run_id, 1, "yes", request_id=request_id))

        assert proxy.lost.is_set()
        assert refusal.code is grpc.StatusCode.UNAVAILABLE
        api.until_status(run.run_id, "SUCCEEDED")
    assert service.stop() == 0


# -- an outage while an agent ends ---------------------------------------------------------------


@contextmanager
def no_server(home: Home, proxy: Proxy) -> Iterator[None]:
    """Make PostgreSQL unreachable."""
    proxy.refusing = True
    proxy.cut()
    yield
    proxy.refusing = False


@contextmanager
def no_writes(home: Home, proxy: Proxy) -> Iterator[None]:
    """Lock SQLite against writes."""
    with closing(sqlite3.connect(home.database, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("ROLLBACK")


@contextmanager
def no_room(home: Home, proxy: Proxy) -> Iterator[None]:
    """Limit the file size of the service to that of SQLite's log, so that no write fits."""
    log = home.database.with_name(f"{home.database.name}-wal")
    pid, limit = home.services[-1].pid, resource.RLIMIT_FSIZE
    before = resource.prlimit(pid, limit)
    resource.prlimit(pid, limit, (log.stat().st_size, before[1]))
    yield
    resource.prlimit(pid, limit, before)


def retried_for_s(service: ServiceProcess) -> float:
    """Return how long a service has retried to record what an agent did."""
    times = [
        datetime.fromisoformat(event["timestamp"])
        for event in service.events("execution.write_retried")
    ]
    return (times[-1] - times[0]).total_seconds() if times else 0.0


@pytest.mark.parametrize(
    "outage", [no_server, no_writes, no_room], ids=["postgresql", "sqlite locked", "sqlite full"]
)
def test_a_question_from_an_outage_waits_for_its_answer(
    new_home: Callable[..., Home], proxy: Proxy, outage: Callable[[Home, Proxy], Outage]
) -> None:
    database = proxy.url if outage is no_server else ""
    home = new_home(engines=ENGINES, database=database, lease_ttl_s=60)
    service, api = home.start()
    run = api.create("asks_and_ends", {"go": str(home.path / "go")})
    api.until_status(run.run_id, "RUNNING")
    until(lambda: home.agents_of(run.run_id), "the agent lives")
    with outage(home, proxy):
        (home.path / "go").touch()
        until(lambda: not home.agents_of(run.run_id), "the agent has ended")
        # The straggler sweep checks shims every 2 s, and treats one as lost at the second check.
        # On a locked SQLite file each try waits for 5 s.
        retried = "writes are retried for longer than two checks"
        until(lambda: retried_for_s(service) > 5, retried, timeout_s=60)

    assert api.until_status(run.run_id, "WAITING_USER").attempt == 1
    assert service.stop() == 0


# -- the lease ---------------------------------------------------------------------------------

SHORT_LEASE_S = 3


def renewals(home: Home, service: ServiceProcess, count: int) -> None:
    """Wait until a living service has renewed its lease `count` more times."""
    seen: set[int] = set()

    def renewed() -> bool:
        assert service.popen.poll() is None, service.text
        ((until_us,),) = query(home, "SELECT lease_until FROM instance")
        seen.add(until_us)
        return len(seen) > count

    until(renewed, f"the lease is renewed {count} times")


def test_a_server_without_a_free_connection_ends_no_service_that_has_its_own(
    home: Home, postgresql_url: str, proxy: Proxy
) -> None:
    home.write_config(lease_ttl_s=SHORT_LEASE_S)
    service, api = home.start()
    run = api.create("holds")
    api.until_status(run.run_id, "RUNNING")

    proxy.refusing = True
    home.settings["database"] = postgresql_url  # the test itself does not use the proxy
    renewals(home, service, 12)

    assert service.events("service.lease_not_renewed") == []
    proxy.refusing = False
    assert api.get(run.run_id).attempt == 1
    assert service.stop() == 0


@pytest.mark.parametrize("harm", ["cut", "stall"])
def test_a_lost_connection_of_the_lease_is_replaced_in_time(
    home: Home, postgresql_url: str, proxy: Proxy, harm: str
) -> None:
    home.write_config(lease_ttl_s=SHORT_LEASE_S)
    service, _ = home.start()
    home.settings["database"] = postgresql_url

    getattr(proxy, harm)()
    renewals(home, service, 12)

    assert len(service.events("service.lease_not_renewed")) >= 1
    assert service.stop() == 0


def test_a_slow_connection_of_the_lease_is_kept_while_the_server_refuses_another(
    home: Home, postgresql_url: str, proxy: Proxy
) -> None:
    home.write_config(lease_ttl_s=20)
    service, _ = home.start()
    home.settings["database"] = postgresql_url
    renewals(home, service, 1)

    with psycopg.connect(postgresql_url) as other:
        other.execute("SELECT 1 FROM instance FOR UPDATE")  # a renewal has to wait
        proxy.refusing = True
        service.until_event("service.lease_not_renewed")
        until(lambda: proxy.refused > 0, "another connection was refused")
    renewals(home, service, 3)

    assert service.events("service.lease_not_renewed")[1:] == []
    proxy.refusing = False
    assert service.stop() == 0


# -- a network that drops every packet -----------------------------------------------------------


def demand_lease_lost(service: ServiceProcess) -> None:
    """Check the exit and the log of a service that could not renew its lease."""
    assert service.exit_code() == 10
    assert (
        "error: the lease of instance 'default' was not renewed for 2 s\n"
        "hint: no other service is known; service.lease_not_renewed in the log says why\n"
    ) in service.text
    assert "Traceback" not in service.text
    assert [event for event in service.events() if "exception" in event] == []


@pytest.mark.parametrize("signaled", [False, True], ids=["by itself", "at SIGTERM"])
def test_a_service_with_a_silent_database_kills_its_agents_and_exits(
    home: Home, proxy: Proxy, *, signaled: bool
) -> None:
    home.write_config(lease_ttl_s=SHORT_LEASE_S)
    service, api = home.start()
    run = api.create("holds")
    api.until_status(run.run_id, "RUNNING")
    until(lambda: home.agents_of(run.run_id), "the agent lives")

    proxy.silent = True
    if signaled:
        service.terminate()

    demand_lease_lost(service)
    until(lambda: not home.agents(), "no agent lives")
    proxy.silent = False
    service, api = home.start()
    assert api.get(run.run_id).error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
    assert service.stop() == 0


def test_a_database_that_falls_silent_during_recovery_ends_the_start(
    home: Home, proxy: Proxy
) -> None:
    home.write_config(lease_ttl_s=SHORT_LEASE_S)
    proxy.silence_after("INSERT INTO reconciliation")

    service = home.spawn()

    demand_lease_lost(service)


def test_a_silent_database_at_the_start_is_reported_as_unreachable(
    home: Home, proxy: Proxy
) -> None:
    proxy.silent = True

    service = home.spawn()

    assert service.exit_code() == 6
    assert service.text == (
        "error: the PostgreSQL database: connection timeout expired; correct the cause"
        " named here, or start again\n"
    )


# -- words and exit codes ------------------------------------------------------------------------


def test_a_connection_that_is_lost_at_the_claim_ends_the_start_with_the_true_reason(
    home: Home, proxy: Proxy
) -> None:
    proxy.lose_answer_after("INSERT INTO instance_epoch")

    service = home.spawn()

    assert service.exit_code() == 6
    assert proxy.lost.is_set()
    assert service.text == (
        "error: the PostgreSQL database: consuming input failed: server closed the connection"
        " unexpectedly This probably means the server terminated abnormally before or while"
        " processing the request; correct the cause named here, or start again\n"
    )
    service, _ = home.start()
    assert service.stop() == 0


def test_a_second_service_of_an_instance_is_exit_3_or_5_if_it_has_the_same_address(
    new_home: Callable[..., Home], postgresql_url: str
) -> None:
    first, second = new_home(database=postgresql_url), new_home(database=postgresql_url)
    service, api = first.start()
    ((holder,),) = query(first, "SELECT host_id FROM instance")

    with_its_address = second.spawn("--listen", service.address)
    assert with_its_address.exit_code() == 5  # before it releases the data directory
    with_another_address = second.spawn()

    assert f"error: cannot listen on {service.address}" in with_its_address.text
    assert with_another_address.exit_code() == 3
    assert with_another_address.text == (
        f"error: instance 'default' is held by pid {service.pid} on host {holder}"
        f" ({first.data})\n"
        "hint: stop that service, or give this one its own --data-dir and --instance\n"
    )
    assert query(first, "SELECT epoch FROM instance") == [(1,)]
    assert api.health_of() == "SERVING"
    assert service.stop() == 0
