"""A service whose instance another start has claimed writes nothing more and exits as fenced."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from typing import Final

import grpc
import pytest
from runrecovery.v1 import run_pb2
from runrecovery_service.clock import Clock
from runrecovery_service.storage import instances
from runrecovery_service.storage.instances import InstanceStart
from runrecovery_service.storage.opening import open_database
from support.api import refused
from support.engines import script
from support.processes import ProcessIdentity, living_process, send_signal
from support.service import Home, ServiceProcess
from support.stores import query
from support.waiting import until

NewHome = Callable[..., Home]

RUNS: Final = 4
REQUEUE: Final = run_pb2.RESTART_POLICY_REQUEUE
FAIL: Final = run_pb2.RESTART_POLICY_FAIL
WORKS: Final = "import sys, time; sys.stdin.readline(); time.sleep(600)"
ENGINES: Final = {"works": script(WORKS)}
FENCED: Final = 10
HELD: Final = 3


def agent_of(home: Home, run_id: str) -> ProcessIdentity:
    """Wait for the agent of a run; return it."""
    (pid,) = until(lambda: home.agents_of(run_id), "the agent runs")
    found = living_process(pid)
    assert found is not None
    return found


def claim_beside(home: Home) -> None:
    """Claim the next epoch, like a second start that the first one's lock does not exclude."""
    ((host_id, data_dir, lock_id),) = query(home, "SELECT host_id, data_dir, lock_id FROM instance")
    db = open_database(str(home.settings.get("database", "")), home.data)
    boot = InstanceStart(
        instance="default",
        boot_token="second",  # noqa: S106 - no secret: it names a start
        host_id=host_id,
        data_dir=data_dir,
        pid=os.getpid(),
        lock_id=lock_id,
    )
    try:
        instances.claim(db, boot, now=Clock().now())
    finally:
        db.close()


def test_a_superseded_service_records_no_end_of_its_agents(
    new_database_url: Callable[[], str], new_home: NewHome
) -> None:
    # Renewals are too far apart to tell the service anything.
    home = new_home(database=new_database_url(), engines=ENGINES, lease_ttl_s=600)
    service, api = home.start()
    for number in range(RUNS):
        api.create("works", run_id=f"run-{number}", restart_policy=REQUEUE if number % 2 else FAIL)
    agents = [agent_of(home, f"run-{number}") for number in range(RUNS)]
    before = query(home, "SELECT run_id, status, error_code, version FROM run ORDER BY id")

    claim_beside(home)
    for agent in agents:
        send_signal(agent, signal.SIGTERM)

    assert service.exit_code() == FENCED
    after = query(home, "SELECT run_id, status, error_code, version FROM run ORDER BY id")
    assert before == after
    assert [row[1:3] for row in after] == [("RUNNING", None)] * RUNS


def test_the_next_start_decides_the_runs_of_the_superseded_service(
    new_database_url: Callable[[], str], new_home: NewHome
) -> None:
    home = new_home(database=new_database_url(), engines=ENGINES, lease_ttl_s=600)
    service, api = home.start()
    api.create("works", run_id="fails")
    api.create("works", run_id="again", restart_policy=REQUEUE)
    agent, _ = agent_of(home, "fails"), agent_of(home, "again")
    claim_beside(home)
    send_signal(agent, signal.SIGTERM)
    assert service.exit_code() == FENCED

    home.start()[1].until_status("again", "RUNNING")

    decided = query(
        home,
        "SELECT r.run_id, e.rule, r.error_code, r.attempt FROM run r"
        " JOIN recovery_event e ON e.run = r.id ORDER BY r.id",
    )
    assert decided == [
        ("fails", "running_interrupted", "ORCHESTRATOR_RESTART_INTERRUPTED", 1),
        ("again", "requeued", None, 2),
    ]


def test_a_call_to_the_superseded_service_changes_nothing(
    new_database_url: Callable[[], str], new_home: NewHome
) -> None:
    home = new_home(database=new_database_url(), engines=ENGINES, lease_ttl_s=600)
    service, api = home.start()
    api.create("works", run_id="works")
    until(lambda: home.agents_of("works"), "the agent runs")
    before = query(home, "SELECT status, cancel_requested_at, version FROM run")
    claim_beside(home)

    refusal = refused(lambda: api.cancel("works"))

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert service.exit_code() == FENCED
    assert before == query(home, "SELECT status, cancel_requested_at, version FROM run")


# -- who may be superseded at all, where several hosts share a database --------------------------


@pytest.fixture
def elsewhere() -> Callable[[Home], ServiceProcess]:
    """Starts a service in another mount namespace.

    There the same paths and names lead to other files, as on a second host that was made from the
    same image.
    """
    as_root = () if os.geteuid() == 0 else ("--map-root-user",)
    words = ("unshare", "--mount", *as_root)
    if subprocess.run([*words, "true"], check=False, capture_output=True).returncode:
        pytest.skip("mount namespaces are not permitted here")

    def start(home: Home) -> ServiceProcess:
        own = 'mount -t tmpfs none "$0" && exec "$@"'
        before, home.prefix = home.prefix, (*words, "sh", "-c", own, str(home.data))
        try:
            return home.spawn()
        finally:
            home.prefix = before

    return start


def test_on_postgresql_a_second_host_of_the_same_image_is_refused_while_the_first_lives(
    postgresql_url: str, new_home: NewHome, elsewhere: Callable[[Home], ServiceProcess]
) -> None:
    home = new_home(database=postgresql_url, engines=ENGINES, lease_ttl_s=600)
    service, api = home.start()
    before = query(home, "SELECT epoch, boot_token, pid FROM instance")

    second = elsewhere(home)

    assert second.exit_code() == HELD
    assert f"instance 'default' is held by pid {service.pid} on host" in second.text
    assert before == query(home, "SELECT epoch, boot_token, pid FROM instance")
    assert api.health_of() == "SERVING"


def test_on_postgresql_a_start_right_after_a_kill_waits_for_no_lease(
    postgresql_url: str, new_home: NewHome
) -> None:
    home = new_home(database=postgresql_url, engines=ENGINES, lease_ttl_s=600)
    home.start()[0].kill()

    _, api = home.start()

    assert api.health_of() == "SERVING"
    assert query(home, "SELECT epoch FROM instance") == [(2,)]
