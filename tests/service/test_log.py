"""A log that is not read, closed or on a full disk cannot stop the service."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from support.api import Api, status_word
from support.service import Home, ServiceProcess
from support.waiting import until

NewHome = Callable[..., Home]

SEEDED: Final = 3_000
LOGGED_DECISIONS: Final = 1_000


@contextmanager
def tiny_pipe() -> Iterator[tuple[int, int]]:
    """Yield a pipe of 4 KiB: its reader, which does not block, and its writer."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 4096)
    os.set_blocking(reader, False)
    try:
        yield reader, writer
    finally:
        os.close(reader)
        os.close(writer)


def start(home: Home, *, stderr: int | None = None) -> tuple[ServiceProcess, Api]:
    """Start a service with a known address, so that its log need not be read."""
    address = f"unix:{home.path / 'socket'}"
    service = home.spawn("--listen", address, stderr=stderr)
    service.address = address
    return service, service.until_serving()


def read(reader: int) -> bytes:
    try:
        return os.read(reader, 65536)
    except BlockingIOError:
        return b""


def read_until(reader: int, event: str, seen: bytearray) -> None:
    """Read the log until it has an event."""

    def look() -> bool:
        seen.extend(read(reader))
        return f'"{event}"'.encode() in seen

    until(look, f"the log tells {event}")


def work(api: Api) -> None:
    run = api.create("resumable", {"questions": [{"kind": "open_text", "prompt": "?"}]})
    api.until_status(run.run_id, "WAITING_USER")
    api.reply(run.run_id, 1, "yes")
    assert status_word(api.until_ended(run.run_id)) == "SUCCEEDED"


def test_an_unread_log_delays_nothing_and_reports_later_how_many_lines_are_missing(
    new_home: NewHome,
) -> None:
    home = new_home(lease_ttl_s=3.0)
    home.seed(SEEDED)
    with tiny_pipe() as (reader, writer):
        service, api = start(home, stderr=writer)
        # Longer than the lease: a service that stands still would not have kept it alive.
        long = api.create("resumable", {"work_s": 4.0})
        for _ in range(5):
            work(api)
        assert status_word(api.until_ended(long.run_id)) == "SUCCEEDED"
        assert (api.health_of(), api.health_of("liveness")) == ("SERVING", "SERVING")

        seen = bytearray()
        read_until(reader, "service.log_lines_lost", seen)
        work(api)
        read_until(reader, "execution.turn_ended", seen)
        service.terminate()
        read_until(reader, "service.stopped", seen)

        assert service.exit_code() == 0
    events: list[dict[str, Any]] = [json.loads(line) for line in seen.splitlines()]
    told = [event["event"] for event in events]
    (lost,) = [event["lines"] for event in events if event["event"] == "service.log_lines_lost"]
    missing = LOGGED_DECISIONS - told.count("recovery.run_decided")
    assert missing <= lost <= missing + 200
    assert "execution.turn_ended" in told[told.index("service.log_lines_lost") :]


@contextmanager
def a_pipe() -> Iterator[int]:
    with tiny_pipe() as (_, writer):
        yield writer


@contextmanager
def a_socket() -> Iterator[int]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        yield theirs.fileno()


@contextmanager
def a_terminal() -> Iterator[int]:
    ours, theirs = os.openpty()
    yield theirs
    os.close(theirs)
    os.close(ours)


@pytest.mark.parametrize("place", [a_pipe, a_socket, a_terminal], ids=lambda make: make.__name__)
def test_unread_lines_of_grpc_itself_delay_nothing(
    new_home: NewHome, place: Callable[[], AbstractContextManager[int]]
) -> None:
    home = new_home(env={"GRPC_VERBOSITY": "DEBUG", "GRPC_TRACE": "http,api"})
    with place() as stderr:
        before = fcntl.fcntl(stderr, fcntl.F_GETFL)
        service, api = start(home, stderr=stderr)
        for _ in range(2):  # the first one writes many times what the pipe takes
            work(api)
        assert api.health_of("liveness") == "SERVING"
        if place is not a_socket:  # which cannot be opened anew
            assert fcntl.fcntl(stderr, fcntl.F_GETFL) == before
        assert service.stop() == 0


def test_a_stop_does_not_wait_for_a_reader_of_the_log(new_home: NewHome) -> None:
    home = new_home(drain_delay_s=60.0)
    with tiny_pipe() as (_, writer):
        service, api = start(home, stderr=writer)
        for _ in range(6):
            work(api)
        service.terminate()
        until(lambda: api.health_of() == "NOT_SERVING", "it drains")
        service.terminate()

        assert service.exit_code() == 128 + signal.SIGTERM


def test_a_refused_start_does_not_wait_for_a_reader_of_the_log(new_home: NewHome) -> None:
    home = new_home()
    start(home)
    with tiny_pipe() as (reader, writer):
        os.write(writer, b"x" * 4096)
        second = home.spawn("--instance", "other", stderr=writer)

        assert second.exit_code() == 3
        assert read(reader) == b"x" * 4096


@pytest.mark.parametrize("closed", ["2>&-", "<&- >&- 2>&-"], ids=["stderr", "all three"])
def test_a_service_starts_without_standard_streams(new_home: NewHome, closed: str) -> None:
    home = new_home(prefix=("/bin/sh", "-c", f'exec "$@" {closed}', "sh"))
    service, api = start(home)

    work(api)

    if os.geteuid() == 0:  # the service hides its descriptors from other processes of its user
        descriptors = Path(f"/proc/{service.pid}/fd")
        number = len(closed.split())
        held = [(descriptors / str(fd)).readlink() for fd in range(3 - number, 3)]
        assert held == [Path("/dev/null")] * number
    assert service.stop() == 0


def test_a_full_disk_under_the_log_stops_nothing(new_home: NewHome) -> None:
    home = new_home()
    full = os.open("/dev/full", os.O_WRONLY)
    service, api = start(home, stderr=full)
    os.close(full)

    work(api)

    assert api.health_of() == "SERVING"
    assert service.stop() == 0
