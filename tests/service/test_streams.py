"""Slow readers of streams are cut off, without harm to anyone else; limits on streams."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refusal_of, refused
from support.engines import GOOD_ENGINES, script
from support.service import Home, ServiceProcess
from support.waiting import until

NewHome = Callable[..., Home]

QUESTION: Final = {"kind": "open_text", "prompt": "What next?"}
FLOOD_BYTES: Final = 48 * 1024**2
"""More than sockets and gRPC take between them, which on a loopback may be 10 MiB and more."""
FLOODS: Final = script(
    "import json, sys\n"
    f"for _ in range({FLOOD_BYTES >> 16}):\n"
    "    sys.stderr.write('x' * 65536)\n"
    "print(json.dumps({'type': 'result', 'output': {}}), flush=True)\n"
)
ENGINES: Final = {**GOOD_ENGINES, "floods_stderr": FLOODS}
STALL_S: Final = 0.2
LONG_S: Final = 60.0
FIRST_WINDOW_BYTES: Final = 65_535
HOLDS_A_WATCH: Final = """
import sys, grpc
from runrecovery.v1 import run_service_pb2, run_service_pb2_grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = run_service_pb2_grpc.RunServiceStub(channel)
    for told in stub.WatchRun(run_service_pb2.WatchRunRequest(run_id=sys.argv[2])):
        print("told", flush=True)
"""


def flooded(api: Api) -> str:
    """Return a run that wrote more output than all buffers up to the client hold."""
    run = api.create("floods_stderr")
    api.until_ended(run.run_id)
    return run.run_id


def waiting(api: Api) -> str:
    """Return a run that waits, so that a watch of it stays open."""
    run = api.create("resumable", {"questions": [QUESTION]})
    api.until_status(run.run_id, "WAITING_USER")
    return run.run_id


def output_of(run_id: str) -> pb.StreamOutputRequest:
    return pb.StreamOutputRequest(run_id=run_id, channel=pb.OUTPUT_CHANNEL_STDERR)


def read_one(api: Api, run_id: str) -> Any:
    """Read the first piece of a run's output; return the stream."""
    stream = api.runs.StreamOutput(output_of(run_id), timeout=LONG_S)
    next(stream)
    return stream


def watch(api: Api, run_id: str) -> Any:
    """Open a watch of a run and read its snapshot; return the stream."""
    stream = api.runs.WatchRun(pb.WatchRunRequest(run_id=run_id), timeout=LONG_S)
    assert next(stream).snapshot.run_id == run_id
    return stream


def until_accepted(api: Api, run_id: str) -> None:
    """Wait until the service accepts one more stream."""

    def accepted() -> bool:
        stream = api.runs.WatchRun(pb.WatchRunRequest(run_id=run_id), timeout=LONG_S)
        try:
            next(stream)
        except grpc.RpcError as error:
            refused_as.add(refusal_of(error).reason)
            return False
        stream.cancel()
        return True

    refused_as = set[str]()
    until(accepted, "a stream is accepted")
    assert refused_as <= {"OVERLOADED"}


def cuts(service: ServiceProcess) -> int:
    return len(service.events("rpc.slow_reader_cut"))


def until_cuts(service: ServiceProcess, count: int) -> None:
    until(lambda: cuts(service) >= count, f"{count} readers were cut off")


def errors(service: ServiceProcess) -> list[dict[str, Any]]:
    return [event for event in service.events() if event["level"] in {"error", "critical"}]


# -- a reader that reads nothing, not even its socket --------------------------------------------


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">IBI", len(payload) << 8 | kind, flags, stream) + payload


def _named(text: str) -> bytes:
    return bytes([len(text)]) + text.encode()


def silent_reader(service: ServiceProcess, run_id: str) -> socket.socket:
    """Request output by bare HTTP/2. Never read, and grant no window after the first."""
    host, _, port = service.address.rpartition(":")
    connection = socket.create_connection((host, int(port)))
    headers = b"".join(
        (
            b"\x83\x86\x04",  # POST, http, and the path
            _named("/runrecovery.v1.RunService/StreamOutput"),
            b"\x01" + _named(service.address),
            b"\x00" + _named("te") + _named("trailers"),
            b"\x0f\x10" + _named("application/grpc"),
        )
    )
    message = output_of(run_id).SerializeToString()
    connection.sendall(
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
        + _frame(4, 0, 0, b"")
        + _frame(1, 4, 1, headers)
        + _frame(0, 1, 1, struct.pack(">BI", 0, len(message)) + message)
    )
    return connection


@contextmanager
def silent_readers(service: ServiceProcess, run_id: str, count: int) -> Iterator[None]:
    """Keep `count` readers connected that never read."""
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(silent_reader(service, run_id))
        yield


# -- cut off -------------------------------------------------------------------------------------


def test_a_reader_that_pauses_too_long_is_cut_off_with_slow_reader(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES, max_output_bytes=2 * FLOOD_BYTES, watch_stall_s=STALL_S)
    service, api = home.start()
    run_id = flooded(api)
    stream = read_one(api, run_id)
    until_cuts(service, 1)

    refusal = refused(lambda: list(stream))
    assert (refusal.code.name, refusal.reason) == ("RESOURCE_EXHAUSTED", "SLOW_READER")
    (event,) = service.events("rpc.slow_reader_cut")
    assert event["method"] == "runrecovery.v1.RunService.StreamOutput"
    assert errors(service) == []


def test_a_reader_that_starts_too_late_is_cut_off_with_slow_reader(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES, max_output_bytes=2 * FLOOD_BYTES, watch_stall_s=STALL_S)
    service, api = home.start()
    with silent_reader(service, flooded(api)) as connection:
        until_cuts(service, 1)
        for stream in (0, 1):
            connection.sendall(_frame(8, 0, stream, struct.pack(">I", FLOOD_BYTES)))
        connection.settimeout(LONG_S)
        received = b""
        while b"grpc-status-details-bin" not in received:
            received += connection.recv(1 << 20)

    assert b"\x0bgrpc-status\x018" in received  # RESOURCE_EXHAUSTED
    assert errors(service) == []


def test_a_cut_off_reader_has_no_gap_and_can_resume(
    new_home: NewHome,
) -> None:
    home = new_home(engines=ENGINES, max_output_bytes=2 * FLOOD_BYTES, watch_stall_s=STALL_S)
    service, api = home.start()
    run_id = flooded(api)
    stream = api.runs.StreamOutput(output_of(run_id), timeout=LONG_S)
    pieces = [next(stream)]
    until_cuts(service, 1)

    with pytest.raises(grpc.RpcError):
        pieces.extend(stream)
    at = 0
    for piece in pieces:
        assert piece.offset == at
        at += len(piece.data)
    assert at < FLOOD_BYTES
    request = output_of(run_id)
    request.offset = at
    rest = api.runs.StreamOutput(request, timeout=LONG_S)
    assert at + sum(len(piece.data) for piece in rest) == FLOOD_BYTES


@pytest.mark.parametrize("deaf", [False, True], ids=["reads one", "reads nothing"])
def test_a_cut_off_reader_no_longer_counts_against_the_limit(new_home: NewHome, deaf: bool) -> None:  # noqa: FBT001
    home = new_home(
        engines=ENGINES,
        max_output_bytes=2 * FLOOD_BYTES,
        watch_stall_s=STALL_S,
        max_concurrent_streams=1,
    )
    service, api = home.start()
    run_id, other = flooded(api), waiting(api)
    with ExitStack() as stack:
        if deaf:
            stack.enter_context(silent_reader(service, run_id))
        else:
            stack.callback(read_one(api, run_id).cancel)
        until_cuts(service, 1)

        until_accepted(api, other)
    assert errors(service) == []


def test_readers_that_do_not_read_delay_nothing_else(new_home: NewHome) -> None:
    home = new_home(
        engines=ENGINES,
        max_output_bytes=2 * FLOOD_BYTES,
        watch_stall_s=LONG_S,
        max_concurrent_calls=1,
    )
    service, api = home.start()
    run_id = flooded(api)
    with silent_readers(service, run_id, 20):
        stalled = [read_one(api, run_id) for _ in range(5)]
        read = api.runs.StreamOutput(output_of(run_id), timeout=LONG_S)

        assert sum(len(piece.data) for piece in read) == FLOOD_BYTES
        assert api.get(run_id).run_id == run_id
        assert api.health_of() == "SERVING"
        for stream in stalled:
            stream.cancel()
    assert cuts(service) == 0


def test_memory_does_not_grow_with_cut_off_readers(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES, max_output_bytes=2 * FLOOD_BYTES, watch_stall_s=0.1)
    service, api = home.start()
    run_id, at_once, cut = flooded(api), 100, 0
    resident = []
    for _ in range(12):
        cut += at_once
        with silent_readers(service, run_id, at_once):
            until_cuts(service, cut)
        resident.append(resident_kib(service.pid))

    # The allocator gives memory back now and then, so peaks are compared. Later readers use the
    # memory again that the first ones have freed.
    unread_by_the_later_kib = 8 * at_once * FIRST_WINDOW_BYTES // 1024
    assert max(resident[4:]) - max(resident[:4]) < unread_by_the_later_kib / 2
    assert errors(service) == []


def resident_kib(pid: int) -> int:
    """Return the resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def test_a_stop_does_not_wait_for_cut_off_readers(new_home: NewHome) -> None:
    home = new_home(
        engines=ENGINES, max_output_bytes=2 * FLOOD_BYTES, watch_stall_s=STALL_S, stop_grace_s=0.5
    )
    service, api = home.start()
    run_id = flooded(api)
    with silent_readers(service, run_id, 20):
        stream = read_one(api, run_id)
        until_cuts(service, 21)

        assert service.stop() == 0
        stream.cancel()
    assert errors(service) == []


def test_a_reader_that_leaves_during_a_write_is_no_error(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES, max_output_bytes=2 * FLOOD_BYTES, watch_stall_s=LONG_S)
    service, api = home.start()
    run_id = flooded(api)
    with silent_readers(service, run_id, 20):
        for _ in range(20):
            read_one(api, run_id).cancel()
    assert service.stop() == 0

    assert errors(service) == []


# -- the limit of streams -----------------------------------------------------------------------


def test_streams_have_a_limit_of_their_own_and_one_too_many_is_refused(new_home: NewHome) -> None:
    home = new_home(max_concurrent_streams=2, max_concurrent_calls=1)
    _, api = home.start()
    run_id = waiting(api)
    open_ones = [watch(api, run_id), watch(api, run_id)]

    refusal = refused(lambda: watch(api, run_id))
    assert (refusal.code.name, refusal.reason) == ("RESOURCE_EXHAUSTED", "OVERLOADED")
    assert refusal.retry_after_s is not None
    assert api.get(run_id).run_id == run_id
    api.cancel(run_id)
    for stream in open_ones:
        assert [told.event.kind for told in stream][-1] == run_pb2.RUN_EVENT_KIND_CANCELED
    until_accepted(api, waiting(api))


def test_a_caller_that_hangs_up_no_longer_counts_against_the_limit(new_home: NewHome) -> None:
    home = new_home(max_concurrent_streams=1)
    service, api = home.start()
    run_id = waiting(api)
    stream = watch(api, run_id)

    stream.cancel()

    until_accepted(api, run_id)
    assert errors(service) == []


def test_a_killed_caller_no_longer_counts_against_the_limit(new_home: NewHome) -> None:
    home = new_home(max_concurrent_streams=1)
    service, api = home.start()
    run_id = waiting(api)
    watcher = subprocess.Popen(
        [sys.executable, "-c", HOLDS_A_WATCH, service.address, run_id], stdout=subprocess.PIPE
    )
    try:
        assert watcher.stdout is not None
        assert watcher.stdout.readline() == b"told\n"
        assert refused(lambda: watch(api, run_id)).reason == "OVERLOADED"
    finally:
        os.kill(watcher.pid, signal.SIGKILL)
        watcher.communicate()

    until_accepted(api, run_id)
    assert errors(service) == []


# -- a stop --------------------------------------------------------------------------------------


def test_a_stop_ends_every_watch_with_a_retry_delay(new_home: NewHome) -> None:
    home = new_home(retry_hint_s=0.25)
    service, api = home.start()
    run_id = waiting(api)
    streams: Sequence[Any] = [watch(api, run_id) for _ in range(50)]
    service.terminate()

    for stream in streams:
        refusal = refused(lambda stream=stream: list(stream))  # type: ignore[misc] # a default binds it
        assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
        assert refusal.retry_after_s is not None
        assert refusal.pushback_ms is not None
    assert service.exit_code() == 0


# -- at a stop ---------------------------------------------------------------------------------


def test_open_streams_do_not_delay_a_stop(new_home: NewHome) -> None:
    service, api = new_home(stop_grace_s=600.0).start()
    run = api.create("resumable", {"questions": [{"prompt": "?"}]})
    api.until_status(run.run_id, "WAITING_USER")
    health = api.health.Watch(health_pb2.HealthCheckRequest())
    unknown = api.health.Watch(health_pb2.HealthCheckRequest(service="unknown"))
    watch = api.runs.WatchRun(pb.WatchRunRequest(run_id=run.run_id))
    recovered = api.recovery.WatchRecovered(recovery_pb.WatchRecoveredRequest())
    reflection = reflection_pb2_grpc.ServerReflectionStub(api.channel)
    asks_no_more = threading.Event()

    def questions() -> Iterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        asks_no_more.wait(LONG_S)

    reflected = reflection.ServerReflectionInfo(questions())
    for stream in (health, unknown, watch, recovered, reflected):
        next(stream)

    service.terminate()

    assert service.exit_code() == 0  # long before `stop_grace_s`
    asks_no_more.set()
    not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
    assert [answer.status for answer in health] == [not_serving]
    assert list(unknown) == []
    assert refused(lambda: list(reflected)).reason == "SHUTTING_DOWN"
    assert refused(lambda: list(watch)).reason == "SHUTTING_DOWN"
    assert refused(lambda: list(recovered)).reason == "SHUTTING_DOWN"
