"""One POST against receivers that behave well and badly."""

from __future__ import annotations

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from runrecovery_service.webhooks.endpoint import Endpoint
from runrecovery_service.webhooks.http_post import Answer, PostFailed, Resolver, post
from support.certificates import Authority
from support.waiting import patience_s
from support.webhook_receiver import Behave, Received, answer, status

from .conftest import NewReceiver
from .samples import endpoint

BODY = b'{"a":1}'
HEADERS = {"webhook-id": "x"}


async def failure(target: Endpoint, **named: Any) -> str:
    """Return why a POST gets no answer."""
    async with asyncio.timeout(patience_s()):  # TimeoutError is no PostFailed
        with pytest.raises(PostFailed) as failed:
            await post(target, HEADERS, BODY, **named)
    assert "hidden" not in str(failed.value)
    return str(failed.value)


def until_closed(connection: socket.socket) -> None:
    """Wait until the other side has closed the connection."""
    with suppress(OSError):
        while connection.recv(1024):
            pass


async def test_a_post_has_its_body_headers_and_target_and_returns_the_status(
    new_receiver: NewReceiver,
) -> None:
    receiver = new_receiver()

    assert await post(endpoint(receiver.port), HEADERS, BODY) == Answer(status=204)

    (received,) = receiver.received
    assert (received.target, received.body) == ("/hook?key=hidden", BODY)
    assert received.headers == {
        "host": f"127.0.0.1:{receiver.port}",
        "content-length": "7",
        "connection": "close",
        "webhook-id": "x",
    }


async def test_a_header_that_is_not_http_is_a_failure(new_receiver: NewReceiver) -> None:
    headers = {"webhook-id": "run\n_3"}
    with pytest.raises(PostFailed, match="the request would not be HTTP"):
        await post(endpoint(new_receiver().port), headers, BODY)


async def test_tries_at_one_time_share_one_resolution_and_later_ones_resolve_again() -> None:
    resolutions, may_end = list[str](), threading.Event()

    def resolve(host: str, port: int) -> list[str]:
        resolutions.append(host)
        assert may_end.wait(patience_s())
        return [f"127.0.0.{len(resolutions)}"]

    resolver = Resolver(resolve)
    waiting = [asyncio.create_task(resolver.addresses("hooks.example", 443)) for _ in range(48)]
    await asyncio.sleep(0)
    waiting.pop().cancel()
    may_end.set()

    assert await asyncio.gather(*waiting) == [["127.0.0.1"]] * 47
    assert await resolver.addresses("hooks.example", 443) == ["127.0.0.2"]
    assert len(resolutions) == 2


async def test_a_redirect_is_an_answer_and_is_not_followed(new_receiver: NewReceiver) -> None:
    other = new_receiver()
    receiver = new_receiver(status(307, f"Location: {other.url}", "Content-Length: 0"))

    assert (await post(endpoint(receiver.port), HEADERS, BODY)).status == 307
    assert other.received == []


async def test_an_informational_answer_is_passed_over(new_receiver: NewReceiver) -> None:
    receiver = new_receiver(
        answer(b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 429 Slow\r\nRetry-After: 7\r\n\r\n")
    )

    found = await post(endpoint(receiver.port), HEADERS, BODY)

    assert found == Answer(status=429, retry_after="7")


async def test_a_large_body_is_not_read(new_receiver: NewReceiver) -> None:
    sent = []

    def send_10_mib(connection: socket.socket, _: Received) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 104857600\r\n\r\n")
        for _chunk in range(160):
            connection.sendall(bytes(65_536))
            sent.append(65_536)

    receiver = new_receiver(send_10_mib)

    assert (await post(endpoint(receiver.port), HEADERS, BODY)).status == 200
    receiver.close()
    assert len(sent) < 160


@pytest.mark.parametrize(
    ("behave", "why"),
    [
        (lambda connection, _: until_closed(connection), "no answer in time"),
        (answer(b"HTTP/1.1 200 OK\r\nX: 1"), "the connection was closed without an answer"),
        (answer(b""), "the connection was closed without an answer"),
        (answer(b"SSH-2.0-OpenSSH_9.2\r\n\r\n"), "the answer is not HTTP"),
        (answer(b"HTTP/1.1 103 X\r\n\r\n" * 5000), "the head of the answer is too long"),
        (answer(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000), "the answer is not HTTP"),
    ],
    ids=["hangs", "closes early", "says nothing", "speaks SSH", "hints for ever", "long header"],
)
async def test_a_bad_answer_is_a_failure_that_says_why(
    new_receiver: NewReceiver, behave: Behave, why: str
) -> None:
    receiver = new_receiver(behave)
    timeout_s = 0.3 if why == "no answer in time" else 10.0

    assert await failure(endpoint(receiver.port, timeout_s=timeout_s)) == why


async def test_an_answer_byte_by_byte_is_cut_at_the_time_of_the_whole_try(
    new_receiver: NewReceiver,
) -> None:
    def trickle(connection: socket.socket, _: Received) -> None:
        connection.settimeout(0.02)  # each byte is early enough for a timeout of reads
        for byte in b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000:
            connection.sendall(bytes([byte]))
            with suppress(TimeoutError):
                if not connection.recv(1):
                    return

    receiver = new_receiver(trickle)

    assert await failure(endpoint(receiver.port, timeout_s=0.5)) == "no answer in time"


async def test_a_host_that_refuses_connections_is_a_failure(new_receiver: NewReceiver) -> None:
    receiver = new_receiver()
    receiver.close()

    assert await failure(endpoint(receiver.port)) == "Connection refused"


async def test_a_name_that_leads_to_a_private_address_is_not_called(
    new_receiver: NewReceiver,
) -> None:
    receiver = new_receiver()
    target = endpoint(receiver.port, host="hooks.example", private=())

    why = await failure(target, resolver=Resolver(lambda host, port: ["127.0.0.1"]))

    assert why == "127.0.0.1 is private, and allow_private does not name it"
    assert receiver.received == []


async def test_the_connection_goes_to_the_address_that_was_checked(
    new_receiver: NewReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    receiver, connected = new_receiver(), []
    resolutions = [["8.8.8.8"], ["127.0.0.1"]]

    async def connect(address: str, port: int, **_: Any) -> Any:
        connected.append(address)
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(asyncio, "open_connection", connect)
    target = endpoint(receiver.port, host="hooks.example", insecure_http=True, private=())

    resolver = Resolver(lambda *_: resolutions.pop(0))
    assert await failure(target, resolver=resolver) == "Connection refused"
    assert (connected, resolutions) == (["8.8.8.8"], [["127.0.0.1"]])


async def test_the_next_address_is_tried_when_one_refuses(new_receiver: NewReceiver) -> None:
    receiver = new_receiver()
    target = endpoint(receiver.port, host="hooks.example")

    resolver = Resolver(lambda *_: ["127.8.8.8", "127.0.0.1"])
    found = await post(target, HEADERS, BODY, resolver=resolver)

    assert found.status == 204
    assert receiver.received[0].headers["host"] == f"hooks.example:{receiver.port}"


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (socket.gaierror(-2, "Name or service not known"), "the name of the host was not found:"),
        (UnicodeError("label too long"), "the name of the host is not valid"),
    ],
)
async def test_a_name_that_does_not_resolve_is_a_failure(error: Exception, why: str) -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise error

    found = await failure(endpoint(host="hooks.example"), resolver=Resolver(resolve))
    assert found.startswith(why)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority("ours")


def serving(authority: Authority, folder: Path, *names: str) -> ssl.SSLContext:
    """Return the TLS of a receiver with these names."""
    pair = authority.issue("server", *names)
    (folder / "pair.pem").write_bytes(pair.certificate + pair.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "pair.pem")
    return context


def trusting(authority: Authority) -> ssl.SSLContext:
    return ssl.create_default_context(cadata=authority.certificate.decode())


async def test_a_certificate_of_the_host_from_a_trusted_authority_is_accepted(
    new_receiver: NewReceiver, authority: Authority, tmp_path: Path
) -> None:
    receiver = new_receiver(tls=serving(authority, tmp_path, "hooks.example"))
    target = endpoint(receiver.port, host="hooks.example", tls=trusting(authority))

    found = await post(target, HEADERS, BODY, resolver=Resolver(lambda *_: ["127.0.0.1"]))

    assert (found.status, len(receiver.received)) == (204, 1)


@pytest.mark.parametrize(
    ("name", "context", "why"),
    [
        ("other.example", trusting, "the certificate is not valid: Hostname mismatch"),
        (
            "hooks.example",
            lambda _: ssl.create_default_context(),
            "the certificate is not valid: unable to get local issuer certificate",
        ),
    ],
    ids=["another host", "an unknown authority"],
)
async def test_nothing_is_sent_to_a_host_without_a_valid_certificate(
    new_receiver: NewReceiver,
    authority: Authority,
    tmp_path: Path,
    name: str,
    context: Callable[[Authority], ssl.SSLContext],
    why: str,
) -> None:
    receiver = new_receiver(tls=serving(authority, tmp_path, name))
    target = endpoint(receiver.port, host="hooks.example", tls=context(authority))

    assert (await failure(target, resolver=Resolver(lambda *_: ["127.0.0.1"]))).startswith(why)
    assert receiver.received == []


async def test_tls_against_plain_http_is_a_failure(
    new_receiver: NewReceiver, authority: Authority
) -> None:
    receiver = new_receiver(answer(b"HTTP/1.1 400 Bad Request\r\n\r\n"))

    why = await failure(endpoint(receiver.port, tls=trusting(authority), timeout_s=1.0))

    assert why.startswith(("TLS failed", "no answer in time"))
