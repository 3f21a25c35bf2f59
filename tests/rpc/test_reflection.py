from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2 as pb
from runrecovery.v1 import (
    errors_pb2,
    recovery_pb2,
    recovery_service_pb2,
    run_pb2,
    run_service_pb2,
)
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.health import HealthServicer
from runrecovery_service.rpc.method_handlers import (
    RECOVERY_SERVICE,
    RUN_SERVICE,
    health_handlers,
    reflection_handlers,
)
from runrecovery_service.rpc.open_calls import OpenCalls
from runrecovery_service.rpc.reflection import (
    V1,
    V1ALPHA,
    ReflectionServicer,
    contract_files,
    with_json_names,
)
from support.api import refusal_of

BUF = Path(sys.executable).with_name("buf")
SERVICES = [RUN_SERVICE.full_name, RECOVERY_SERVICE.full_name, "grpc.health.v1.Health"]
NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def address(gate: Gate) -> AsyncIterator[str]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(
        reflection_handlers(ReflectionServicer(SERVICES, gate), OpenCalls())
    )
    server.add_generic_rpc_handlers((health_handlers(HealthServicer(gate), OpenCalls()),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def ask(address: str, service: str, **question: Any) -> Any:
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(
            f"/{service}/ServerReflectionInfo",
            request_serializer=pb.ServerReflectionRequest.SerializeToString,
            response_deserializer=pb.ServerReflectionResponse.FromString,
        )
        (answer,) = [one async for one in call(iter([pb.ServerReflectionRequest(**question)]))]
        return answer


def file_names(answer: Any) -> list[str]:
    return [
        descriptor_pb2.FileDescriptorProto.FromString(data).name
        for data in answer.file_descriptor_response.file_descriptor_proto
    ]


@pytest.mark.parametrize("version", [V1, V1ALPHA])
async def test_both_versions_list_every_service(version: str, address: str) -> None:
    answer = await ask(address, version, list_services="")

    names = [service.name for service in answer.list_services_response.service]
    assert names == sorted([*SERVICES, V1, V1ALPHA])


@pytest.mark.parametrize(
    ("symbol", "file"),
    [
        ("runrecovery.v1.RunService", "runrecovery/v1/run_service.proto"),
        ("runrecovery.v1.RunService.GetRun", "runrecovery/v1/run_service.proto"),
        ("runrecovery.v1.Run", "runrecovery/v1/run.proto"),
        ("runrecovery.v1.Run.etag", "runrecovery/v1/run.proto"),
        ("runrecovery.v1.RunStatus", "runrecovery/v1/run.proto"),
        ("google.rpc.ErrorInfo", "google/rpc/error_details.proto"),
        (V1, "grpc/reflection/v1/reflection.proto"),
        (f"{V1}.ServerReflectionInfo", "grpc/reflection/v1/reflection.proto"),
        (V1ALPHA, "grpc_reflection/v1alpha/reflection.proto"),
    ],
)
async def test_a_symbol_finds_its_file(symbol: str, file: str, address: str) -> None:
    answer = await ask(address, V1, file_containing_symbol=symbol)

    assert file_names(answer)[0] == file


async def files_of(address: str, symbol: str) -> dict[str, descriptor_pb2.FileDescriptorProto]:
    answer = await ask(address, V1, file_containing_symbol=symbol)
    files = answer.file_descriptor_response.file_descriptor_proto
    return {
        file.name: file
        for file in (descriptor_pb2.FileDescriptorProto.FromString(f) for f in files)
    }


def json_names(
    messages: Iterable[descriptor_pb2.DescriptorProto], *, below: str = ""
) -> Iterator[tuple[str, str]]:
    for message in messages:
        path = f"{below}{message.name}."
        yield from ((f"{path}{field.name}", field.json_name) for field in message.field)
        yield from json_names(message.nested_type, below=path)


@pytest.mark.parametrize(
    ("symbol", "field", "json_name"),
    [
        ("runrecovery.v1.RunService", "CreateRunRequest.run_id", "runId"),
        ("runrecovery.v1.Run", "Run.pending_interaction", "pendingInteraction"),
        ("runrecovery.v1.Run", "Run.LabelsEntry.key", "key"),
        ("google.protobuf.Value", "Value.string_value", "stringValue"),
        ("google.rpc.BadRequest", "BadRequest.field_violations", "fieldViolations"),
        ("google.rpc.Help", "Help.Link.url", "url"),
        ("grpc.health.v1.Health", "HealthListResponse.statuses", "statuses"),
        (V1, "ServerReflectionRequest.list_services", "listServices"),
        (V1ALPHA, "ServerReflectionRequest.list_services", "listServices"),
    ],
)
async def test_every_served_field_has_its_json_name(
    symbol: str, field: str, json_name: str, address: str
) -> None:
    files = await files_of(address, symbol)
    names = {
        name: given for file in files.values() for name, given in json_names(file.message_type)
    }

    assert names[field] == json_name
    assert [name for name, given in names.items() if not given] == []


async def test_descriptions_have_the_comments_of_the_contract(address: str) -> None:
    file = (await files_of(address, "runrecovery.v1.RunService"))[
        "runrecovery/v1/run_service.proto"
    ]
    comments = {tuple(at.path): at.leading_comments for at in file.source_code_info.location}

    assert comments[6, 0, 2, 0] == (
        " Records a run and queues it. The run is durable when this method returns.\n"
    )
    assert file.service[0].method[0].name == "CreateRun"


def test_every_file_names_its_package_for_other_languages() -> None:
    served = [
        descriptor_pb2.FileDescriptorProto.FromString(data) for data in contract_files().values()
    ]
    ours = [file.options for file in served if file.package == "runrecovery.v1"]

    assert len(ours) == 5
    for options in ours:
        assert options.go_package == "runrecovery/v1;runrecoveryv1"
        assert (options.java_package, options.java_multiple_files) == ("runrecovery.v1", True)
        assert options.csharp_namespace == "RunRecovery.V1"


def test_the_served_contract_is_that_of_the_generated_code() -> None:
    served = contract_files()

    for module in (errors_pb2, run_pb2, recovery_pb2, run_service_pb2, recovery_service_pb2):
        file = descriptor_pb2.FileDescriptorProto.FromString(served[module.DESCRIPTOR.name])
        file.ClearField("source_code_info")
        assert file.SerializeToString() == with_json_names(module.DESCRIPTOR)
    assert sum(name.startswith("runrecovery/") for name in served) == 5


async def test_file_comes_with_everything_that_it_imports_once(address: str) -> None:
    answer = await ask(address, V1, file_by_filename="runrecovery/v1/recovery_service.proto")

    assert sorted(file_names(answer)) == [
        "google/protobuf/duration.proto",
        "google/protobuf/struct.proto",
        "google/protobuf/timestamp.proto",
        "runrecovery/v1/recovery.proto",
        "runrecovery/v1/recovery_service.proto",
        "runrecovery/v1/run.proto",
    ]


@pytest.mark.parametrize(
    "question",
    [
        {"file_containing_symbol": "runrecovery.v1.Nothing"},
        {"file_containing_symbol": "runrecovery.v1.RunService.Nothing"},
        {"file_containing_symbol": ""},
        {"file_by_filename": "nothing.proto"},
        {"all_extension_numbers_of_type": "runrecovery.v1.Nothing"},
        {
            "file_containing_extension": {
                "containing_type": "runrecovery.v1.Run",
                "extension_number": 7,
            }
        },
    ],
    ids=str,
)
async def test_an_unknown_file_or_symbol_is_not_found(
    question: dict[str, Any], address: str
) -> None:
    answer = await ask(address, V1, **question)

    assert answer.error_response.error_code == NOT_FOUND
    assert answer.original_request == pb.ServerReflectionRequest(**question)


async def test_an_empty_request_is_invalid(address: str) -> None:
    answer = await ask(address, V1)

    assert answer.error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


async def test_type_without_extensions_has_none(address: str) -> None:
    answer = await ask(address, V1, all_extension_numbers_of_type="runrecovery.v1.Run")

    assert answer.all_extension_numbers_response.base_type_name == "runrecovery.v1.Run"
    assert not answer.all_extension_numbers_response.extension_number


async def test_an_open_stream_fails_as_other_calls_do_when_the_service_drains(
    address: str, gate: Gate
) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(
            f"/{V1}/ServerReflectionInfo",
            request_serializer=pb.ServerReflectionRequest.SerializeToString,
            response_deserializer=pb.ServerReflectionResponse.FromString,
        )()
        await call.write(pb.ServerReflectionRequest(list_services=""))
        await call.read()
        gate.drain()

        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await asyncio.wait_for(call.read(), 10)

    refusal = refusal_of(failed.value)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.UNAVAILABLE, "SHUTTING_DOWN")
    assert refusal.retry_after_s == 1.0


@pytest.mark.parametrize("name", [V1, V1ALPHA])
async def test_answers_what_is_asked_while_the_service_drains(
    name: str, address: str, gate: Gate
) -> None:
    gate.drain()
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(
            f"/{name}/ServerReflectionInfo",
            request_serializer=pb.ServerReflectionRequest.SerializeToString,
            response_deserializer=pb.ServerReflectionResponse.FromString,
        )()
        answers: list[Any] = []
        for question in ("runrecovery.v1.RunService", "runrecovery.v1.RecoveryService"):
            await call.write(pb.ServerReflectionRequest(file_containing_symbol=question))
            answers.append(await asyncio.wait_for(call.read(), 10))

        assert [answer.WhichOneof("message_response") for answer in answers] == [
            "file_descriptor_response",
            "file_descriptor_response",
        ]


async def buf_curl(address: str, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        BUF, "curl", "--http2-prior-knowledge", "--protocol", "grpc", *arguments,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, err.decode()
    return out.decode()


async def test_buf_curl_lists_methods(address: str) -> None:
    listed = await buf_curl(address, "--list-methods", f"http://{address}")

    assert "runrecovery.v1.RunService/GetRun" in listed.split()


async def test_buf_curl_lists_services(address: str) -> None:
    listed = await buf_curl(address, "--list-services", f"http://{address}")

    assert set(SERVICES) <= set(listed.split())


async def test_buf_curl_calls_by_reflection(address: str) -> None:
    answer = await buf_curl(
        address, "-d", '{"service": "liveness"}', f"http://{address}/grpc.health.v1.Health/Check"
    )

    status = health_pb2.HealthCheckResponse.ServingStatus.Name(1)
    assert json.loads(answer) == {"status": status}
