"""A client that knows nothing but reflection can call everything."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor import ServiceDescriptor
from google.protobuf.json_format import MessageToDict, ParseDict
from grpc_reflection.v1alpha import reflection_pb2
from support.api import CALL_TIMEOUT_S, NO_RETRY, Api
from support.engines import GOOD_ENGINES
from support.service import Home
from support.webhook_receiver import SECRET

BUF: Final = Path(sys.executable).with_name("buf")
RUNS: Final = "runrecovery.v1.RunService"
RECOVERY: Final = "runrecovery.v1.RecoveryService"
HEALTH: Final = "grpc.health.v1.Health"
V1: Final = "grpc.reflection.v1.ServerReflection"
V1ALPHA: Final = "grpc.reflection.v1alpha.ServerReflection"
EVERY_METHOD: Final = {
    f"{RUNS}/CancelRun",
    f"{RUNS}/CreateRun",
    f"{RUNS}/GetRun",
    f"{RUNS}/ListInteractions",
    f"{RUNS}/ListRuns",
    f"{RUNS}/ReopenRun",
    f"{RUNS}/StreamOutput",
    f"{RUNS}/SubmitReply",
    f"{RUNS}/WatchRun",
    f"{RECOVERY}/ExplainRecovery",
    f"{RECOVERY}/PlanRecovery",
    f"{RECOVERY}/WatchRecovered",
    f"{RECOVERY}/GetReconciliation",
    f"{RECOVERY}/Prune",
    f"{RECOVERY}/ListWebhooks",
    f"{RECOVERY}/RetryWebhook",
    f"{RECOVERY}/GetInstances",
    f"{RECOVERY}/GetRecoveryInfo",
    f"{RECOVERY}/GetRecoveryStatus",
    f"{RECOVERY}/ListReconciliations",
    f"{RECOVERY}/ListRecovered",
}
NEEDS_A_RESTART: Final = f"{RUNS}/ReopenRun"
"""Tried in tests/crash/test_reopen_run.py."""
QUESTION: Final = {"kind": "confirm", "prompt": "Go on?"}

Json = dict[str, Any]
Call = Callable[[str, Json], list[Json]]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    """A home with a webhook that gets nothing: no recovery decides on any run."""
    path = tmp_path_factory.mktemp("reflected")
    (path / "secret").write_text(SECRET)
    webhook = {
        "name": "chat",
        "url": "http://127.0.0.1:9/hidden",
        "secret_file": str(path / "secret"),
        "events": ["RECOVERED"],
        "allow_private": True,
    }
    with Home(path, engines=GOOD_ENGINES, webhooks=[webhook]) as home:
        yield home


class Stranger:
    """A client that is built from the answers of reflection alone."""

    def __init__(self, channel: grpc.Channel, reflection: str) -> None:
        self._channel = channel
        self._ask = channel.stream_stream(
            f"/{reflection}/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
        self._pool = descriptor_pool.DescriptorPool()
        self._known: set[str] = set()

    def ask(self, **question: Any) -> Any:
        """Ask reflection one question."""
        request = reflection_pb2.ServerReflectionRequest(**question)
        (answer,) = self._ask(iter([request]), timeout=CALL_TIMEOUT_S)
        return answer

    def services(self) -> set[str]:
        """The services that are listed."""
        listed = self.ask(list_services="").list_services_response
        return {service.name for service in listed.service}

    def service(self, name: str) -> ServiceDescriptor:
        """The description of a service."""
        answer = self.ask(file_containing_symbol=name).file_descriptor_response
        self._learn([bytes(one) for one in answer.file_descriptor_proto])
        return self._pool.FindServiceByName(name)

    def _learn(self, files: list[bytes]) -> None:
        waiting = [descriptor_pb2.FileDescriptorProto.FromString(file) for file in files]
        while waiting:
            ready = [f for f in waiting if self._known.issuperset(f.dependency)]
            assert ready, f"imports are missing: {[f.name for f in waiting]}"
            for file in ready:
                if file.name not in self._known:
                    self._pool.AddSerializedFile(file.SerializeToString())
                    self._known.add(file.name)
            waiting = [file for file in waiting if file not in ready]

    def call(self, method: str, request: Json, *, take: int | None = None) -> list[Json]:
        """Call a method with JSON; return its answers (of a stream, `take` at most)."""
        service, _, name = method.partition("/")
        described = self.service(service).methods_by_name[name]
        wanted = message_factory.GetMessageClass(described.input_type)
        given = message_factory.GetMessageClass(described.output_type)
        kind = "unary_stream" if described.server_streaming else "unary_unary"
        invoke = getattr(self._channel, kind)(
            f"/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=given.FromString,
        )
        message = ParseDict(request, wanted(), descriptor_pool=self._pool)
        answer = invoke(message, timeout=CALL_TIMEOUT_S)
        if not described.server_streaming:
            return [MessageToDict(answer)]
        answers = [MessageToDict(one) for one in islice(answer, take)]
        answer.cancel()
        return answers


@pytest.fixture(params=[V1, V1ALPHA])
def stranger(home: Home, api: Api, request: pytest.FixtureRequest) -> Iterator[Stranger]:
    with grpc.insecure_channel(home.services[-1].address, options=NO_RETRY) as channel:
        yield Stranger(channel, request.param)


def buf_curl(address: str, method: str, request: Json) -> list[Json]:
    """Call a method with `buf curl`, which learns the contract by reflection."""
    done = subprocess.run(
        [
            str(BUF), "curl", "--http2-prior-knowledge", "--protocol", "grpc",
            "--data", json.dumps(request), f"http://{address}/{method}",
        ],
        capture_output=True,
        text=True,
        timeout=CALL_TIMEOUT_S,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    decoder, rest, answers = json.JSONDecoder(), done.stdout.strip(), []
    while rest:
        answer, end = decoder.raw_decode(rest)
        answers.append(answer)
        rest = rest[end:].strip()
    return answers or [{}]


def buf_curl_first(address: str, method: str, request: Json) -> list[Json]:
    """Call a stream that has no end, and leave after its first answer."""
    popen = subprocess.Popen(
        [
            str(BUF), "curl", "--http2-prior-knowledge", "--protocol", "grpc",
            "--data", json.dumps(request), f"http://{address}/{method}",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert popen.stdout is not None
    told, decoder = "", json.JSONDecoder()
    try:
        for line in popen.stdout:
            told += line
            with suppress(ValueError):
                return [decoder.decode(told)]
    finally:
        popen.kill()
        popen.wait()
        popen.stdout.close()
    raise AssertionError(f"it told nothing: {told}")


def drive_every_method(api: Api, call: Call, first: Call) -> set[str]:
    """Let a run be asked, answered and read, another canceled; return the methods called.

    `first` calls a stream that has no end.
    """
    called: set[str] = set()

    def ask(method: str, request: Json) -> Json:
        called.add(method)
        return call(method, request)[0]

    run_id = f"s-{uuid.uuid4()}"
    given = {"runId": run_id, "engine": "resumable", "input": {"questions": [QUESTION]}}
    assert ask(f"{RUNS}/CreateRun", given)["run"]["runId"] == run_id
    api.until_status(run_id, "WAITING_USER")
    got = ask(f"{RUNS}/GetRun", {"runId": run_id})["run"]
    assert got["pendingInteraction"]["prompt"] == "Go on?"
    answer = {"runId": run_id, "interactionId": 1, "response": "yes"}
    assert ask(f"{RUNS}/SubmitReply", answer)["run"]["runId"] == run_id
    api.until_status(run_id, "SUCCEEDED")
    pieces = ask(f"{RUNS}/StreamOutput", {"runId": run_id})
    assert pieces["data"]
    asked = ask(f"{RUNS}/ListInteractions", {"runId": run_id})["interactions"]
    assert [one["response"] for one in asked] == ["yes"]
    assert ask(f"{RUNS}/ListRuns", {"pageSize": 1})["runs"]
    watched = ask(f"{RUNS}/WatchRun", {"runId": run_id, "afterSequence": 0})
    assert watched["event"]["kind"] == "RUN_EVENT_KIND_CREATED"

    other = api.create("resumable", {"hold": True})
    assert ask(f"{RUNS}/CancelRun", {"runId": other.run_id})["run"]["runId"] == other.run_id
    api.until_status(other.run_id, "CANCELED")

    assert ask(f"{RECOVERY}/GetRecoveryInfo", {"runId": run_id})["recovery"] == {
        "recoveryState": "RECOVERY_STATE_NONE"
    }
    assert ask(f"{RECOVERY}/ListRecovered", {}) == {}
    assert ask(f"{RECOVERY}/ExplainRecovery", {"runId": run_id}) == {}
    assert ask(f"{RECOVERY}/PlanRecovery", {}) == {"plan": {}}
    called.add(f"{RECOVERY}/WatchRecovered")
    assert first(f"{RECOVERY}/WatchRecovered", {})[0]["bookmark"] == {}
    status = ask(f"{RECOVERY}/GetRecoveryStatus", {})
    assert status["state"] == "SERVICE_STATE_SERVING"
    (instance,) = ask(f"{RECOVERY}/GetInstances", {})["instances"]
    assert (instance["name"], instance["alive"]) == (status["instance"], True)
    report_id = status["reconciliation"]["reconciliationId"]
    (report,) = ask(f"{RECOVERY}/ListReconciliations", {})["reconciliations"]
    assert report["reconciliationId"] == report_id
    got = ask(f"{RECOVERY}/GetReconciliation", {"reconciliationId": report_id})
    assert got["reconciliation"] == report
    assert ask(f"{RECOVERY}/Prune", {"dryRun": True}) == {"done": True}
    (webhook,) = ask(f"{RECOVERY}/ListWebhooks", {})["webhooks"]
    assert (webhook["name"], webhook["origin"]) == ("chat", "http://127.0.0.1:9")
    assert ask(f"{RECOVERY}/RetryWebhook", {"name": "chat"}) == {}
    return called


def test_buf_curl_calls_every_method_by_reflection(home: Home, api: Api) -> None:
    address = home.services[-1].address

    called = drive_every_method(api, partial(buf_curl, address), partial(buf_curl_first, address))

    assert called == EVERY_METHOD - {NEEDS_A_RESTART}


def test_buf_curl_lists_every_service_and_method(home: Home, api: Api) -> None:
    done = subprocess.run(
        [
            str(BUF), "curl", "--http2-prior-knowledge", "--protocol", "grpc",
            "--list-methods", f"http://{home.services[-1].address}",
        ],
        capture_output=True,
        text=True,
        timeout=CALL_TIMEOUT_S,
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    listed = set(done.stdout.split())
    assert listed >= EVERY_METHOD | {f"{HEALTH}/Check", f"{HEALTH}/Watch", f"{HEALTH}/List"}
    assert {f"{V1}/ServerReflectionInfo", f"{V1ALPHA}/ServerReflectionInfo"} <= listed


def test_reflection_alone_is_enough_to_drive_every_method(api: Api, stranger: Stranger) -> None:
    called = drive_every_method(api, stranger.call, partial(stranger.call, take=1))

    described = {
        f"{service}/{method.name}"
        for service in (RUNS, RECOVERY)
        for method in stranger.service(service).methods
    }
    assert described == EVERY_METHOD
    assert called == EVERY_METHOD - {NEEDS_A_RESTART}


def test_reflection_lists_exactly_what_is_served(stranger: Stranger) -> None:
    assert stranger.services() == {RUNS, RECOVERY, HEALTH, V1, V1ALPHA}


def test_reflection_alone_is_enough_to_ask_for_health(stranger: Stranger) -> None:
    assert stranger.call(f"{HEALTH}/Check", {}) == [{"status": "SERVING"}]
    assert stranger.call(f"{HEALTH}/Watch", {"service": RUNS}, take=1) == [{"status": "SERVING"}]
    (listed,) = stranger.call(f"{HEALTH}/List", {})

    serving = {"status": "SERVING"}
    assert listed["statuses"] == {
        "": serving,
        RUNS: serving,
        RECOVERY: serving,
        "liveness": serving,
    }


@pytest.mark.parametrize("method", sorted(EVERY_METHOD | {f"{HEALTH}/Check"}))
def test_a_method_is_found_by_its_full_name(stranger: Stranger, method: str) -> None:
    answer = stranger.ask(file_containing_symbol=method.replace("/", "."))

    assert answer.WhichOneof("message_response") == "file_descriptor_response"


@pytest.mark.parametrize("symbol", ["runrecovery.v1.Nothing", f"{RUNS}.Nothing", "", "\x00"])
def test_an_unknown_symbol_is_not_found_and_the_stream_goes_on(
    stranger: Stranger, symbol: str
) -> None:
    assert stranger.ask(file_containing_symbol=symbol).error_response.error_code == 5


def test_health_does_not_know_other_names(api: Api) -> None:
    with pytest.raises(grpc.RpcError) as failed:
        api.health_of("nobody")

    assert failed.value.code() is grpc.StatusCode.NOT_FOUND
