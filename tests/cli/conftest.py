"""Run commands in the process of the test, against a server with fixed answers."""

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
from google.protobuf.message import Message
from runrecovery.v1 import recovery_service_pb2, run_pb2
from runrecovery_service import logs
from runrecovery_service.cli import main
from support.scripted_server import Fail


@dataclass
class Ended:
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run a command line in this process, in an empty folder, without configuring the log."""
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
        written = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return Ended(int(ended.value.code), written.out, written.err)

    return run


@dataclass
class FixedAnswers(grpc.GenericRpcHandler):
    """A server that answers any method, health included, with the messages that a test gives it.

    Unlike `ScriptedServer` of tests/support, each method has one answer, of any type.

    Attributes:
        answers: by method: the messages of the answer, or an error.
        streams: by method: a function that makes the answer.
        asked: the requests so far: the name of the method, and the bytes.
        tokens: the values of `authorization` so far.
    """

    answers: dict[str, list[Message] | Fail] = field(default_factory=dict)
    streams: dict[str, Callable[[bytes, grpc.ServicerContext], Iterator[Message]]] = field(
        default_factory=dict
    )
    asked: list[tuple[str, bytes]] = field(default_factory=list)
    address: str = ""
    tokens: list[str | bytes] = field(default_factory=list)

    def service(
        self, details: grpc.HandlerCallDetails
    ) -> grpc.RpcMethodHandler[bytes, Message] | None:
        name = details.method.rpartition("/")[2]

        def answer(request: bytes, context: grpc.ServicerContext) -> Iterator[Message]:
            self.asked.append((name, request))
            metadata = context.invocation_metadata()
            self.tokens += [value for key, value in metadata if key == "authorization"]
            if name in self.streams:
                yield from self.streams[name](request, context)
                return
            scripted = self.answers[name]
            if isinstance(scripted, Fail):
                scripted.abort(context)
            else:
                yield from scripted

        return grpc.unary_stream_rpc_method_handler(
            answer, response_serializer=lambda message: message.SerializeToString()
        )


@pytest.fixture
def server() -> Iterator[FixedAnswers]:
    answers = FixedAnswers()
    with ExitStack() as stack:
        threads = stack.enter_context(ThreadPoolExecutor(2))
        grpc_server = grpc.server(threads, handlers=[answers])
        answers.address = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
        grpc_server.start()
        stack.callback(lambda: grpc_server.stop(None).wait())
        yield answers


def script_watch(server: FixedAnswers, *updates: Message) -> FixedAnswers:
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
