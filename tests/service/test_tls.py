"""A whole service with TLS, and callers by the names in their certificates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing

import grpc
import pytest
from runrecovery.v1.recovery_service_pb2 import PlanRecoveryRequest
from support.api import Api, refused
from support.callers import caller, token_of
from support.certificates import Authority, Pair
from support.service import Home

SPIFFE = "spiffe://example.org/agents/ci"


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def clients() -> Authority:
    return Authority("clients")


@pytest.fixture(scope="module")
def home(
    tmp_path_factory: pytest.TempPathFactory, authority: Authority, clients: Authority
) -> Iterator[Home]:
    path = tmp_path_factory.mktemp("tls")
    certificate, key = authority.issue("127.0.0.1").write(path, "server")
    tls = {
        "certificate": str(certificate),
        "key": str(key),
        "client_ca": str(clients.write(path, "client-ca")),
        "client_auth": "require",
    }
    callers = [
        caller("uri", "creator", certificate_name=SPIFFE),
        caller("dns", "viewer", certificate_name="ci.example"),
        caller("common", "replier", certificate_name="ci"),
        caller("token", "operator"),
    ]
    own = authority.trust(clients.issue(common_name="probe"))
    with Home(path, tls=tls, callers=callers, credentials=own) as home:
        home.start()
        yield home


Connect = Callable[..., Api]


@pytest.fixture
def connect(home: Home, authority: Authority) -> Iterator[Connect]:
    apis: list[Api] = []

    def as_client(pair: Pair | None, token: str = "") -> Api:
        apis.append(Api(home.services[0].address, credentials=authority.trust(pair), token=token))
        return apis[-1]

    yield as_client
    for api in apis:
        api.channel.close()


def test_the_names_in_a_certificate_say_who_calls(connect: Connect, clients: Authority) -> None:
    seen = {}
    for name, pair in {
        "uri": clients.issue(SPIFFE),
        "dns": clients.issue("other.example", "ci.example"),
        "common": clients.issue(common_name="ci"),
    }.items():
        found = refused(lambda: connect(pair).recovery.PlanRecovery(PlanRecoveryRequest()))  # noqa: B023 - at once
        seen[name] = (found.reason, found.metadata.get("role"))

    assert seen == {
        "uri": ("ROLE_NOT_SUFFICIENT", "CREATOR"),
        "dns": ("ROLE_NOT_SUFFICIENT", "VIEWER"),
        "common": ("ROLE_NOT_SUFFICIENT", "REPLIER"),
    }


def test_a_certificate_of_the_authority_without_a_known_name_is_nobodys(
    connect: Connect, clients: Authority
) -> None:
    found = refused(lambda: connect(clients.issue(common_name="stranger")).get("r"))

    assert (found.code, found.reason) == (grpc.StatusCode.UNAUTHENTICATED, "CALLER_UNKNOWN")


def test_a_token_decides_over_the_certificate(connect: Connect, clients: Authority) -> None:
    pair = clients.issue("ci.example")

    assert connect(pair, token_of("token")).status().HasField("reconciliation")
    assert refused(lambda: connect(pair, token_of("x")).get("r")).reason == "CALLER_UNKNOWN"


def test_a_client_without_a_certificate_does_not_connect(connect: Connect) -> None:
    found = refused(lambda: connect(None, token_of("token")).status())

    assert found.code is grpc.StatusCode.UNAVAILABLE


def test_health_needs_a_connection_and_no_caller(connect: Connect, clients: Authority) -> None:
    assert connect(clients.issue(common_name="stranger")).health_of() == "SERVING"


def test_a_service_replaces_its_certificate_without_a_restart(
    home: Home, authority: Authority, clients: Authority
) -> None:
    successor = Authority("successor")
    service = home.services[0]
    own = clients.issue(common_name="probe")
    before = Api(service.address, credentials=authority.trust(own))
    with closing(before.channel):
        assert before.health_of() == "SERVING"

        successor.issue("127.0.0.1").write(home.path, "server")
        try:
            after = Api(service.address, credentials=successor.trust(own))
            with closing(after.channel):
                assert after.health_of() == "SERVING"
        finally:  # for the other tests of this service
            authority.issue("127.0.0.1").write(home.path, "server")
        assert before.health_of() == "SERVING"
    assert len(service.events("rpc.certificate_loaded")) == 2
