"""A recovery that cannot write serves no run, answers reads, and is retried."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import Final

import grpc
from runrecovery.v1 import recovery_pb2
from support.api import Api, refused, status_word
from support.service import Home, ServiceProcess
from support.stores import change, query
from support.waiting import until

NewHome = Callable[..., Home]

SLOW_S: Final = 60.0
FAILED: Final = recovery_pb2.SERVICE_STATE_RECOVERY_FAILED


@contextmanager
def locked(home: Home) -> Iterator[None]:
    """Hold the write lock of the database, like a backup tool that hangs."""
    store = sqlite3.connect(home.database, isolation_level=None, timeout=30)
    with closing(store):
        store.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            store.execute("ROLLBACK")


def killed_with_an_orphan(home: Home) -> None:
    service, api = home.start()
    run = api.create("resumable", {"hold": True}, run_id="orphan")
    api.until_status(run.run_id, "RUNNING")
    until(lambda: home.agents_of("orphan"), "its process lives")
    home.kill_with_shims(service)


@contextmanager
def start_that_is_locked_out(home: Home) -> Iterator[tuple[ServiceProcess, Api]]:
    """Start a service and lock the database as soon as it has claimed its epoch."""
    service = home.spawn()
    service.until_event("service.epoch_claimed")
    with locked(home):
        service.address = service.until_event("service.listening")["address"]
        yield service, service.api()


def test_a_recovery_on_a_locked_database_fails_and_succeeds_after_the_lock(
    new_home: NewHome,
) -> None:
    home = new_home(recovery_backoff_s=0.01, recovery_tries=1000)
    killed_with_an_orphan(home)
    home.seed(2000)
    with start_that_is_locked_out(home) as (service, api):
        # Several writes may each wait for the lock, for 5 s.
        until(lambda: api.status().state == FAILED, "it says that recovery failed", timeout_s=60)
        words = [api.health_of(), api.health_of("runrecovery.v1.RunService")]
        refusal = refused(lambda: api.get("orphan"))

    assert words == ["NOT_SERVING", "NOT_SERVING"]
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.UNAVAILABLE,
        "RECONCILIATION_IN_PROGRESS",
    )
    api = service.until_serving()
    assert status_word(api.get("orphan")) == "FAILED"
    assert home.agents() == []
    assert home.rows("SELECT max(recovery_count), min(recovery_count) FROM run") == [(1, 1)]
    assert service.events("recovery.try_failed")


def test_a_recovery_that_keeps_failing_exits_with_9_and_never_serves(new_home: NewHome) -> None:
    home = new_home(recovery_backoff_s=0.01, recovery_tries=2)
    killed_with_an_orphan(home)
    service = home.spawn()
    service.until_event("service.epoch_claimed")
    with locked(home):
        code = service.exit_code(timeout_s=SLOW_S)

    assert code == 9
    assert "service.serving" not in service.text
    assert len(service.events("recovery.try_failed")) == 2
    _, api = home.start()
    assert status_word(api.get("orphan")) == "FAILED"
    assert home.agents() == []


NO_END_SQLITE: Final = """
CREATE TRIGGER no_end BEFORE UPDATE ON reconciliation WHEN NEW.state = 'COMPLETED'
BEGIN SELECT RAISE(ABORT, 'not now'); END
"""
NO_END_POSTGRESQL: Final = """
CREATE FUNCTION no_end() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN RAISE EXCEPTION 'not now'; END $$;
CREATE TRIGGER no_end BEFORE UPDATE ON reconciliation FOR EACH ROW
WHEN (NEW.state = 'COMPLETED') EXECUTE FUNCTION no_end()
"""


def test_the_gate_stays_closed_while_the_report_cannot_be_completed(
    new_database_url: Callable[[], str], new_home: NewHome
) -> None:
    url = new_database_url()
    home = new_home(database=url, recovery_tries=3, recovery_backoff_s=0.2)
    service, api = home.start()
    api.create("resumable", {"hold": True}, run_id="works")
    api.until_status("works", "RUNNING")
    service.kill()
    change(home, NO_END_POSTGRESQL if url else NO_END_SQLITE)

    service = home.listen()
    told = set()
    api = service.api()
    while service.popen.poll() is None:
        with suppress(grpc.RpcError):
            told.add(api.health_of())

    assert service.exit_code() == 9
    assert told <= {"NOT_SERVING"}
    assert service.events("service.serving") == []
    assert len(service.events("recovery.try_failed")) == 3
    on = "" if not url else " ON reconciliation"
    change(home, f"DROP TRIGGER no_end{on}")
    _, api = home.start()
    assert status_word(api.get("works")) == "FAILED"
    states = query(home, "SELECT state FROM reconciliation ORDER BY id")
    assert states == [("COMPLETED",), *[("FAILED",)] * 3, ("COMPLETED",)]


def test_a_database_lock_longer_than_a_lease_kills_no_agent(
    new_home: NewHome,
) -> None:
    home = new_home(lease_ttl_s=3)
    service, api = home.start()
    api.create("resumable", {"hold": True}, run_id="works")
    (agent,) = until(lambda: home.agents_of("works"), "the agent runs")

    with locked(home):
        # Each of them waits for the lock for longer than trees live without a heartbeat.
        until(lambda: len(service.events("service.lease_not_renewed")) >= 3, "it is not renewed")
        assert home.agents_of("works") == [agent]

    until(lambda: api.health_of() == "SERVING", "it is renewed again")
    assert home.agents_of("works") == [agent]
    assert status_word(api.get("works")) == "RUNNING"
