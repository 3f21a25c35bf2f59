"""Both clients: the same methods, health, channels, options and proxies."""

from __future__ import annotations

import asyncio
import inspect
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import runrecovery as rr
from google.protobuf import wrappers_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from runrecovery import errors
from runrecovery._requests import check_health
from runrecovery.v1 import run_pb2, run_service_pb2
from support.scripted_server import ScriptedServer

if TYPE_CHECKING:
    from client.conftest import Caller, Connect

TWINS = [
    (rr.RunRecoveryClient, rr.AsyncRunRecoveryClient),
    (rr.Runs, rr.AsyncRuns),
    (rr.Recovery, rr.AsyncRecovery),
    (rr.Health, rr.AsyncHealth),
]


def _shape(kind: type[Any]) -> dict[str, list[tuple[str, Any, Any]]]:
    return {
        name: [(p.name, p.kind, p.default) for p in inspect.signature(method).parameters.values()]
        for name, method in vars(kind).items()
        if inspect.isfunction(method) and not name.startswith("_")
    }


@pytest.mark.parametrize(("sync", "aio"), TWINS, ids=lambda kind: kind.__name__)
def test_both_clients_have_the_same_methods_with_the_same_arguments(
    sync: type[Any], aio: type[Any]
) -> None:
    assert _shape(sync) == _shape(aio)


def test_everything_public_is_exported_and_exists() -> None:
    public_errors = {
        name
        for name, value in vars(errors).items()
        if inspect.isclass(value) and value.__module__ == errors.__name__
    }

    assert len(rr.__all__) == len(set(rr.__all__))
    assert all(hasattr(rr, name) for name in rr.__all__)
    assert public_errors <= set(rr.__all__)


@pytest.mark.parametrize("serving", [True, False])
async def test_returns_the_health_of_a_name(
    serving: bool,  # noqa: FBT001 - a parameter of the test
    caller: Caller,
    server: ScriptedServer,
) -> None:
    server.set_health("liveness", serving=serving)

    status = await caller.call("health.check", "liveness")

    assert status is (rr.ServingStatus.SERVING if serving else rr.ServingStatus.NOT_SERVING)


@pytest.mark.parametrize("name", list(rr.ServingStatus))
async def test_knows_every_health_status(name: str, caller: Caller, server: ScriptedServer) -> None:
    server.health.set("x", health_pb2.HealthCheckResponse.ServingStatus.Value(name))

    assert await caller.call("health.check", "x") == name


def test_a_health_status_of_a_newer_service_is_unknown() -> None:
    decode = check_health("x").decode

    for number in (4, -1):
        assert decode(wrappers_pb2.Int32Value(value=number).SerializeToString()) == "UNKNOWN"


async def test_a_health_name_that_does_not_exist_is_not_found(caller: Caller) -> None:
    with pytest.raises(rr.NotFound):
        await caller.call("health.check", "nothing")


async def test_a_health_check_without_a_server_fails_at_once(
    connect: Connect, reserved: str
) -> None:
    with pytest.raises(rr.Unavailable):
        await connect(reserved).call("health.check", timeout_s=30)


def test_works_beside_grpcio_health_checking(server: ScriptedServer) -> None:
    target = server.start()
    with rr.RunRecoveryClient(target) as client, grpc.insecure_channel(target) as channel:
        theirs = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())

        assert client.health.check() == "SERVING"
        assert theirs.status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize(
    "imports", ["runrecovery, grpc_health.v1.health", "grpc_health.v1.health, runrecovery"]
)
def test_can_be_imported_before_and_after_grpcio_health_checking(imports: str) -> None:
    subprocess.run([sys.executable, "-c", f"import {imports}"], check=True, timeout=60)


def test_imports_only_its_declared_dependencies() -> None:
    code = """
import sys, grpc, grpc.aio
def roots():
    return {name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names)
before = roots()
import runrecovery
print(*sorted(roots() - before - {"google"}))
"""

    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True
    )

    assert done.stdout.split() == ["runrecovery"]


def test_takes_either_a_target_or_a_channel() -> None:
    with pytest.raises(TypeError, match="target"):
        rr.RunRecoveryClient()
    with (
        grpc.insecure_channel("127.0.0.1:1") as channel,
        pytest.raises(TypeError, match="not both"),
    ):
        rr.RunRecoveryClient("127.0.0.1:1", channel=channel)


def test_an_async_client_is_made_inside_a_loop() -> None:
    with pytest.raises(RuntimeError, match="loop"):
        rr.AsyncRunRecoveryClient("127.0.0.1:1")


def test_leaves_a_channel_of_the_caller_open(server: ScriptedServer) -> None:
    server.on("GetRun", run_service_pb2.GetRunResponse(run=run_pb2.Run(run_id="r")))
    with grpc.insecure_channel(server.start(), options=rr.channel_options()) as channel:
        with rr.RunRecoveryClient(channel=channel) as client:
            client.runs.get("r")
        with rr.RunRecoveryClient(channel=channel) as again:
            assert again.runs.get("r").run_id == "r"


async def test_leaves_an_async_channel_of_the_caller_open(server: ScriptedServer) -> None:
    server.on("GetRun", run_service_pb2.GetRunResponse(run=run_pb2.Run(run_id="r")))
    async with grpc.aio.insecure_channel(server.start()) as channel:
        async with rr.AsyncRunRecoveryClient(channel=channel) as client:
            await client.runs.get("r")
        async with rr.AsyncRunRecoveryClient(channel=channel) as again:
            assert (await again.runs.get("r")).run_id == "r"


def test_closes_a_channel_of_its_own(server: ScriptedServer) -> None:
    with rr.RunRecoveryClient(server.start()) as client:
        client.health.check()

    with pytest.raises(ValueError, match="closed"):
        client.health.check()


def test_channel_options_of_the_caller_override_the_defaults() -> None:
    options = dict(rr.channel_options(options=[("grpc.keepalive_time_ms", 60_000)]))

    assert options["grpc.keepalive_time_ms"] == 60_000
    assert options["grpc.enable_retries"] == 1


@contextmanager
def proxied(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Name a proxy in the environment that accepts connections and answers none."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(30)
        for name in ("grpc_proxy", "https_proxy", "http_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.getsockname()[1]}")
        for name in ("no_grpc_proxy", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        yield proxy


@pytest.mark.parametrize(
    "form", ["127.0.0.1:{}", "localhost:{}", "dns:///localhost:{}", "ipv4:127.0.0.1:{}"]
)
async def test_uses_no_proxy_on_this_machine(
    form: str, connect: Connect, server: ScriptedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, port = server.start().rpartition(":")
    server.set_health("", serving=True)
    with proxied(monkeypatch):
        assert await connect(form.format(port)).call("health.check", timeout_s=30) == "SERVING"


async def test_uses_the_proxy_of_the_environment_elsewhere(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with proxied(monkeypatch) as proxy:
        checked = asyncio.ensure_future(connect("far.invalid:1").call("health.check", timeout_s=30))
        connection, _ = await asyncio.to_thread(proxy.accept)
        with connection:
            assert connection.recv(100).startswith(b"CONNECT far.invalid:1 ")
        with pytest.raises(rr.Unavailable):
            await checked


@pytest.mark.parametrize(
    ("target", "enabled"),
    [
        ("unix:/tmp/socket", 0),
        ("unix:///tmp/socket", 0),
        ("unix-abstract:name", 0),
        ("LOCALHOST.:1", 0),
        ("app.localhost:1", 0),
        ("127.8.9.10:1", 0),
        ("[::1]:1", 0),
        ("::1", 0),
        ("0.0.0.0:1", 0),
        ("[::]:1", 0),
        ("[::ffff:127.0.0.1]:1", 0),
        ("dns://1.1.1.1/localhost:1", 0),
        ("dns:localhost", 0),
        ("ipv4:127.0.0.1:1,127.0.0.2:1", 0),
        ("ipv6:%5B::1%5D:1", 0),
        ("ipv4:127.0.0.1:1,10.0.0.1:1", None),
        ("10.0.0.1:1", None),
        ("localhost.example.org:1", None),
        ("[2001:db8::1]:1", None),
        ("dns:///runrecovery:1", None),
        ("xds:///localhost", None),
    ],
)
def test_only_a_target_on_this_machine_goes_without_a_proxy(
    target: str, enabled: int | None
) -> None:
    assert dict(rr.channel_options(target=target)).get("grpc.enable_http_proxy") == enabled


def test_a_proxy_can_be_asked_for_on_this_machine() -> None:
    options = rr.channel_options(target="localhost:1", options=[("grpc.enable_http_proxy", 1)])

    assert dict(options)["grpc.enable_http_proxy"] == 1


def test_pings_no_more_often_than_the_service_allows() -> None:
    assert int(dict(rr.channel_options())["grpc.keepalive_time_ms"]) >= 30_000
