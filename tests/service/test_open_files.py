"""A service with a low limit on open files, and callers that hold idle connections."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, status_word
from support.engines import script
from support.service import Home
from support.waiting import until

IDLE: Final = 1100
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes((0, 0, 0, 4, 0, 0, 0, 0, 0))
"""The beginning of a connection of HTTP/2: the client's preface, and its settings (none)."""
TELLS_LIMIT: Final = script(
    "import json, resource, sys\n"
    "sys.stdin.readline()\n"
    "limits = resource.getrlimit(resource.RLIMIT_NOFILE)\n"
    "print(json.dumps({'type': 'result', 'output': {'limits': limits}}), flush=True)\n"
)
NewHome = Callable[..., Home]


def limited(soft: int, hard: int) -> dict[str, object]:
    """Return the settings of a home whose services start with these limits on open files."""
    words = f'ulimit -S -n {soft}; ulimit -H -n {hard}; exec "$@"'
    return {"prefix": ("/bin/sh", "-c", words, "sh")}


@pytest.fixture
def many_files() -> Iterator[None]:
    """Raise the test's own soft limit on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2 * IDLE:
        pytest.skip("this user may not open so many files")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2 * IDLE), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextmanager
def idle_connections(address: str, count: int) -> Iterator[list[socket.socket]]:
    """Open `count` connections that send only the HTTP/2 preface."""
    host, _, port = address.rpartition(":")
    with ExitStack() as stack:
        found = []
        for _ in range(count):
            one = stack.enter_context(socket.create_connection((host, int(port)), timeout=10))
            found.append(one)
            try:
                one.sendall(PREFACE)
            except OSError:  # one more than may be connected: closed at once
                continue
        yield found


def accepted_connections(address: str) -> int:
    """Return how many connections to a port of 127.0.0.1 a process has accepted.

    The system's table can be read by every user, the descriptors of the service only by root.
    """
    port = int(address.rpartition(":")[2])
    tables = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))  # gRPC listens by the latter
    lines = [line for table in tables for line in table.read_text().splitlines()[1:]]
    established, not_accepted = "01", "0"
    return sum(
        int(local.partition(":")[2], 16) == port and state == established and inode != not_accepted
        for _, local, _, state, _, _, _, _, _, inode, *_ in map(str.split, lines)
    )


def is_answered(address: str) -> bool:
    with Api(address, timeout_s=2.0) as api:
        try:
            return api.health_of() == "SERVING"
        except grpc.RpcError:
            return False


@pytest.mark.usefixtures("many_files")
def test_idle_connections_leave_enough_files_for_launches_and_the_store(
    new_home: NewHome,
) -> None:
    home = new_home(**limited(1024, 1024), max_concurrent=4)
    service, api = home.start()
    with idle_connections(service.address, IDLE):
        until(lambda: not is_answered(service.address), "nobody else can connect")
        runs = [api.create("resumable", {"work_s": 0.5}).run_id for _ in range(8)]
        ended = [status_word(api.until_ended(run_id)) for run_id in runs]
        listed = {run.run_id for run in api.runs.ListRuns(pb.ListRunsRequest(), timeout=10).runs}
        accepted = accepted_connections(service.address)

    until(lambda: is_answered(service.address), "others can connect again")
    assert ended == ["SUCCEEDED"] * 8
    assert listed >= set(runs)
    assert 100 < accepted < 1024 - 256
    assert service.events("execution.launch_delayed") == []


def test_a_soft_limit_is_raised_for_the_service_and_not_for_its_agents(
    new_home: NewHome,
) -> None:
    home = new_home(engines={"tells": TELLS_LIMIT}, **limited(256, 16_000), max_concurrent=2)
    service, api = home.start()

    output = MessageToDict(api.until_ended(api.create("tells").run_id).output)

    assert output == {"limits": [256, 16_000]}
    assert service.events("service.listening")[0]["max_connections"] == 6000


@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_limit_that_cannot_work_is_refused_with_the_number(
    new_home: NewHome, command: str
) -> None:
    home = new_home(**limited(255, 255), max_concurrent=4)

    done = subprocess.run(
        [*home.prefix, sys.executable, "-m", "runrecovery_service", command,
         "--config", str(home.config), "--data-dir", str(home.data)],
        capture_output=True, text=True, cwd=home.path, timeout=60, check=False,
    )  # fmt: skip
    code, said = done.returncode, done.stdout + done.stderr

    sentence = "this process may open 255 files (ulimit -n); max_concurrent = 4 needs at least 256"
    assert sentence in " ".join(said.split())
    assert code == {"serve": 4, "check": 1}[command]
    assert not Path(home.data).exists()


def test_the_lowest_accepted_limit_works(new_home: NewHome) -> None:
    home = new_home(**limited(256, 256), max_concurrent=4)
    service, api = home.start()

    runs = [api.create("resumable", {"work_s": 0.2}).run_id for _ in range(12)]

    assert [status_word(api.until_ended(run_id)) for run_id in runs] == ["SUCCEEDED"] * 12
    assert service.events("execution.launch_delayed") == []
    assert service.events("service.listening")[0]["max_connections"] == 32


@pytest.mark.usefixtures("many_files")
def test_a_name_of_two_addresses_has_no_more_connections(new_home: NewHome) -> None:
    home = new_home(**limited(256, 256), max_concurrent=4)
    service = home.spawn("--listen", "localhost:0")
    service.address = service.until_event("service.listening")["address"]
    port = service.address.rpartition(":")[2]

    with ExitStack() as stack:
        mine: list[socket.socket] = []
        for host in ("127.0.0.1", "::1"):
            with suppress(ConnectionRefusedError):  # a machine without IPv6
                mine += stack.enter_context(idle_connections(f"{host}:{port}", 40))
        until(lambda: sum(map(is_open, mine)) <= 32, "the others are closed")
        left = sum(map(is_open, mine))

    assert left >= 16


def is_open(connection: socket.socket) -> bool:
    """Read all there is; return whether the connection is open."""
    connection.settimeout(0)
    try:
        while connection.recv(1000):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
