"""Server reflection, v1 and v1alpha, for grpcurl, `buf curl` and the like.

Both versions have the same wire format, so one servicer with the v1alpha messages serves both. Only
the descriptor of v1 has to be built, for callers that ask for it.

Descriptors in generated Python code have no comments and no `json_name`. Without the latter grpcurl
prints `run_id` instead of `runId`. The contract is therefore served as protoc wrote it
(`contract.binpb`, from `make proto`), and `json_name` is added here for other packages.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any, Final, TypeAlias

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.descriptor import Descriptor, FileDescriptor

# Imported for the pool: callers look up the details of our errors by name.
from google.rpc import error_details_pb2  # noqa: F401
from grpc_reflection.v1alpha import reflection_pb2 as pb

from runrecovery_service.domain.errors import ShuttingDown
from runrecovery_service.rpc import errors
from runrecovery_service.rpc.gate import Gate

V1: Final = "grpc.reflection.v1.ServerReflection"
V1ALPHA: Final = "grpc.reflection.v1alpha.ServerReflection"
CONTRACT: Final = "contract.binpb"
_V1_FILE: Final = "grpc/reflection/v1/reflection.proto"

LAST_REQUEST_S: Final = 0.5
"""While the service drains: how long a stream waits for its next request before it fails."""

# The package ships no types for mypy.
Request: TypeAlias = Any
Response: TypeAlias = Any
Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def add_v1_descriptor(pool: descriptor_pool.DescriptorPool) -> None:
    """Add the descriptor of reflection v1 to the pool, unless it is there."""
    try:
        pool.FindFileByName(_V1_FILE)
    except KeyError:
        pool.AddSerializedFile(_v1_file().SerializeToString())


def _v1_file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(file)
    alpha, file.name, file.package = f".{file.package}.", _V1_FILE, "grpc.reflection.v1"
    typed = [field for message in file.message_type for field in message.field if field.type_name]
    for field in typed:
        field.type_name = field.type_name.replace(alpha, ".grpc.reflection.v1.")
    for method in file.service[0].method:
        method.input_type = method.input_type.replace(alpha, ".grpc.reflection.v1.")
        method.output_type = method.output_type.replace(alpha, ".grpc.reflection.v1.")
    return file


def contract_files() -> dict[str, bytes]:
    """Return the contract's files and their imports by name, with comments and JSON names."""
    data = Path(__file__).with_name(CONTRACT).read_bytes()
    described = descriptor_pb2.FileDescriptorSet.FromString(data)
    return {file.name: file.SerializeToString() for file in described.file}


def with_json_names(file: FileDescriptor) -> bytes:
    """Return a file of the pool with the `json_name` of every field, as protoc writes it."""
    proto = descriptor_pb2.FileDescriptorProto()
    file.CopyToProto(proto)
    for message in proto.message_type:
        _name_fields(message, file.message_types_by_name[message.name])
    return proto.SerializeToString()


def _name_fields(message: descriptor_pb2.DescriptorProto, described: Descriptor) -> None:
    for field in message.field:
        field.json_name = described.fields_by_name[field.name].json_name
    for nested in message.nested_type:
        _name_fields(nested, described.nested_types_by_name[nested.name])


class ReflectionServicer:
    """Describes the services in the default descriptor pool."""

    def __init__(self, services: Iterable[str], gate: Gate) -> None:
        self._pool = descriptor_pool.Default()
        add_v1_descriptor(self._pool)
        self._contract = contract_files()
        self._services = tuple(sorted({*services, V1, V1ALPHA}))
        self._gate = gate
        self._answers: dict[str, Callable[[Request], Response]] = {
            "list_services": self._list_services,
            "file_by_filename": self._file_by_name,
            "file_containing_symbol": self._file_of_symbol,
            "file_containing_extension": self._file_of_extension,
            "all_extension_numbers_of_type": self._extension_numbers,
        }

    async def ServerReflectionInfo(  # noqa: N802 - gRPC's name
        self, requests: AsyncIterator[Request], context: Context
    ) -> AsyncIterator[Response]:
        """Answer each request in turn, until the requests end.

        Once the service drains, the stream fails with SHUTTING_DOWN when no request comes for
        `LAST_REQUEST_S`. With OK, a caller that asks at this moment would believe that its request
        was answered.
        """
        draining = asyncio.create_task(self._wait_until_draining())
        try:
            while (request := await _next(requests, draining)) is not None:
                yield self._answer(request)
        except TimeoutError:
            status = errors.status_of(ShuttingDown())
            await context.abort(status.code, status.message, trailing_metadata=status.trailers)
        finally:
            draining.cancel()

    async def _wait_until_draining(self) -> None:
        while not self._gate.ends_streams:
            await self._gate.change.wait()

    def _answer(self, request: Request) -> Response:
        answer = self._answers.get(request.WhichOneof("message_request"))
        if answer is None:
            response = _error(grpc.StatusCode.INVALID_ARGUMENT, "the request asks for nothing")
        else:
            try:
                response = answer(request)
            except KeyError:
                response = _error(grpc.StatusCode.NOT_FOUND, "not found")
        response.valid_host = request.host
        response.original_request.CopyFrom(request)
        return response

    def _list_services(self, _request: Request) -> Response:
        response = pb.ServerReflectionResponse()
        for name in self._services:
            response.list_services_response.service.add(name=name)
        return response

    def _file_by_name(self, request: Request) -> Response:
        return self._files(self._pool.FindFileByName(request.file_by_filename))

    def _file_of_symbol(self, request: Request) -> Response:
        return self._files(self._find(request.file_containing_symbol))

    def _find(self, symbol: str) -> FileDescriptor:
        try:
            return self._pool.FindFileContainingSymbol(symbol)
        except KeyError:
            # The pool does not find methods by their full name, but grpcurl asks for them.
            service, _, method = symbol.rpartition(".")
            found = self._pool.FindServiceByName(service)
            return found.methods_by_name[method].containing_service.file

    def _file_of_extension(self, request: Request) -> Response:
        wanted = request.file_containing_extension
        extended = self._pool.FindMessageTypeByName(wanted.containing_type)
        found: Any = self._pool.FindExtensionByNumber(extended, wanted.extension_number)
        return self._files(found.file)  # the stubs do not know `file`

    def _extension_numbers(self, request: Request) -> Response:
        extended = self._pool.FindMessageTypeByName(request.all_extension_numbers_of_type)
        response = pb.ServerReflectionResponse()
        response.all_extension_numbers_response.base_type_name = extended.full_name
        response.all_extension_numbers_response.extension_number.extend(
            sorted(extension.number for extension in self._pool.FindAllExtensions(extended))
        )
        return response

    def _files(self, file: FileDescriptor) -> Response:
        """Return a file and everything that it imports, each file once."""
        response = pb.ServerReflectionResponse()
        seen: dict[str, FileDescriptor] = {}
        waiting = [file]
        while waiting:
            next_file = waiting.pop()
            if next_file.name not in seen:
                seen[next_file.name] = next_file
                waiting.extend(next_file.dependencies)
        response.file_descriptor_response.file_descriptor_proto.extend(
            self._contract.get(one.name) or with_json_names(one) for one in seen.values()
        )
        return response


async def _next(requests: AsyncIterator[Request], stop: asyncio.Task[None]) -> Request | None:
    """Return the next request; None when the requests end.

    After `stop` a pause leaves time to answer a request that the caller has already sent.

    Raises:
        TimeoutError: `stop` is done, and no request came for `LAST_REQUEST_S`.
    """
    coming = asyncio.ensure_future(anext(requests, None))
    try:
        await asyncio.wait({coming, stop}, return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            async with asyncio.timeout(LAST_REQUEST_S):
                await coming
        return coming.result()
    finally:
        coming.cancel()


def _error(code: grpc.StatusCode, message: str) -> Response:
    response = pb.ServerReflectionResponse()
    response.error_response.error_code = code.value[0]
    response.error_response.error_message = message
    return response
