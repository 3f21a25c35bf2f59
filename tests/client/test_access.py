"""TLS and tokens of both clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import pytest
import runrecovery as rr
from runrecovery.v1 import run_service_pb2
from support.callers import token_of
from support.certificates import Authority
from support.scripted_server import Fail, ScriptedServer, Stream

if TYPE_CHECKING:
    from client.conftest import Connect

TOKEN = token_of("me")
OTHER = token_of("me, later")
RUN = run_service_pb2.GetRunResponse()


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def ca(authority: Authority, tmp_path: Path) -> Path:
    return authority.write(tmp_path)


@pytest.fixture
def server(authority: Authority) -> Iterator[ScriptedServer]:
    scripted = ScriptedServer()
    yield scripted
    scripted.stop()


def encrypted(
    server: ScriptedServer, authority: Authority, *names: str, clients: Authority | None = None
) -> str:
    """Start the server with a certificate for these names, and return its address."""
    pair = authority.issue(*names or ("127.0.0.1",))
    credentials = grpc.ssl_server_credentials(
        [(pair.key, pair.certificate)],
        None if clients is None else clients.certificate,
        require_client_auth=clients is not None,
    )
    server.on("GetRun", RUN)
    return server.start(credentials=credentials)


async def test_a_client_with_the_authority_of_the_service_gets_through(
    server: ScriptedServer, authority: Authority, ca: Path, connect: Connect
) -> None:
    client = connect(encrypted(server, authority), tls=rr.Tls(ca=ca))

    assert await client.call("runs.get", "r") == RUN.run


async def test_a_service_behind_another_name_is_found_by_server_name(
    server: ScriptedServer, authority: Authority, ca: Path, connect: Connect
) -> None:
    address = encrypted(server, authority, "runs.example")

    named = connect(address, tls=rr.Tls(ca=ca, server_name="runs.example"))
    unnamed = connect(address, tls=rr.Tls(ca=ca), timeout_s=1.0)

    assert await named.call("runs.get", "r") == RUN.run
    with pytest.raises((rr.Unavailable, rr.DeadlineExceeded)):
        await unnamed.call("runs.get", "r")


async def test_the_own_certificate_is_shown_to_a_service_that_demands_one(
    server: ScriptedServer, authority: Authority, ca: Path, connect: Connect, tmp_path: Path
) -> None:
    clients = Authority("clients")
    certificate, key = clients.issue(common_name="ci").write(tmp_path, "own")
    address = encrypted(server, authority, clients=clients)

    client = connect(address, tls=rr.Tls(ca=ca, certificate=certificate, key=key))

    assert await client.call("runs.get", "r") == RUN.run


async def test_a_token_goes_with_every_call_and_stream(
    server: ScriptedServer, connect: Connect
) -> None:
    server.on("GetRun", RUN)
    server.on("StreamOutput", Stream([run_service_pb2.StreamOutputResponse(data=b"x")]))
    client = connect(server.start(), token=TOKEN)

    await client.call("runs.get", "r")
    await client.collect("runs.output", "r")

    assert server.tokens == [[f"Bearer {TOKEN}"]] * 2


async def test_a_token_file_is_read_for_each_call_and_each_reopened_stream(
    server: ScriptedServer, connect: Connect, tmp_path: Path, pauses: list[float]
) -> None:
    file = tmp_path / "token"
    file.write_text(f"{TOKEN}\n")

    def replace_token(*_: object) -> Stream:
        file.write_text(f" {OTHER}\n")
        return Stream([], then=Fail(code=grpc.StatusCode.UNAVAILABLE))

    server.on("GetRun", RUN)
    server.on("StreamOutput", replace_token, Stream([]))
    client = connect(server.start(), token_file=file)

    await client.call("runs.get", "r")
    await client.collect("runs.output", "r")

    assert server.tokens == [[f"Bearer {TOKEN}"], [f"Bearer {TOKEN}"], [f"Bearer {OTHER}"]]


@pytest.mark.parametrize("content", [None, "", "two words", "a\nb", "\u00e4" * 32])
async def test_a_file_without_a_token_fails_the_call_before_it_is_sent(
    server: ScriptedServer, connect: Connect, tmp_path: Path, content: str | None
) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    client = connect(server.start(), token_file=file)

    with pytest.raises(rr.TokenUnusable) as failed:
        await client.call("runs.get", "r")

    assert str(failed.value).startswith(f"{file}: ")
    assert failed.value.code is grpc.StatusCode.UNAUTHENTICATED
    assert not content or content not in str(failed.value)
    assert server.calls == []


async def test_a_token_is_not_sent_to_another_machine_in_plaintext(connect: Connect) -> None:
    with pytest.raises(ValueError, match="without encryption; give tls="):
        connect("runs.example:50051", token=TOKEN)

    connect("localhost:50051", token=TOKEN)
    connect("unix:/run/socket", token=TOKEN)
    connect("runs.example:50051", token=TOKEN, tls=True)


async def test_arguments_that_exclude_each_other_are_refused(
    connect: Connect, authority: Authority, ca: Path
) -> None:
    with pytest.raises(TypeError, match="token or token_file, not both"):
        connect("localhost:1", token=TOKEN, token_file=ca)
    with pytest.raises(TypeError, match="tls or credentials, not both"):
        connect("localhost:1", tls=True, credentials=authority.trust())
    with pytest.raises(TypeError, match="certificate and key, or neither"):
        rr.Tls(ca=ca, certificate=ca)


def test_no_representation_shows_the_token() -> None:
    from runrecovery._token import BearerToken

    assert TOKEN not in repr(BearerToken(token=TOKEN))
