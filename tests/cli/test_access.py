"""The options for TLS and the token, and their variables."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from support.callers import token_of
from support.certificates import Authority

from .conftest import FixedAnswers, Run

TOKEN = token_of("me")


@pytest.fixture
def authority() -> Authority:
    return Authority()


@pytest.fixture
def encrypted(authority: Authority) -> Iterator[FixedAnswers]:
    """A server that demands a certificate of this authority, for the name `runs.example`."""
    answers = FixedAnswers({"Check": [health_pb2.HealthCheckResponse(status=1)]})
    pair = authority.issue("runs.example")
    credentials = grpc.ssl_server_credentials(
        [(pair.key, pair.certificate)], authority.certificate, require_client_auth=True
    )
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(2))
        server = grpc.server(threads, handlers=[answers])
        answers.address = f"127.0.0.1:{server.add_secure_port('127.0.0.1:0', credentials)}"
        server.start()
        stack.callback(lambda: server.stop(None).wait())
        yield answers


@pytest.mark.parametrize("source", ["options", "variables"])
def test_tls_and_the_token_come_from_options_or_variables(
    run: Run,
    encrypted: FixedAnswers,
    authority: Authority,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
) -> None:
    certificate, key = authority.issue(common_name="me").write(tmp_path, "own")
    token = tmp_path / "token"
    token.write_text(TOKEN)
    given = {
        "tls-ca": str(authority.write(tmp_path)),
        "tls-certificate": str(certificate),
        "tls-key": str(key),
        "tls-server-name": "runs.example",
        "token-file": str(token),
    }
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    if source == "variables":
        words = []
        for name, value in given.items():
            monkeypatch.setenv(f"RUNRECOVERY_{name.replace('-', '_').upper()}", value)

    ended = run("health", "--server", encrypted.address, *words)

    assert (ended.code, ended.out) == (0, "SERVING\n"), ended.err
    assert encrypted.tokens == [f"Bearer {TOKEN}"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tls-ca", "none.pem"], "none.pem: No such file or directory"),
        (["--tls-ca", ""], "must not be empty"),
        (["--tls-key", "k"], "give --tls-certificate and --tls-key, or neither"),
        (["--token-file", "none"], "none: No such file or directory"),
        (
            ["--server", "runs.example:1", "--token-file", "t"],
            "a token would be sent to runs.example:1 without encryption; give --tls-ca or --tls",
        ),
    ],
)
def test_options_that_cannot_be_used_exit_with_2(
    run: Run, server: FixedAnswers, words: list[str], said: str
) -> None:
    ended = run("health", "--server", server.address, *words)

    assert ended.code == 2
    assert said in ended.err
    assert server.asked == []
