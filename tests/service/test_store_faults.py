"""Faults of the store under a running service are reported to callers, in the log and by health."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Callable
from contextlib import closing

import grpc
import pytest
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refused
from support.service import Home, ServiceProcess
from support.waiting import until

NewHome = Callable[..., Home]
PAGE = 4096
DAMAGED = "the database is damaged; docs/operations.md, *A damaged database*, says how to repair it"
NOT_WRITTEN = (
    "the database cannot be written to: the system reports an I/O error; check the disk,"
    " read-only mounts, quotas, and the limit on file sizes (ulimit -f)"
)


def checkpointed(home: Home) -> sqlite3.Connection:
    """Checkpoint the SQLite file, and return a connection."""
    connection = sqlite3.connect(home.database, timeout=20, isolation_level=None)

    def copied() -> bool:
        found: tuple[int, int, int] = connection.execute(
            "PRAGMA wal_checkpoint(TRUNCATE)"
        ).fetchone()
        return found == (0, 0, 0)

    until(copied, "the log is in the file")
    return connection


def break_page(home: Home, name: str) -> None:
    """Overwrite the first page of a table or an index, but not the header of the file."""
    with closing(checkpointed(home)) as store:
        ((page,),) = store.execute(
            "SELECT rootpage FROM sqlite_schema WHERE name = ?1"
            " UNION SELECT 1 WHERE ?1 = 'sqlite_schema'",
            (name,),
        )
        with home.database.open("r+b") as raw:
            raw.seek((page - 1) * PAGE + (100 if page == 1 else 0))
            raw.write(b"\xff" * (PAGE - 100))


def causes(service: ServiceProcess) -> set[str]:
    """Return the logged causes of NOT_SERVING."""
    names = ("service.statements_failed", "service.lease_not_renewed")
    return {str(event.get("cause")) for name in names for event in service.events(name)}


def test_a_damaged_table_of_runs_is_named_and_health_follows(new_home: NewHome) -> None:
    home = new_home(lease_ttl_s=3.0)
    service, api = home.start()
    names = [f"run-{n}" for n in range(20)]
    for name in names:
        api.create("resumable", {}, run_id=name)
    for name in names:  # a write would put an undamaged copy of the page into the log
        api.until_ended(name)

    break_page(home, "run")
    until(lambda: api.health_of() == "NOT_SERVING", "health says that the database fails")
    answer = refused(lambda: api.runs.ListRuns(pb.ListRunsRequest(), timeout=10))

    assert (answer.code, answer.reason) == (grpc.StatusCode.UNAVAILABLE, "STORAGE_UNAVAILABLE")
    assert answer.message == DAMAGED
    assert DAMAGED in causes(service)


@pytest.mark.parametrize("name", ["run", "run_queue", "sqlite_schema"])
def test_damage_under_a_killed_service_refuses_its_next_start(new_home: NewHome, name: str) -> None:
    home = new_home()
    service, api = home.start()
    api.until_ended(api.create("resumable", {}).run_id)
    break_page(home, name)
    service.kill()

    start = home.spawn()

    assert start.exit_code() == 4
    assert "is damaged (" in start.text
    assert "A damaged database" in " ".join(start.text.split())


def test_a_limit_on_file_sizes_is_named_until_it_is_raised(new_home: NewHome) -> None:
    home = new_home(lease_ttl_s=3.0)
    service, api = home.start()
    log = home.database.with_name(f"{home.database.name}-wal")
    hard = resource.prlimit(service.pid, resource.RLIMIT_FSIZE)[1]

    resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (log.stat().st_size, hard))
    answer = refused(lambda: [api.create("resumable", {"a": "x" * 9000}) for _ in range(500)])
    until(lambda: api.health_of() == "NOT_SERVING", "health says that the database fails")
    resource.prlimit(service.pid, resource.RLIMIT_FSIZE, (hard, hard))
    until(lambda: api.health_of() == "SERVING", "health says that the database answers again")

    assert (answer.reason, answer.message) == ("STORAGE_UNAVAILABLE", NOT_WRITTEN)
    assert NOT_WRITTEN in causes(service)
    api.until_ended(api.create("resumable", {}).run_id)


def test_the_service_names_a_lock_of_another_program_and_waits_for_it(new_home: NewHome) -> None:
    home = new_home(lease_ttl_s=3.0)
    service, api = home.start()
    api.create("resumable", {}, run_id="before")

    # Each write that is ahead in the queue waits for the lock for 5 s as well.
    with (
        closing(sqlite3.connect(home.database, isolation_level=None)) as other,
        Api(service.address, timeout_s=100) as patient,
    ):
        other.execute("BEGIN EXCLUSIVE")
        answer = refused(lambda: patient.create("resumable", {}))
        until(lambda: api.health_of() == "NOT_SERVING", "health says that the database fails")
        other.execute("ROLLBACK")
    until(lambda: api.health_of() == "SERVING", "health says that the database answers again")

    assert answer.reason == "STORAGE_BUSY"
    assert answer.message == "the database is busy: another connection holds its lock; retry later"
    assert "the database is busy: another connection holds its lock; retry later" in {
        event["cause"] for event in service.events("storage.failed")
    }
    assert "None" not in causes(service)
    api.until_ended("before")
    assert service.stop() == 0
