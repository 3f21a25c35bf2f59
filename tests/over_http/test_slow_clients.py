"""Clients that read slowly or send slowly lose their connection, and harm nobody else."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

import pytest
from support.api import Api
from support.engines import GOOD_ENGINES, script
from support.http_api import RUNS, TIMEOUT_S, HttpApi, envelope
from support.service import Home, ServiceProcess
from support.waiting import until

FLOOD_BYTES: Final = 24 * 1024**2
FLOODS: Final = script(
    "import json, sys\n"
    f"for _ in range({FLOOD_BYTES >> 16}):\n"
    "    sys.stderr.write('x' * 65536)\n"
    "print(json.dumps({'type': 'result', 'output': {}}), flush=True)\n"
)
OUTPUT: Final = f"{RUNS}/StreamOutput"
REQUEST: Final = {"runId": "flooded", "channel": "OUTPUT_CHANNEL_STDERR"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with Home(
        tmp_path_factory.mktemp("slow"),
        engines={**GOOD_ENGINES, "floods": FLOODS},
        http_listen="127.0.0.1:0",
        max_output_bytes=2 * FLOOD_BYTES,
        watch_stall_s=0.2,
    ) as home:
        yield home


@pytest.fixture(scope="module")
def flooded(api: Api) -> None:
    """A run with more output than all buffers up to the client hold."""
    api.until_ended(api.create("floods", run_id="flooded").run_id)


def silent_reader(http: HttpApi) -> socket.socket:
    """Request the output of the run, and read nothing."""
    body = envelope(json.dumps(REQUEST).encode())
    lines = f"POST {OUTPUT} HTTP/1.1", "Host: localhost", "Content-Type: application/connect+json"
    head = "\r\n".join((*lines, f"Content-Length: {len(body)}", "", ""))
    connection = socket.create_connection((http.host, http.port), TIMEOUT_S)
    connection.sendall(head.encode() + body)
    return connection


def cuts(service: ServiceProcess) -> int:
    return len(service.events("rpc.slow_reader_cut"))


def errors(service: ServiceProcess) -> list[object]:
    return [event for event in service.events() if event["level"] in {"error", "critical"}]


@pytest.mark.usefixtures("flooded")
def test_a_reader_that_pauses_too_long_gets_slow_reader_when_it_reads_on(
    http: HttpApi, service: ServiceProcess
) -> None:
    before = cuts(service)

    with http.stream(OUTPUT, REQUEST) as messages:
        next(messages)
        until(lambda: cuts(service) > before, "the reader is cut off")
        *_, end = list(messages)

    assert end["end"]["error"]["code"] == "resource_exhausted"
    assert end["end"]["error"]["details"][0]["debug"]["reason"] == "SLOW_READER"
    assert errors(service) == []


@pytest.mark.usefixtures("flooded")
def test_readers_that_read_nothing_lose_their_connections_and_delay_nobody(
    http: HttpApi, service: ServiceProcess, api: Api
) -> None:
    before = cuts(service)
    with ExitStack() as stack:
        for _ in range(5):
            stack.enter_context(silent_reader(http))

        with http.stream(OUTPUT, REQUEST) as messages:
            assert sum(1 for _ in messages) > FLOOD_BYTES >> 18
        until(lambda: cuts(service) >= before + 5, "they are cut off")
        until(lambda: established(service, http) == 0, "their connections are closed")
    assert api.health_of() == "SERVING"
    assert errors(service) == []


def established(service: ServiceProcess, http: HttpApi) -> int:
    """Return how many sockets of the service are open on its HTTP port."""
    with open(f"/proc/{service.pid}/net/tcp", encoding="ascii") as table:  # noqa: PTH123
        rows = [line.split() for line in table][1:]
    # A socket that the service has closed or aborted is not among the established ones.
    return sum(row[1] == f"0100007F:{http.port:04X}" and row[3] == "01" for row in rows)


def test_a_body_that_arrives_slowly_delays_no_other_call(http: HttpApi, api: Api) -> None:
    api.create("resumable", {"questions": [{"prompt": "x"}]}, run_id="asks")
    api.until_status("asks", "WAITING_USER")
    head = f"POST {RUNS}/GetRun HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    body = b'{"runId":"asks"}'

    with socket.create_connection((http.host, http.port), TIMEOUT_S) as slow:
        slow.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode())
        for at in range(len(body)):
            assert http.post(f"{RUNS}/GetRun", {"runId": "asks"}).status == 200
            slow.sendall(body[at : at + 1])

        assert slow.recv(65_536).startswith(b"HTTP/1.1 200 ")


def test_many_clients_at_once_are_answered(http: HttpApi, api: Api) -> None:
    api.create("resumable", {"questions": [{"prompt": "x"}]}, run_id="many")
    api.until_status("many", "WAITING_USER")
    seen: list[int] = []

    def call() -> None:
        seen.extend(http.post(f"{RUNS}/GetRun", {"runId": "many"}).status for _ in range(10))

    threads = [threading.Thread(target=call) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert seen == [200] * 200
