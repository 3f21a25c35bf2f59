"""A recovery that cannot write: nobody is served, all can be read, and it goes on by itself."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Final

import grpc
from runrecovery.v1 import recovery_pb2
from support.service import Api, Home, ServiceProcess, refused, status_word, until

NewHome = Callable[..., Home]

SLOW_S: Final = 60.0
FAILED: Final = recovery_pb2.SERVICE_STATE_RECOVERY_FAILED


@contextmanager
def locked(home: Home) -> Iterator[None]:
    """Hold the database's lock, as a backup tool that hangs would."""
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


def test_a_recovery_that_finds_the_database_locked_fails_and_ends_well_after_the_lock(
    new_home: NewHome,
) -> None:
    home = new_home(recovery_backoff_s=0.01, recovery_tries=1000)
    killed_with_an_orphan(home)
    home.seed(2000)
    with start_that_is_locked_out(home) as (service, api):
        until(lambda: api.status().state == FAILED, "it says that recovery failed")
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


def test_a_recovery_that_fails_for_good_exits_with_9_and_served_nobody(new_home: NewHome) -> None:
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
