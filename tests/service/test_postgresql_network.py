"""One service whose network drops every packet to and from its PostgreSQL database."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.api import Api
from support.engines import script
from support.network import Network, own_network, why_no_network
from support.service import Home, ServiceProcess
from support.stores import query
from support.waiting import until

HOLDS = """
import json, os, time
task = json.loads(input())
while not os.path.exists(task["input"]["go"]):
    time.sleep(0.01)
print(json.dumps({"type": "result", "output": {"done": True}}), flush=True)
"""


@pytest.fixture
def network(postgresql_url: str) -> Iterator[Network]:
    """The network of the test's service."""
    if (reason := why_no_network()) is not None:
        pytest.skip(reason)
    with own_network(postgresql_url) as network:
        yield network


@pytest.fixture
def home(network: Network, new_home: Callable[..., Home]) -> Home:
    """A home whose services are in the network."""
    return new_home(engines={"holds": script(HOLDS)}, database=network.url, prefix=network.prefix)


def started(home: Home) -> tuple[ServiceProcess, Api]:
    """Start a service on a socket that can be reached from other networks."""
    return home.start("--listen", f"unix:{home.path}/socket")


def held(home: Home, api: Api) -> str:
    """Return a run whose agent lives until the file `go` is there."""
    run = api.create("holds", {"go": str(home.path / "go")})
    api.until_status(run.run_id, "RUNNING")
    until(lambda: home.agents_of(run.run_id), "the agent lives")
    return run.run_id


@pytest.mark.parametrize("signaled", [False, True], ids=["by itself", "at SIGTERM"])
def test_a_service_whose_packets_are_dropped_kills_its_agents_and_exits(
    home: Home, network: Network, *, signaled: bool
) -> None:
    home.write_config(lease_ttl_s=3)
    service, api = started(home)
    run_id = held(home, api)

    network.drop()
    if signaled:
        service.terminate()

    assert service.exit_code() == 10
    assert network.dropped() > 0
    assert "error: the lease of instance 'default' was not renewed for 2 s\n" in service.text
    assert [event for event in service.events() if "exception" in event] == []
    until(lambda: not home.agents(), "no agent lives")
    network.restore()
    service, api = started(home)
    assert api.get(run_id).error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
    assert service.stop() == 0


def test_nothing_is_lost_when_the_network_returns_before_the_end_of_the_lease(
    home: Home, network: Network, postgresql_url: str
) -> None:
    home.write_config(lease_ttl_s=60)
    service, api = started(home)
    run_id = held(home, api)
    patient = Api(service.address, timeout_s=60.0)
    with patient, ThreadPoolExecutor(1) as pool:
        network.drop()
        (home.path / "go").touch()
        created = pool.submit(lambda: patient.create("holds", {"go": str(home.path / "go")}))
        until(lambda: not home.agents_of(run_id), "the agent has ended")
        until(lambda: network.dropped() >= 10, "packets are sent again and again")
        network.restore()
        other_id = created.result().run_id

    assert api.until_status(run_id, "SUCCEEDED").attempt == 1
    assert api.until_status(other_id, "SUCCEEDED").attempt == 1
    home.settings["database"] = postgresql_url  # the test itself does not use the proxy
    assert query(home, "SELECT count(*) FROM run") == [(2,)]
    assert service.stop() == 0
