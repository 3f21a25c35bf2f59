"""TLS of the server: which certificates it takes, and how it follows its files."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from runrecovery_service.domain.start_errors import TlsRefused
from runrecovery_service.rpc import certificate_reload, certificates
from runrecovery_service.rpc.certificate_reload import ServerTls
from runrecovery_service.rpc.certificates import TlsFiles, TlsUnusable
from structlog.testing import capture_logs
from support.api import Api
from support.certificates import DAY, Authority, Key, Pair, old_client, self_signed

HOST = "127.0.0.1"
EXPIRED: dict[str, Any] = {"begins": -2 * DAY, "ends": -DAY}
NOT_YET: dict[str, Any] = {"begins": DAY, "ends": 2 * DAY}
Files: TypeAlias = Callable[..., TlsFiles]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> Files:
    """Write the files of a server; by default of a certificate that is valid."""

    def write(pair: Pair | None = None, *, client_ca: Authority | None = None) -> TlsFiles:
        certificate, key = (pair or authority.issue(HOST)).write(tmp_path, "server")
        return TlsFiles(
            certificate=certificate,
            key=key,
            client_ca=None if client_ca is None else client_ca.write(tmp_path, "client-ca"),
        )

    return write


@dataclass
class Server:
    address: str

    def answer(self, credentials: grpc.ChannelCredentials | None) -> grpc.StatusCode:
        """Return the status of a call on a new connection; the server has no methods."""
        api = Api(self.address, credentials=credentials)
        with closing(api.channel):
            return answer_of(api)

    def certificate(self) -> bytes:
        """Return the certificate that a new connection gets."""
        return ssl.get_server_certificate(self._host_and_port()).encode()

    def shake_hands(self, client: ssl.SSLContext) -> str | None:
        """Connect, and return the version of TLS."""
        with (
            socket.create_connection(self._host_and_port(), timeout=10) as connection,
            client.wrap_socket(connection) as encrypted,
        ):
            return encrypted.version()

    def _host_and_port(self) -> tuple[str, int]:
        return HOST, int(self.address.rpartition(":")[2])


def answer_of(api: Api) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as failed:
        api.get("r")
    call: Any = failed.value
    code: grpc.StatusCode = call.code()
    return code


UNIMPLEMENTED, UNAVAILABLE = grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE


@contextmanager
def serving(credentials: grpc.ServerCredentials | None) -> Iterator[Server]:
    """Run a server without methods: a call on an accepted connection gets UNIMPLEMENTED."""
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        if credentials is None:
            port = server.add_insecure_port(f"{HOST}:0")
        else:
            port = server.add_secure_port(f"{HOST}:0", credentials)
        server.start()
        try:
            yield Server(f"{HOST}:{port}")
        finally:
            server.stop(None).wait()


def test_a_client_that_trusts_the_authority_gets_through(
    files: Files, authority: Authority
) -> None:
    with serving(ServerTls(files()).credentials()) as server:
        assert server.answer(authority.trust()) is UNIMPLEMENTED


@pytest.mark.parametrize("bad", ["wrong host", "self-signed", "expired", "not yet valid"])
def test_a_client_refuses_a_certificate(files: Files, authority: Authority, bad: str) -> None:
    pair = {
        "wrong host": lambda: authority.issue("other.example"),
        "self-signed": lambda: self_signed(HOST),
        "expired": lambda: authority.issue(HOST, **EXPIRED),
        "not yet valid": lambda: authority.issue(HOST, **NOT_YET),
    }[bad]()

    with serving(ServerTls(files(pair)).credentials()) as server:
        assert server.answer(authority.trust()) is UNAVAILABLE


def test_neither_plaintext_on_a_tls_port_nor_tls_on_a_plaintext_port_works(
    files: Files, authority: Authority
) -> None:
    with serving(ServerTls(files()).credentials()) as encrypted:
        assert encrypted.answer(None) is UNAVAILABLE
    with serving(None) as plain:
        assert plain.answer(authority.trust()) is UNAVAILABLE


def test_old_versions_of_tls_are_refused(files: Files) -> None:
    with serving(ServerTls(files()).credentials()) as server:
        assert server.shake_hands(old_client(ssl.TLSVersion.TLSv1_2)) == "TLSv1.2"
        assert server.shake_hands(old_client(ssl.TLSVersion.TLSv1_3)) == "TLSv1.3"
        for version in (ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                server.shake_hands(old_client(version))


# -- the start -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("validity", "reason"),
    [(EXPIRED, "certificate has expired"), (NOT_YET, "certificate is not yet valid")],
    ids=["expired", "not yet valid"],
)
def test_a_start_warns_of_a_certificate_that_is_not_valid_now(
    files: Files, authority: Authority, validity: dict[str, Any], reason: str
) -> None:
    with capture_logs() as logged:
        ServerTls(files(authority.issue(HOST, **validity)))

    assert [(event["event"], event["reason"]) for event in logged] == [
        ("rpc.certificate_invalid", reason)
    ]


def test_a_start_logs_when_the_certificate_expires(files: Files, authority: Authority) -> None:
    with capture_logs() as logged:
        ServerTls(files(authority.issue(HOST)))

    (event,) = logged
    assert event["event"] == "rpc.certificate_loaded"
    assert event["expires"].endswith("+00:00")


def test_files_that_cannot_be_used_refuse_a_start(files: Files, authority: Authority) -> None:
    pair, other = authority.issue(HOST), authority.issue(HOST)
    key = serialization.load_pem_private_key(pair.key, None)
    locked = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    cases = {
        "the key does not belong to the certificate": Pair(
            certificate=pair.certificate, key=other.key
        ),
        "not a certificate and its key in PEM": Pair(certificate=b"x", key=b"y"),
        "not a certificate and its key in PEM ": Pair(certificate=pair.certificate, key=b""),
        "the key has a password; give one without": Pair(certificate=pair.certificate, key=locked),
    }

    for reason, bad in cases.items():
        with pytest.raises(TlsRefused, match=f": {reason.strip()}"):
            ServerTls(files(bad))


@pytest.mark.parametrize(
    ("make", "answer"),
    [
        (lambda: ec.generate_private_key(ec.SECP256R1()), UNIMPLEMENTED),
        (lambda: ec.generate_private_key(ec.SECP384R1()), UNIMPLEMENTED),
        (lambda: rsa.generate_private_key(65_537, 2048), UNIMPLEMENTED),
        (lambda: ec.generate_private_key(ec.SECP521R1()), UNAVAILABLE),
        (ed25519.Ed25519PrivateKey.generate, UNAVAILABLE),
    ],
)
def test_a_key_that_grpc_cannot_use_refuses_a_start(
    files: Files, authority: Authority, make: Callable[[], Key], answer: grpc.StatusCode
) -> None:
    pair = authority.issue(HOST, key=make())
    with serving(grpc.ssl_server_credentials([(pair.key, pair.certificate)])) as server:
        assert server.answer(authority.trust()) is answer

    if answer is UNIMPLEMENTED:
        ServerTls(files(pair))
    else:
        with pytest.raises(TlsRefused, match=r"needs a key of RSA with at least 2048 bits, or of"):
            ServerTls(files(pair))


def test_a_short_rsa_key_refuses_a_start(files: Files, authority: Authority) -> None:
    short = rsa.generate_private_key(65_537, 1024)  # noqa: S505 - such a key is to be refused
    pair = authority.issue(HOST, key=short)

    with pytest.raises(TlsRefused, match=r"server\.pem"):
        ServerTls(files(pair))


def test_a_missing_file_refuses_a_start(files: Files) -> None:
    found = files()
    found.key.unlink()

    with pytest.raises(TlsRefused, match=r"^tls: .*/server\.key: No such file or directory$"):
        ServerTls(found)


def test_a_client_ca_that_holds_no_certificate_refuses_a_start(
    files: Files, authority: Authority
) -> None:
    found = files(client_ca=authority)
    assert found.client_ca is not None
    found.client_ca.write_text("")

    with pytest.raises(TlsRefused, match=r"client-ca\.pem: holds no certificate in PEM"):
        ServerTls(found)


def test_a_bundle_may_have_comments_in_any_encoding(files: Files, authority: Authority) -> None:
    found = files(client_ca=authority)
    assert found.client_ca is not None
    found.client_ca.write_bytes("# Autorité é\n".encode() + b"# \xff\n" + authority.certificate)
    own = authority.issue(common_name="ci")

    with serving(ServerTls(found).credentials()) as server:
        assert server.answer(authority.trust(own)) is UNIMPLEMENTED


# -- files that change ---------------------------------------------------------------------------


def test_new_connections_get_the_pair_that_replaced_the_old_one_and_old_ones_keep_theirs(
    files: Files, authority: Authority
) -> None:
    old, new = authority.issue(HOST), authority.issue(HOST)
    with serving(ServerTls(files(old)).credentials()) as server:
        before = Api(server.address, credentials=authority.trust())
        with closing(before.channel):
            assert answer_of(before) is UNIMPLEMENTED
            assert server.certificate() == old.certificate

            files(new)

            assert server.certificate() == new.certificate
            assert answer_of(before) is UNIMPLEMENTED


def test_a_pair_of_which_only_one_file_is_replaced_is_not_used(
    files: Files, authority: Authority
) -> None:
    old, new = authority.issue(HOST), authority.issue(HOST)
    with capture_logs() as logged, serving(ServerTls(files(old)).credentials()) as server:
        files(Pair(certificate=new.certificate, key=old.key))
        seen = [server.certificate(), server.certificate()]
        files(new)
        seen.append(server.certificate())

    assert seen == [old.certificate, old.certificate, new.certificate]
    refused = [event["reason"] for event in logged if event["event"] == "rpc.certificate_refused"]
    assert [reason.rpartition(": ")[2] for reason in refused] == [
        "the key does not belong to the certificate"
    ]


@pytest.mark.parametrize("bad", ["garbage", "expired", "gone"])
def test_a_new_pair_that_is_broken_keeps_the_old_one(
    files: Files, authority: Authority, bad: str
) -> None:
    old = authority.issue(HOST)
    found = files(old)
    with capture_logs() as logged, serving(ServerTls(found).credentials()) as server:
        if bad == "gone":
            found.certificate.unlink()
        else:
            files(
                Pair(certificate=b"x", key=b"y")
                if bad == "garbage"
                else authority.issue(HOST, **EXPIRED)
            )
        seen = server.certificate()

    assert seen == old.certificate
    assert [event["log_level"] for event in logged] == ["info", "warning"]


def test_each_replacement_that_is_refused_is_logged_also_for_the_same_reason(
    files: Files, authority: Authority
) -> None:
    old, new = authority.issue(HOST), authority.issue(HOST)
    half = Pair(certificate=new.certificate, key=old.key)
    tls = ServerTls(files(old))
    with capture_logs() as logged:
        for pair in (half, new, half):
            files(pair)
            tls.present()

    assert [one["event"] for one in logged] == [
        "rpc.certificate_refused",
        "rpc.certificate_loaded",
        "rpc.certificate_refused",
    ]


def test_a_pair_that_becomes_valid_later_is_used_then(
    files: Files, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files that were refused are tried again although they have not changed."""
    old, new = authority.issue(HOST), authority.issue(HOST)
    read, waiting = certificates.read_certificate, True

    def not_yet(found: TlsFiles) -> Any:
        result = read(found)
        return (
            type(result)(
                chain=b"", key=b"", roots=None, expires="", invalid="certificate is not yet valid"
            )
            if waiting and result.chain == new.certificate
            else result
        )

    monkeypatch.setattr(certificate_reload, "read_certificate", not_yet)
    with serving(ServerTls(files(old)).credentials()) as server:
        files(new)
        seen = [server.certificate()]
        waiting = False
        seen.append(server.certificate())
        monkeypatch.setattr(certificate_reload, "monotonic", lambda: float("inf"))
        seen.append(server.certificate())

    assert seen == [old.certificate, old.certificate, new.certificate]


# -- certificates of clients ---------------------------------------------------------------------


def test_a_client_needs_a_valid_certificate_of_the_configured_authority(
    files: Files, authority: Authority
) -> None:
    clients, strangers = Authority("clients"), Authority("strangers")
    own = {
        "valid": clients.issue(common_name="ci"),
        "none": None,
        "stranger": strangers.issue(common_name="ci"),
        "self-signed": self_signed("ci"),
        "expired": clients.issue(common_name="ci", **EXPIRED),
        "not yet": clients.issue(common_name="ci", **NOT_YET),
    }

    with serving(ServerTls(files(client_ca=clients)).credentials()) as server:
        seen = {name: server.answer(authority.trust(pair)) for name, pair in own.items()}

    assert seen == {
        "valid": UNIMPLEMENTED,
        "none": UNAVAILABLE,
        "stranger": UNAVAILABLE,
        "self-signed": UNAVAILABLE,
        "expired": UNAVAILABLE,
        "not yet": UNAVAILABLE,
    }


def test_clients_of_an_authority_that_is_removed_get_no_new_connection(
    files: Files, authority: Authority
) -> None:
    first, second = Authority("first"), Authority("second")
    pair = authority.issue(HOST)
    revoked, kept = first.issue(common_name="a"), second.issue(common_name="b")
    with serving(ServerTls(files(pair, client_ca=first)).credentials()) as server:
        before = server.answer(authority.trust(revoked)), server.answer(authority.trust(kept))
        files(pair, client_ca=second)
        after = server.answer(authority.trust(revoked)), server.answer(authority.trust(kept))

    assert (before, after) == ((UNIMPLEMENTED, UNAVAILABLE), (UNAVAILABLE, UNIMPLEMENTED))


def test_a_removed_authority_is_followed_while_the_own_pair_is_refused(
    files: Files, authority: Authority
) -> None:
    first, second = Authority("first"), Authority("second")
    revoked, kept = first.issue(common_name="a"), second.issue(common_name="b")
    pair = authority.issue(HOST)
    half = Pair(certificate=pair.certificate, key=authority.issue(HOST).key)
    found = files(pair, client_ca=first)
    with capture_logs() as logged, serving(ServerTls(found).credentials()) as server:
        before = server.answer(authority.trust(revoked)), server.answer(authority.trust(kept))
        files(half, client_ca=second)
        after = server.answer(authority.trust(revoked)), server.answer(authority.trust(kept))

    assert (before, after) == ((UNIMPLEMENTED, UNAVAILABLE), (UNAVAILABLE, UNIMPLEMENTED))
    assert [one["event"] for one in logged] == [
        "rpc.certificate_loaded",
        "rpc.certificate_refused",
        "rpc.client_ca_loaded",
    ]


def test_a_client_ca_that_is_damaged_beside_a_refused_pair_keeps_the_one_before(
    files: Files, authority: Authority
) -> None:
    clients = Authority("clients")
    own, pair = authority.trust(clients.issue(common_name="a")), authority.issue(HOST)
    found = files(pair, client_ca=clients)
    with serving(ServerTls(found).credentials()) as server:
        found.key.write_bytes(b"damaged")
        assert found.client_ca is not None
        found.client_ca.write_bytes(b"damaged")

        assert server.answer(own) == UNIMPLEMENTED


def test_other_files_are_used_by_new_connections_and_followed_from_then_on(
    files: Files, authority: Authority, tmp_path: Path
) -> None:
    tls = ServerTls(files())
    other, newest = authority.issue(HOST), authority.issue(HOST)
    certificate, key = other.write(tmp_path, "other")
    with serving(tls.credentials()) as server:
        tls.prepare(TlsFiles(certificate=certificate, key=key, client_ca=None))()
        seen = [server.certificate()]
        newest.write(tmp_path, "other")
        seen.append(server.certificate())

    assert seen == [other.certificate, newest.certificate]


def test_other_files_are_refused_when_clients_would_refuse_them(
    files: Files, authority: Authority, tmp_path: Path
) -> None:
    tls = ServerTls(files())
    certificate, key = authority.issue(HOST, **EXPIRED).write(tmp_path, "other")

    with pytest.raises(TlsUnusable, match="certificate has expired"):
        tls.prepare(TlsFiles(certificate=certificate, key=key, client_ca=None))
