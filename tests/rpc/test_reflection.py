from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import descriptor_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2 as pb
from runrecovery_service.rpc.gate import Gate
from runrecovery_service.rpc.health import HealthServicer
from runrecovery_service.rpc.reflection import V1, V1ALPHA, ReflectionServicer
from runrecovery_service.rpc.server import (
    RECOVERY_SERVICE,
    RUN_SERVICE,
    health_handlers,
    reflection_handlers,
)

BUF = Path(sys.executable).with_name("buf")
SERVICES = [RUN_SERVICE.full_name, RECOVERY_SERVICE.full_name, "grpc.health.v1.Health"]
NOT_FOUND = grpc.StatusCode.NOT_FOUND.value[0]


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def address(gate: Gate) -> AsyncIterator[str]:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(reflection_handlers(ReflectionServicer(SERVICES, gate)))
    server.add_generic_rpc_handlers((health_handlers(HealthServicer(gate)),))
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
async def test_symbol_leads_to_its_file(symbol: str, file: str, address: str) -> None:
    answer = await ask(address, V1, file_containing_symbol=symbol)

    assert file_names(answer)[0] == file


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
async def test_what_there_is_not_is_answered_not_found(
    question: dict[str, Any], address: str
) -> None:
    answer = await ask(address, V1, **question)

    assert answer.error_response.error_code == NOT_FOUND
    assert answer.original_request == pb.ServerReflectionRequest(**question)


async def test_question_for_nothing_is_invalid(address: str) -> None:
    answer = await ask(address, V1)

    assert answer.error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


async def test_type_without_extensions_has_none(address: str) -> None:
    answer = await ask(address, V1, all_extension_numbers_of_type="runrecovery.v1.Run")

    assert answer.all_extension_numbers_response.base_type_name == "runrecovery.v1.Run"
    assert not answer.all_extension_numbers_response.extension_number


async def test_open_stream_ends_when_the_service_drains(address: str, gate: Gate) -> None:
    async with grpc.aio.insecure_channel(address) as channel:
        call = channel.stream_stream(
            f"/{V1}/ServerReflectionInfo",
            request_serializer=pb.ServerReflectionRequest.SerializeToString,
            response_deserializer=pb.ServerReflectionResponse.FromString,
        )()
        await call.write(pb.ServerReflectionRequest(list_services=""))
        await call.read()
        gate.drain()

        assert await asyncio.wait_for(call.read(), 10) is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


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
