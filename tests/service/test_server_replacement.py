"""A request that breaks gRPC's server ends streams at most: a new server takes its address."""

from __future__ import annotations

import socket
from collections.abc import Callable

import grpc
import pytest
from fuzz.attacks import OPENING, call, headers, message
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refused
from support.service import Home, ServiceProcess
from support.waiting import until

BAD_PATHS = (b"/\xff", b"/runrecovery.v1.RunService/\xed\xa0\x80")


def break_server(service: ServiceProcess, path: bytes) -> None:
    """Make a call whose path is not UTF-8, and wait until the server was replaced."""
    before = len(service.events("rpc.server_replaced"))
    port = int(service.address.rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(OPENING + call(headers(path), message()))
        until(lambda: len(service.events("rpc.server_replaced")) > before, "it is replaced")


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_call_path_that_is_not_utf8_leaves_the_service_serving(
    new_home: Callable[..., Home], path: bytes
) -> None:
    service, api = new_home().start()
    run = api.create("resumable", {"hold": True})
    api.until_status(run.run_id, "RUNNING")

    for _ in range(3):
        break_server(service, path)
        service.until_serving()

    assert api.until_status(run.run_id, "RUNNING").attempt == 1
    assert service.stop() == 0


def test_streams_of_the_broken_server_end_with_unavailable(
    new_home: Callable[..., Home],
) -> None:
    service, api = new_home().start()
    run = api.create("resumable", {"hold": True})
    following = api.runs.StreamOutput(
        pb.StreamOutputRequest(run_id=run.run_id, follow=True), timeout=60.0
    )
    next(following)

    break_server(service, BAD_PATHS[0])

    assert refused(lambda: list(following)).code is grpc.StatusCode.UNAVAILABLE
    assert _is_served(service, run.run_id)


def _is_served(service: ServiceProcess, run_id: str) -> bool:
    api: Api = service.until_serving()
    return api.get(run_id).run_id == run_id
