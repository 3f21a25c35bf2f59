"""A command that runs in the test, and a scripted server that it asks."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from runrecovery.v1 import recovery_service_pb2, run_pb2
from runrecovery_service import logs
from runrecovery_service.cli import main


@dataclass
class Ended:
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a command line in this process, in an empty directory, with logging left alone."""
    monkeypatch.setattr(logs, "configure", lambda *_: None)
    for name in ("stdin", "stdout", "stderr"):  # the command makes its own of them
        monkeypatch.setattr(sys, name, getattr(sys, name))
    monkeypatch.setenv("GRPC_VERBOSITY", "NONE")
    monkeypatch.chdir(tmp_path)
    for variable in [name for name in os.environ if name.startswith("RUNRECOVERY_")]:
        monkeypatch.delenv(variable)

    def run(*arguments: str) -> Ended:
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        said = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(int(ended.value.code), said.out, said.err)

    return run


@dataclass
class Script(grpc.GenericRpcHandler):
    """A server that answers each method as it is told, and keeps what it was asked."""

    answers: dict[str, list[Message] | tuple[grpc.StatusCode, str]] = field(default_factory=dict)
    streams: dict[str, Callable[[bytes, grpc.ServicerContext], Iterator[Message]]] = field(
        default_factory=dict
    )
    asked: list[tuple[str, bytes]] = field(default_factory=list)
    address: str = ""

    def service(
        self, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, Message] | None:
        name = details.method.rpartition("/")[2]

        def answer(request: bytes, context: grpc.ServicerContext) -> Iterator[Message]:
            self.asked.append((name, request))
            if name in self.streams:
                yield from self.streams[name](request, context)
                return
            said = self.answers[name]
            if isinstance(said, tuple):
                _abort(context, *said)
            else:
                yield from said

        return grpc.unary_stream_rpc_method_handler(
            answer, response_serializer=lambda message: message.SerializeToString()
        )


def _abort(context: grpc.ServicerContext, code: grpc.StatusCode, reason: str) -> None:
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="runrecovery"))
    status = status_pb2.Status(code=code.value[0], message="scripted", details=[info])
    context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
    context.abort(code, "scripted")


@pytest.fixture
def server() -> Iterator[Script]:
    script = Script()
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(2))
        grpc_server = grpc.server(threads, handlers=[script])
        script.address = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
        grpc_server.start()
        stack.callback(lambda: grpc_server.stop(None).wait())
        yield script


def watching(server: Script, *updates: Message) -> Script:
    server.answers["GetRecoveryStatus"] = [recovery_service_pb2.GetRecoveryStatusResponse()]
    server.answers["WatchRun"] = list(updates)
    return server


def a_run(
    run_id: str = "r",
    *,
    engine: str = "e",
    status: run_pb2.RunStatus.ValueType = run_pb2.RUN_STATUS_QUEUED,
) -> run_pb2.Run:
    return run_pb2.Run(run_id=run_id, engine=engine, status=status)
