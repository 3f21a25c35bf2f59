"""HTTP with TLS: the certificate and the callers' certificates are those of gRPC, and followed."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.callers import caller, token_of
from support.certificates import Authority, Pair
from support.http_api import RECOVERY, TIMEOUT_S, HttpApi, http_address
from support.service import Home, ServiceProcess

SPIFFE = "spiffe://example.org/agents/ci"
PLAN = f"{RECOVERY}/PlanRecovery"


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
    path = tmp_path_factory.mktemp("https")
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
    with Home(path, tls=tls, callers=callers, credentials=own, http_listen="127.0.0.1:0") as home:
        yield home


def client(
    service: ServiceProcess, authority: Authority, pair: Pair | None, folder: Path, token: str = ""
) -> HttpApi:
    context = ssl.create_default_context(cadata=authority.certificate.decode())
    if pair is not None:
        context.load_cert_chain(*pair.write(folder, "client"))
    return HttpApi(http_address(service), token=token, context=context)


def test_the_names_in_a_certificate_say_who_calls(
    service: ServiceProcess, authority: Authority, clients: Authority, tmp_path: Path
) -> None:
    seen = {}
    for name, pair in {
        "uri": clients.issue(SPIFFE),
        "dns": clients.issue("other.example", "ci.example"),
        "common": clients.issue(common_name="ci"),
        "stranger": clients.issue(common_name="stranger"),
        "hidden": clients.issue("other.example", common_name="ci"),
    }.items():
        refused = client(service, authority, pair, tmp_path).post(PLAN, {})
        seen[name] = (refused.status, refused.json["details"][0]["debug"].get("metadata"))

    assert seen == {
        "uri": (403, {"role": "CREATOR", "needed_role": "OPERATOR"}),
        "dns": (403, {"role": "VIEWER", "needed_role": "OPERATOR"}),
        "common": (403, {"role": "REPLIER", "needed_role": "OPERATOR"}),
        "stranger": (401, None),
        "hidden": (401, None),
    }


def test_a_token_decides_over_the_certificate(
    service: ServiceProcess, authority: Authority, clients: Authority, tmp_path: Path
) -> None:
    pair = clients.issue("ci.example")

    assert [
        client(service, authority, pair, tmp_path, token_of(name)).post(PLAN, {}).status
        for name in ("token", "stranger")
    ] == [200, 401]


def test_a_client_without_a_certificate_of_the_authority_does_not_connect(
    service: ServiceProcess, authority: Authority, tmp_path: Path
) -> None:
    for pair in (None, authority.issue(common_name="ci")):
        with pytest.raises(OSError, match=r"(?i)certificate|alert|reset|closed|eof"):
            client(service, authority, pair, tmp_path).request("GET", "/healthz")


def test_plaintext_gets_no_answer(service: ServiceProcess) -> None:
    plain = HttpApi(http_address(service))

    assert b"HTTP/1." not in plain.raw(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")


def test_a_client_that_says_nothing_keeps_nobody_out(
    service: ServiceProcess, authority: Authority, clients: Authority, tmp_path: Path
) -> None:
    http = client(service, authority, clients.issue("ci.example"), tmp_path)
    with socket.create_connection((http.host, http.port), TIMEOUT_S):
        assert http.request("GET", "/healthz").status == 200


def test_a_new_certificate_and_authority_of_clients_are_followed_without_a_restart(
    service: ServiceProcess,
    home: Home,
    authority: Authority,
    clients: Authority,
    tmp_path: Path,
) -> None:
    successor, next_clients = Authority("successor"), Authority("next clients")
    old, new = clients.issue("ci.example"), next_clients.issue("ci.example")
    assert client(service, authority, old, tmp_path).request("GET", "/healthz").status == 200

    successor.issue("127.0.0.1").write(home.path, "server")
    next_clients.write(home.path, "client-ca")
    try:
        assert client(service, successor, new, tmp_path).request("GET", "/healthz").status == 200
        with pytest.raises(OSError, match=r"(?i)certificate|alert|reset|closed|eof"):
            client(service, successor, old, tmp_path).request("GET", "/healthz")
        with pytest.raises(ssl.SSLCertVerificationError):
            client(service, authority, new, tmp_path).request("GET", "/healthz")
    finally:  # for the other tests of this service
        authority.issue("127.0.0.1").write(home.path, "server")
        clients.write(home.path, "client-ca")


def test_no_client_can_fill_the_log_by_bad_handshakes(
    service: ServiceProcess, authority: Authority, tmp_path: Path
) -> None:
    plain = HttpApi(http_address(service))
    plain.raw(b"GET / HTTP/1.1\r\n\r\n")  # follows files that another test has written
    before = len(service.text.splitlines())

    for _ in range(3):
        plain.raw(b"GET / HTTP/1.1\r\n\r\n")
        with pytest.raises(OSError, match=r"(?i)certificate|alert|reset|closed|eof"):
            client(service, authority, None, tmp_path).request("GET", "/healthz")

    assert service.text.splitlines()[before:] == []
