"""What a collector answers costs little, and only its status decides whether spans were sent."""

from __future__ import annotations

import socket
import threading
from typing import Final

import pytest
from runrecovery_service.config.settings import TraceSettings
from runrecovery_service.metric_counters import Meters
from runrecovery_service.traces import setup
from runrecovery_service.traces.collector_session import CollectorSession
from support.webhook_receiver import OK, Behave, Received, Receiver, answer, status

HEAD: Final = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n"
CUT: Final = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nbegun"
MIB: Final = 1024 * 1024


@pytest.mark.parametrize(
    ("behave", "outcome", "requests"),
    [
        (answer(OK), "sent", 1),
        (answer(CUT), "sent", 1),
        (status(301, "location: https://127.0.0.1/"), "not_exported", 1),
        (status(304), "not_exported", 1),
        (status(400), "not_exported", 1),
        (status(500), "not_exported", 1),
        (status(503, "retry-after: 3600"), "not_exported", 1),
        (answer(b"no HTTP"), "not_exported", None),
        (answer(b""), "not_exported", None),
    ],
    ids=["204", "cut", "301", "304", "400", "500", "503", "no-http", "closed"],
)
async def test_spans_are_sent_if_the_collector_says_so_and_lost_otherwise(
    behave: Behave, outcome: str, requests: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "EXPORT_S", 0.5)
    meters = Meters()
    with Receiver(behave) as collector:
        endpoint = f"http://127.0.0.1:{collector.port}"
        tracer = setup.build_tracer(TraceSettings(endpoint=endpoint), instance="i", meters=meters)
        tracer.start("call", None).end()
        await tracer.stop()

        outcomes = {"sent": 0, "queue_full": 0, "not_exported": 0, outcome: 1}
        assert {name: count for (name,), count in meters.spans.values.items()} == outcomes
        assert requests in {None, len(collector.received)}


class Endless:
    """Answers 200 with a body that ends only when the client closes the connection.

    Attributes:
        sent: the bytes of the body until then; `most` if the client has not closed it.
    """

    def __init__(self, piece: bytes, pause_s: float, most: int) -> None:
        self.piece, self.pause_s, self.most, self.sent = piece, pause_s, most, 0
        self.over = threading.Event()

    def __call__(self, connection: socket.socket, _: Received) -> None:
        try:
            connection.sendall(HEAD)
            while self.sent < self.most and not self.over.wait(self.pause_s):
                connection.sendall(self.piece)
                self.sent += len(self.piece)
        finally:
            self.over.set()


@pytest.mark.parametrize(
    "body",
    [Endless(b"x" * MIB, 0, 256 * MIB), Endless(b"x", 0.02, 1000)],
    ids=["at-once", "byte-by-byte"],
)
def test_a_body_without_end_is_closed_and_its_status_counts(body: Endless) -> None:
    with Receiver(body) as collector:
        response = CollectorSession(0.2).request(
            "POST", f"http://127.0.0.1:{collector.port}/", data=b"spans", timeout=3600.0
        )

        assert body.over.wait(60)
    assert response.status_code == 200
    assert body.sent < body.most


def test_a_collector_that_says_nothing_is_left_by_a_clock_that_nobody_sets() -> None:
    """The timeout of an hour is what OpenTelemetry computes after the clock was set back."""

    def hang(connection: socket.socket, _: Received) -> None:
        connection.settimeout(30)
        connection.recv(1)

    with Receiver(hang) as collector, pytest.raises(OSError, match="Read timed out"):
        CollectorSession(0.2).request(
            "POST", f"http://127.0.0.1:{collector.port}/", data=b"spans", timeout=3600.0
        )


def test_a_connection_is_used_again_after_a_short_answer() -> None:
    body = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
    peers = []

    def twice(connection: socket.socket, _: Received) -> None:
        for _time in range(2):
            peers.append(connection.getpeername())
            connection.sendall(body)
            connection.recv(4096)

    with Receiver(twice) as collector:
        session = CollectorSession(5.0)
        for _ in range(2):
            session.request(
                "POST", f"http://127.0.0.1:{collector.port}/", data=b"spans", timeout=5.0
            )
        session.close()

    assert len(set(peers)) == 1
    assert len(peers) == 2
