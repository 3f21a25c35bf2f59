"""The gRPC server over a fake storage: binding, sizes, writes, output, stop."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from runrecovery.v1.recovery_service_pb2_grpc import RecoveryServiceStub
from runrecovery.v1.run_service_pb2_grpc import RunServiceStub
from runrecovery_service.agents.output import OutputChannel, OutputFiles
from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.domain import run as domain
from runrecovery_service.domain.run import NewRun, Run, RunStatus
from runrecovery_service.engines.catalog import Catalog, Engine
from runrecovery_service.recovery.bulk_session_check import BulkSessionCheck
from runrecovery_service.recovery.plan import Planner
from runrecovery_service.recovery.status import RecoveryStatus
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.listen_address import ListenFailed
from runrecovery_service.rpc.output_reader import PIECE_BYTES
from runrecovery_service.rpc.paging import PageTokens
from runrecovery_service.rpc.recovery_service import RecoveryDeps
from runrecovery_service.rpc.run_service import RunDeps, RunLimits
from runrecovery_service.rpc.server import GrpcServer
from runrecovery_service.rpc.server_limits import ServerLimits
from runrecovery_service.rpc.server_setup import build_contract, build_server
from runrecovery_service.storage import launch_records, retention
from runrecovery_service.storage.instances import Owner
from runrecovery_service.storage.launch_records import UnendedLaunch
from structlog.testing import capture_logs
from support.clock import FakeClock
from support.domain_runs import QUEUED_RUN

AT = datetime(2026, 11, 24, tzinfo=UTC)
OWNER = Owner("here", 3, "t")
MAX_OUTPUT_BYTES = 200_000
STDOUT = OutputChannel.STDOUT


def run(**changes: Any) -> Run:
    made = replace(
        QUEUED_RUN, status=RunStatus.RUNNING, attempt=1, turn=1, created_at=AT, updated_at=AT
    )
    return replace(made, **changes)


@dataclass
class FakeStorage:
    """A storage with one run. A write waits for `commit` and returns the run.

    Attributes:
        reads: the number of reads so far. Each one sets `has_read`.
    """

    is_shared = False

    run: Run = field(default_factory=run)
    unended: list[UnendedLaunch] = field(default_factory=list)
    writes: list[tuple[Any, ...]] = field(default_factory=list)
    began: asyncio.Event = field(default_factory=asyncio.Event)
    commit: asyncio.Event = field(default_factory=asyncio.Event)
    committed: asyncio.Event = field(default_factory=asyncio.Event)
    reads: int = 0
    has_read: asyncio.Event = field(default_factory=asyncio.Event)
    output_removed: bool = False

    async def read_row(self, use: Any, *_: Any) -> Any:
        if use is retention.is_output_removed:
            return self.output_removed
        self.reads += 1
        self.has_read.set()
        return self.run

    async def read(self, use: Any, *_: Any, **__: Any) -> list[UnendedLaunch]:
        self.has_read.set()
        return self.unended if use is launch_records.unended_launches else []

    def start_write(self, *arguments: Any, **keywords: Any) -> asyncio.Future[Run]:
        return asyncio.ensure_future(self._write(*arguments, **keywords))

    async def _write(self, *arguments: Any, **keywords: Any) -> Run:
        self.writes.append((*arguments, keywords))
        self.began.set()
        await self.commit.wait()
        self.committed.set()
        return self.run


@dataclass
class FakedServer:
    """A running server, its fakes, and stubs that call it."""

    gate: Gate
    storage: FakeStorage
    workspaces: Workspaces
    output: OutputFiles
    runs: Any
    recovery: Any
    address: str
    grpc_server: GrpcServer

    def write(self, data: bytes, *, attempt: int = 1) -> None:
        self.workspaces.prepare(5, attempt, fresh=False)
        self.output.append(5, attempt, STDOUT, data)


def limits(*, max_concurrent_calls: int, max_request_bytes: int) -> ServerLimits:
    return ServerLimits(
        max_concurrent_calls=max_concurrent_calls,
        max_concurrent_streams=10,
        stall_s=60.0,
        max_request_bytes=max_request_bytes,
    )


def engine() -> Engine:
    return Engine(
        name="demo",
        command=("demo",),
        profile=domain.Profile.RESUMABLE,
        env_allow=(),
        max_concurrent=None,
        session_file=None,
    )


def deps(storage: FakeStorage, workspaces: Workspaces) -> tuple[RunDeps, RecoveryDeps]:
    return (
        RunDeps(
            storage=cast("Any", storage),
            owner=OWNER,
            catalog=Catalog([engine()]),
            workspaces=workspaces,
            output=OutputFiles(workspaces, max_bytes=MAX_OUTPUT_BYTES),
            limits=RunLimits(max_queued=7, max_attempts=2),
            clock=FakeClock(wall=AT),
            page_tokens=PageTokens(key=b"key"),
        ),
        RecoveryDeps(
            storage=cast("Any", storage),
            owner=OWNER,
            status=RecoveryStatus(),
            planner=Planner(
                owner=OWNER,
                sessions=BulkSessionCheck(checks={}, workspace=workspaces.workspace),
                clock=FakeClock(wall=AT),
            ),
            page_tokens=PageTokens(key=b"key"),
        ),
    )


def server_with(
    gate: Gate, run_deps: RunDeps, recovery_deps: RecoveryDeps, limits: ServerLimits
) -> GrpcServer:
    contract = build_contract(gate, run_deps=run_deps, recovery_deps=recovery_deps, limits=limits)
    return build_server(gate, contract, limits=limits)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[FakedServer]:
    gate, storage, workspaces = Gate(), FakeStorage(), Workspaces(tmp_path / "runs")
    run_deps, recovery_deps = deps(storage, workspaces)
    server = server_with(
        gate,
        run_deps,
        recovery_deps,
        limits=limits(max_concurrent_calls=10, max_request_bytes=100_000),
    )
    port = await server.bind("127.0.0.1:0")
    gate.open()
    address = f"127.0.0.1:{port}"
    async with grpc.aio.insecure_channel(address) as channel:
        yield FakedServer(
            gate=gate,
            storage=storage,
            workspaces=workspaces,
            output=OutputFiles(workspaces, max_bytes=MAX_OUTPUT_BYTES),
            runs=RunServiceStub(channel),
            recovery=RecoveryServiceStub(channel),
            address=address,
            grpc_server=server,
        )
    storage.commit.set()
    await server.stop(grace_s=0)


def reason(error: grpc.aio.AioRpcError) -> str:
    packed = dict(error.trailing_metadata())["grpc-status-details-bin"]
    assert isinstance(packed, bytes)
    info = error_details_pb2.ErrorInfo()
    status_pb2.Status.FromString(packed).details[0].Unpack(info)
    return str(info.reason)


# -- the server --------------------------------------------------------------------------------


async def test_taken_port_is_refused(served: FakedServer, tmp_path: Path) -> None:
    run_deps, recovery_deps = deps(served.storage, Workspaces(tmp_path / "runs"))
    second = server_with(
        Gate(),
        run_deps,
        recovery_deps,
        limits=limits(max_concurrent_calls=1, max_request_bytes=1000),
    )

    with pytest.raises(ListenFailed, match=served.address):
        await second.bind(served.address)
    await second.stop(grace_s=0)


async def test_request_over_the_limit_is_refused_by_grpc_itself(served: FakedServer) -> None:
    request = pb.CreateRunRequest(engine="demo")
    request.input["text"] = "x" * 100_001

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.runs.CreateRun(request)

    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in str(caught.value.details())


async def test_status_has_the_state_the_instance_and_the_epoch(served: FakedServer) -> None:
    answer = await served.recovery.GetRecoveryStatus(recovery_pb.GetRecoveryStatusRequest())

    assert answer == recovery_pb.GetRecoveryStatusResponse(
        state=3,  # type: ignore[arg-type]
        instance="here",
        epoch=3,
    )


async def test_status_names_launches_that_could_not_be_ended(served: FakedServer) -> None:
    served.storage.unended = [UnendedLaunch(run_id="r", attempt=2, launched_at=AT)]

    answer = await served.recovery.GetRecoveryStatus(recovery_pb.GetRecoveryStatusRequest())

    assert [(left.run_id, left.attempt) for left in answer.unended_launches] == [("r", 2)]


async def test_largest_refusal_arrives_whole(served: FakedServer) -> None:
    labels = {"É" * 200 + str(n): "x" * 300 for n in range(50)}

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.runs.CreateRun(pb.CreateRunRequest(engine="e" * 300, labels=labels))

    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason(caught.value) == "INVALID_FIELD"


# -- mutations ---------------------------------------------------------------------------------


async def test_create_stores_every_field_of_its_request(served: FakedServer) -> None:
    served.storage.commit.set()
    request = pb.CreateRunRequest(
        engine="demo",
        labels={"a": "b"},
        restart_policy=run_pb2.RESTART_POLICY_REQUEUE,
        run_id="mine",
        request_id="0192F0C1-aaaa-4bbb-8ccc-0123456789ab",
    )
    request.input["n"] = 1

    await served.runs.CreateRun(request)

    ((_, new, keywords),) = served.storage.writes
    assert new == NewRun(
        run_id="mine",
        engine="demo",
        labels={"a": "b"},
        profile=domain.Profile.RESUMABLE,
        restart_policy=domain.RestartPolicy.REQUEUE,
        max_attempts=2,
        session_timeout_s=1200.0,
        input={"n": 1},
    )
    assert (keywords["owner"], keywords["max_queued"], keywords["now"]) == (OWNER, 7, AT)
    assert keywords["receipt"].request_id == "0192f0c1-aaaa-4bbb-8ccc-0123456789ab"


async def test_unknown_engine_is_refused_with_the_names_of_the_known_engines(
    served: FakedServer,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await served.runs.CreateRun(pb.CreateRunRequest(engine="nobody"))

    assert reason(caught.value) == "UNKNOWN_ENGINE"
    assert served.storage.writes == []


async def test_a_write_is_committed_after_its_caller_hung_up(served: FakedServer) -> None:
    call = served.runs.CancelRun(pb.CancelRunRequest(run_id="r1"))
    await served.storage.began.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    # A round trip on the same connection: the server has met the cancel by now.
    await served.runs.GetRun(pb.GetRunRequest(run_id="r1"))
    served.storage.commit.set()

    await asyncio.wait_for(served.storage.committed.wait(), 10)


# -- output ------------------------------------------------------------------------------------


async def output(served: FakedServer, **asked: Any) -> list[pb.StreamOutputResponse]:
    request = pb.StreamOutputRequest(run_id="r1", **asked)
    return [piece async for piece in served.runs.StreamOutput(request)]


async def test_output_comes_in_pieces_with_their_offsets(served: FakedServer) -> None:
    data = bytes(range(256)) * 300
    served.write(data)

    pieces = await output(served, offset=10)

    assert b"".join(piece.data for piece in pieces) == data[10:]
    assert [piece.offset for piece in pieces] == [10, 10 + PIECE_BYTES]
    assert {piece.attempt for piece in pieces} == {1}


async def test_only_the_last_piece_says_that_output_was_truncated(served: FakedServer) -> None:
    served.write(b"x" * (MAX_OUTPUT_BYTES + 1))

    pieces = await output(served, follow=True)

    assert sum(len(piece.data) for piece in pieces) == MAX_OUTPUT_BYTES
    assert [piece.truncated for piece in pieces] == [False] * (len(pieces) - 1) + [True]


@pytest.mark.parametrize("attempt", [0, 1])
async def test_run_that_wrote_nothing_has_no_output(attempt: int, served: FakedServer) -> None:
    served.storage.run = run(attempt=attempt)

    assert await output(served) == []


async def test_output_of_an_earlier_attempt_ends_even_for_a_follower(served: FakedServer) -> None:
    served.storage.run = run(attempt=2)
    served.write(b"first", attempt=1)
    served.write(b"second", attempt=2)

    assert [p.data for p in await output(served, attempt=1, follow=True)] == [b"first"]
    assert [p.data for p in await output(served)] == [b"second"]


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({}, {"attempt": 2}),
        ({}, {"attempt": 2, "follow": True}),
        ({}, {"offset": 5}),
        ({"status": RunStatus.FAILED}, {"offset": 5, "follow": True}),
        ({"status": None}, {"offset": 5, "follow": True}),
    ],
)
async def test_an_attempt_or_offset_without_output_is_out_of_range(
    changes: dict[str, Any], asked: dict[str, Any], served: FakedServer
) -> None:
    served.storage.run = run(**changes)
    served.write(b"four")

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await output(served, **asked)

    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
    assert reason(caught.value) == "OUTPUT_OUT_OF_RANGE"


@pytest.mark.parametrize("offset", [0, 2, 9])
async def test_reading_removed_output_fails_with_output_removed(
    offset: int, served: FakedServer
) -> None:
    """A caller that was reading the output gets the error too, because pieces may be missing."""
    served.storage.run = run(status=RunStatus.SUCCEEDED)
    served.storage.output_removed = True

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await output(served, offset=offset)

    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert reason(caught.value) == "OUTPUT_REMOVED"


async def test_an_offset_at_the_end_of_the_output_is_in_range(served: FakedServer) -> None:
    served.write(b"four")

    assert await output(served, offset=4) == []


async def test_follower_gets_all_output_that_was_written_before_the_run_ended(
    served: FakedServer,
) -> None:
    served.storage.run = run(attempt=0, status=RunStatus.QUEUED)
    following = asyncio.create_task(output(served, follow=True))
    await served.storage.has_read.wait()
    served.write(b"one")
    served.storage.run = run()
    reads_before = served.storage.reads
    while served.storage.reads < reads_before + 2:
        served.storage.has_read.clear()
        await asyncio.wait_for(served.storage.has_read.wait(), 10)
    served.write(b"two")
    served.storage.run = run(status=RunStatus.SUCCEEDED)

    pieces = await asyncio.wait_for(following, 10)
    assert b"".join(piece.data for piece in pieces) == b"onetwo"
    assert [piece.offset for piece in pieces] == [0, 3]


async def test_drain_ends_the_streams_of_followers(served: FakedServer) -> None:
    following = asyncio.create_task(output(served, follow=True))
    await served.storage.has_read.wait()
    served.gate.drain()

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await asyncio.wait_for(following, 10)
    assert reason(caught.value) == "SHUTTING_DOWN"


# -- a stop ------------------------------------------------------------------------------------


@asynccontextmanager
async def proxy_that_waits(address: str, reads: asyncio.Event) -> AsyncIterator[str]:
    """Run a proxy to the address that passes answers on only while `reads` is set."""
    ends: list[asyncio.StreamWriter] = []

    async def pass_on(
        source: asyncio.StreamReader, target: asyncio.StreamWriter, go: asyncio.Event
    ) -> None:
        while data := await source.read(65_536):
            await go.wait()
            target.write(data)
            await target.drain()
        target.close()

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = address.rpartition(":")
        answers, server = await asyncio.open_connection(host, int(port))
        ends.extend((writer, server))
        at_once = asyncio.Event()
        at_once.set()
        await asyncio.gather(
            pass_on(reader, server, at_once),
            pass_on(answers, writer, reads),
            return_exceptions=True,
        )

    proxy = await asyncio.start_server(connect, "127.0.0.1", 0)
    try:
        yield f"127.0.0.1:{proxy.sockets[0].getsockname()[1]}"
    finally:
        proxy.close()
        for end in ends:
            end.close()


async def test_stop_waits_for_an_answer_that_is_still_being_sent(served: FakedServer) -> None:
    served.storage.run = run(input={"text": "x" * 3_000_000})
    reads = asyncio.Event()
    reads.set()
    async with (
        proxy_that_waits(served.address, reads) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        await asyncio.wait_for(channel.channel_ready(), 20)
        reads.clear()
        call = RunServiceStub(channel).GetRun(pb.GetRunRequest(run_id="r1"))
        await asyncio.wait_for(served.storage.has_read.wait(), 10)

        stop = asyncio.create_task(served.grpc_server.stop(grace_s=30))
        await asyncio.wait({stop}, timeout=0.5)
        reads.set()

        answer = await asyncio.wait_for(call, 20)
        assert answer.run.input["text"] == "x" * 3_000_000
        await stop


async def test_stop_waits_for_answers_of_calls_that_pass_a_closed_gate(served: FakedServer) -> None:
    served.storage.unended = [UnendedLaunch(run_id="r" * 100, attempt=1, launched_at=AT)] * 20_000
    reads = asyncio.Event()
    reads.set()
    async with (
        proxy_that_waits(served.address, reads) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        await asyncio.wait_for(channel.channel_ready(), 20)
        reads.clear()
        call = RecoveryServiceStub(channel).GetRecoveryStatus(
            recovery_pb.GetRecoveryStatusRequest()
        )
        await asyncio.wait_for(served.storage.has_read.wait(), 10)

        stop = asyncio.create_task(served.grpc_server.stop(grace_s=30))
        await asyncio.wait({stop}, timeout=0.5)
        reads.set()

        answer = await asyncio.wait_for(call, 20)
        assert len(answer.unended_launches) == 20_000
        await stop


def highest_descriptor() -> int:
    return max(int(one.name) for one in Path("/proc/self/fd").iterdir())


async def test_stop_without_a_free_descriptor_ends_the_server(served: FakedServer) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = highest_descriptor()
    taken: list[int] = []
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 5, before[1]))
    try:
        with suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        await served.grpc_server.stop(grace_s=0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for descriptor in taken:
            os.close(descriptor)

    host, _, port = served.address.rpartition(":")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((host, int(port)))


async def test_removed_socket_is_bound_again_after_it_could_not_be_checked(
    tmp_path: Path,
) -> None:
    folder, aside = tmp_path / "f", tmp_path / "g"
    folder.mkdir()
    run_deps, recovery_deps = deps(FakeStorage(), Workspaces(tmp_path / "runs"))
    server = server_with(
        Gate(),
        run_deps,
        recovery_deps,
        limits=limits(max_concurrent_calls=1, max_request_bytes=1000),
    )
    await server.bind(f"unix:{folder}/s")
    with capture_logs() as logs:
        folder.rename(aside)
        folder.write_bytes(b"")
        await until(lambda: any(one["event"] == "rpc.address_not_seen" for one in logs))
        folder.unlink()
        aside.rename(folder)
        (folder / "s").unlink()

        await until((folder / "s").exists)
    await server.stop(grace_s=0)
    assert [one["event"] for one in logs].count("rpc.address_not_seen") == 1


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - files and log lines announce nothing
            await asyncio.sleep(0.01)


async def test_idle_connection_makes_room_for_another(tmp_path: Path) -> None:
    run_deps, recovery_deps = deps(FakeStorage(), Workspaces(tmp_path / "runs"))
    server = server_with(
        Gate(),
        run_deps,
        recovery_deps,
        limits=replace(
            limits(max_concurrent_calls=1, max_request_bytes=1000), max_connections=1, idle_s=0.5
        ),
    )
    port = await server.bind("127.0.0.1:0")
    apart = (("grpc.use_local_subchannel_pool", 1),)
    async with (
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=apart) as idle,
        grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=apart) as other,
    ):
        asked = recovery_pb.GetRecoveryStatusRequest()
        await RecoveryServiceStub(idle).GetRecoveryStatus(asked)

        await RecoveryServiceStub(other).GetRecoveryStatus(asked, wait_for_ready=True, timeout=20)
    await server.stop(grace_s=0)
