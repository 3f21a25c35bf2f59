"""The guard that admits callers: credentials, a table that is replaced, a log that is bounded."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextvars import Context
from hashlib import sha256
from typing import Any, NoReturn, cast

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import Message
from runrecovery.v1 import run_service_pb2
from runrecovery_service.domain.caller import Caller, Credentials
from runrecovery_service.domain.errors import CallerUnknown, EngineNotAllowed
from runrecovery_service.domain.role import Role
from runrecovery_service.rpc.callers import CALLER, CallerGuard, CallerTable
from runrecovery_service.rpc.gate import Access, Gate
from runrecovery_service.rpc.method_handlers import contract_methods, grpc_handlers
from runrecovery_service.rpc.method_wrapper import Method, MethodWrapper
from runrecovery_service.rpc.open_calls import OpenCalls
from runrecovery_service.rpc.refusal_pace import RefusalPace
from runrecovery_service.rpc.server import GrpcServer
from structlog.testing import capture_logs
from support.callers import credentials, token_of

SPIFFE = "spiffe://example.org/ci"
GET_RUN = run_service_pb2.DESCRIPTOR.services_by_name["RunService"].methods_by_name["GetRun"]


class Aborted(Exception):
    """A call was ended with this status."""


class FakeContext:
    """A call with a token or a certificate, and its end."""

    def __init__(
        self, token: str | None = None, certificate: Mapping[str, list[bytes]] | None = None
    ) -> None:
        self._metadata = () if token is None else (("authorization", f"Bearer {token}"),)
        self._certificate = certificate or {}

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self._metadata

    def auth_context(self) -> Mapping[str, list[bytes]]:
        return self._certificate

    def add_done_callback(self, _: object) -> None:
        pass

    def peer(self) -> str:
        return "ipv4:10.0.0.1:1234"

    async def abort(self, code: grpc.StatusCode, *_: object, **__: object) -> NoReturn:
        raise Aborted(code.name)


async def admitted(guard: CallerGuard, context: FakeContext, role: Role = Role.VIEWER) -> str:
    """Return the name of the admitted caller, or the status that the call ended with."""
    try:
        return (await guard.admit(cast("Any", context), "s.M", role)).name
    except Aborted as aborted:
        return str(aborted)


async def test_a_table_is_replaced_at_once_and_calls_in_progress_still_count() -> None:
    guard = CallerGuard(CallerTable([credentials("a", max_calls=1), credentials("b")]))
    first = await guard.admit(cast("Any", FakeContext(token_of("a"))), "s.M", Role.VIEWER)

    guard.replace_table(CallerTable([credentials("a", max_calls=1)]))

    assert await admitted(guard, FakeContext(token_of("b"))) == "UNAUTHENTICATED"
    assert await admitted(guard, FakeContext(token_of("a"))) == "RESOURCE_EXHAUSTED"
    guard.release(first)
    assert await admitted(guard, FakeContext(token_of("a"))) == "a"
    assert CALLER.get().name == "a"


@pytest.mark.parametrize(
    ("names", "caller"),
    [
        ({"peer_uri": [SPIFFE.encode()]}, "uri"),
        ({"peer_dns": [b"x.example", b"ci.example"]}, "dns"),
        ({"x509_common_name": [b"ci"]}, "common"),
        ({"peer_uri": [SPIFFE.encode()], "x509_common_name": [b"ci"]}, "uri"),
        ({"peer_dns": [b"CI.example"]}, "UNAUTHENTICATED"),
        ({"x509_common_name": [b"\xff"]}, "UNAUTHENTICATED"),
        ({"peer_uri": [b"urn:x"], "x509_common_name": [b"ci"]}, "UNAUTHENTICATED"),
        ({"peer_dns": [b"x.example"], "x509_common_name": [b"ci"]}, "UNAUTHENTICATED"),
        ({"peer_email": [b"a@x.example"], "x509_common_name": [b"ci"]}, "common"),
        ({"peer_dns": [SPIFFE.encode()]}, "UNAUTHENTICATED"),
        ({"x509_common_name": [SPIFFE.encode()]}, "UNAUTHENTICATED"),
        ({"peer_uri": [SPIFFE.encode()], "peer_dns": [b"ci.example"]}, "UNAUTHENTICATED"),
        ({"peer_dns": [b"ci.example", b"ci"]}, "UNAUTHENTICATED"),
        ({"peer_dns": [b"ci.example", b"ci.example"]}, "dns"),
        ({"peer_email": [b"ci"]}, "UNAUTHENTICATED"),
        ({}, "UNAUTHENTICATED"),
    ],
)
async def test_a_certificate_names_its_caller(names: dict[str, list[bytes]], caller: str) -> None:
    guard = CallerGuard(
        CallerTable(
            credentials(name, tokens=(), certificate_name=known)
            for name, known in {"uri": SPIFFE, "dns": "ci.example", "common": "ci"}.items()
        )
    )

    assert await admitted(guard, FakeContext(certificate=names)) == caller


async def test_a_wrong_token_is_refused_whatever_the_certificate() -> None:
    guard = CallerGuard(CallerTable([credentials("a", certificate_name="ci")]))
    certificate = {"x509_common_name": [b"ci"]}

    assert await admitted(guard, FakeContext(certificate=certificate)) == "a"
    assert await admitted(guard, FakeContext("wrong", certificate)) == "UNAUTHENTICATED"
    assert await admitted(guard, FakeContext("", certificate)) == "UNAUTHENTICATED"


@pytest.mark.parametrize("token", ["", "hunter2", "ab" * 32, "a token"])
async def test_a_weak_token_admits_nobody_even_if_its_digest_is_configured(token: str) -> None:
    digest = sha256(token.encode()).digest()
    guard = CallerGuard(CallerTable([credentials("a", tokens=(digest,))]))

    for _ in range(2):
        assert await admitted(guard, FakeContext(token)) == "UNAUTHENTICATED"


async def test_the_question_whether_a_call_would_be_admitted_counts_no_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guard = CallerGuard(CallerTable([credentials("a", max_calls_per_s=1)]))
    monkeypatch.setattr(guard, "now_s", lambda: 1000.0)
    context = FakeContext(token_of("a"))

    def would_admit() -> bool:
        return guard.would_admit(cast("Any", context), Role.VIEWER)

    assert [would_admit(), would_admit()] == [True, True]
    assert await admitted(guard, context) == "a"
    assert not would_admit()


def test_code_outside_of_a_call_sees_no_run() -> None:
    caller = Context().run(CALLER.get)

    assert caller.role < Role.REPLIER
    assert not caller.sees("reviewer")


async def test_ten_thousand_wrong_tokens_write_two_lines_and_hide_no_other_caller() -> None:
    guard = CallerGuard(CallerTable([credentials("a")]), pace=RefusalPace(max_waiting=0))
    with capture_logs() as logged:
        for number in range(10_000):
            assert await admitted(guard, FakeContext(f"wrong{number}")) == "UNAUTHENTICATED"
        assert await admitted(guard, FakeContext(token_of("a"))) == "a"
        denied = FakeContext(token_of("a"))
        assert await admitted(guard, denied, Role.OPERATOR) == "PERMISSION_DENIED"
        guard.log_refusals()
        guard.log_refusals()

    assert [(event["caller"], event["calls"]) for event in logged] == [
        ("", 1), ("a", 1), ("", 9_999),
    ]  # fmt: skip
    assert {event["event"] for event in logged} == {"rpc.call_refused"}
    assert not any("wrong" in str(event) for event in logged)


async def test_a_refused_engine_is_logged_like_other_refused_calls() -> None:
    gate, described = Gate(), GET_RUN
    gate.open()
    guard = CallerGuard(CallerTable([credentials("a")]))
    wrapper = MethodWrapper(gate, max_calls=1, max_streams=1, stall_s=1, guard=guard)
    method = Method(
        name=described.full_name,
        role=Role.VIEWER,
        access=Access.READ,
        request=message_factory.GetMessageClass(described.input_type),
    )

    async def refuse(_: Message) -> Message:
        raise EngineNotAllowed("a", "e")

    with capture_logs() as logged, pytest.raises(Aborted, match="PERMISSION_DENIED"):
        await wrapper.unary(method, refuse)(b"", cast("Any", FakeContext(token_of("a"))))

    assert [(one["event"], one["caller"], one["method"]) for one in logged] == [
        ("rpc.call_refused", "a", "runrecovery.v1.RunService.GetRun")
    ]
    assert logged[0]["reason"] == "caller 'a' may not create runs of engine 'e'"


async def test_calls_that_arrive_together_count_together_even_if_none_of_them_waits() -> None:
    gate = Gate()
    gate.open()
    guard = CallerGuard(CallerTable([credentials("a", max_calls=2), credentials("b")]))
    wrapper = MethodWrapper(gate, max_calls=100, max_streams=1, stall_s=1, guard=guard)
    method = Method(
        name=GET_RUN.full_name,
        role=Role.VIEWER,
        access=Access.READ,
        request=run_service_pb2.GetRunRequest,
    )

    async def respond(_: Message) -> Message:
        return run_service_pb2.GetRunResponse()

    handle = wrapper.unary(method, respond)

    async def call(name: str) -> str:
        try:
            await handle(b"", cast("Any", FakeContext(token_of(name))))
        except Aborted as aborted:
            return str(aborted)
        return "OK"

    for _ in range(2):  # the places are free again afterwards
        ended = await asyncio.gather(*(call(name) for name in "aaaabbb"))
        assert ended == ["OK", "OK", *["RESOURCE_EXHAUSTED"] * 2, "OK", "OK", "OK"]


async def test_refused_calls_are_logged_when_their_interval_ends_without_another() -> None:
    pace = RefusalPace(max_waiting=0)
    guard = CallerGuard(CallerTable([credentials("a")]), log_interval_s=0.01, pace=pace)
    with capture_logs() as logged:
        for _ in range(3):
            await admitted(guard, FakeContext("wrong"))
        async with asyncio.timeout(20):
            while len(logged) < 2:  # noqa: ASYNC110 - log lines announce nothing
                await asyncio.sleep(0.01)

    assert [event["calls"] for event in logged] == [1, 2]


async def test_a_stop_logs_the_refused_calls_that_were_not_logged_yet() -> None:
    guard = CallerGuard(CallerTable([credentials("a")]))
    server = GrpcServer(grpc.aio.server, OpenCalls(), guard=guard)
    with capture_logs() as logged:
        for _ in range(3):
            await admitted(guard, FakeContext("wrong"))
        await server.stop(grace_s=0)

    assert [event["calls"] for event in logged] == [1, 2]


def test_a_method_without_a_row_fails_the_start() -> None:
    file = descriptor_pb2.FileDescriptorProto(name="unlisted.proto", package="unlisted")
    file.message_type.add(name="Request")
    file.service.add(name="Service").method.add(
        name="Forgotten", input_type=".unlisted.Request", output_type=".unlisted.Request"
    )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    service = pool.FindServiceByName("unlisted.Service")

    class Servicer:
        async def forgotten(self, request: object) -> object:
            return request

    wrapper = MethodWrapper(Gate(), max_calls=1, max_streams=1, stall_s=1)
    with pytest.raises(
        LookupError, match=r"unlisted\.Service\.Forgotten has no row in rpc/method_roles"
    ):
        grpc_handlers(contract_methods(service, Servicer(), wrapper))


async def test_a_table_without_callers_admits_everyone_until_it_is_replaced() -> None:
    guard = CallerGuard(CallerTable([]))
    anyone = await guard.admit(cast("Any", FakeContext("wrong")), "s.M", Role.OPERATOR)

    guard.replace_table(CallerTable([credentials("a")]))

    assert anyone.name == ""
    assert await admitted(guard, FakeContext("wrong")) == "UNAUTHENTICATED"


NEW = token_of("new")


@pytest.mark.parametrize(
    ("after", "goes_on"),
    [
        (credentials("a"), True),
        (credentials("a", max_calls=7), True),
        (credentials("a", max_calls_per_s=7), True),
        (credentials("b"), False),
        (credentials("a", tokens=(sha256(NEW.encode()).digest(),)), False),
        (
            Credentials(caller=Caller(name="a", role=Role.CREATOR), tokens=credentials("a").tokens),
            False,
        ),
        (
            Credentials(
                caller=Caller(name="a", role=Role.VIEWER, engines=frozenset({"e"})),
                tokens=credentials("a").tokens,
            ),
            False,
        ),
    ],
    ids=["same", "limit", "rate", "removed", "token", "role", "engines"],
)
async def test_a_stream_ends_once_its_caller_was_removed_or_changed(
    *, after: Credentials, goes_on: bool
) -> None:
    guard = CallerGuard(CallerTable([credentials("a")]))
    context = cast("Any", FakeContext(token_of("a")))
    caller = await guard.admit(context, "s.M", Role.VIEWER)
    opened, release = asyncio.Event(), asyncio.Event()

    async def stream() -> str:
        try:
            async with guard.while_admitted(context, caller):
                opened.set()
                await release.wait()
        except CallerUnknown as error:
            return str(error)
        return "went on"

    task = asyncio.create_task(stream())
    await opened.wait()
    guard.replace_table(CallerTable([after]))
    if goes_on:
        release.set()

    ended = await asyncio.wait_for(task, 20)
    assert ended == (
        "went on" if goes_on else "the caller of the call was removed or changed; call again"
    )


async def test_a_stream_that_still_unwinds_does_not_disturb_the_next_change_of_the_table() -> None:
    guard = CallerGuard(CallerTable([credentials("a"), credentials("b")]))
    unwinds = asyncio.Event()
    refusals = []

    async def stream(name: str) -> None:
        context = cast("Any", FakeContext(token_of(name)))
        caller = await guard.admit(context, "s.M", Role.VIEWER)
        try:
            async with guard.while_admitted(context, caller):
                try:
                    await asyncio.Event().wait()
                finally:
                    unwinds.set()
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
        except CallerUnknown:
            refusals.append(name)

    tasks = [asyncio.create_task(stream(name)) for name in "ab"]
    await asyncio.sleep(0)
    guard.replace_table(CallerTable([credentials("b")]))
    await unwinds.wait()
    guard.replace_table(CallerTable([credentials("c")]))
    await asyncio.wait_for(asyncio.gather(*tasks), 20)

    assert sorted(refusals) == ["a", "b"]


async def test_a_time_limit_inside_a_stream_is_not_taken_for_another_table() -> None:
    guard = CallerGuard(CallerTable([credentials("a")]))
    context = cast("Any", FakeContext(token_of("a")))
    caller = await guard.admit(context, "s.M", Role.VIEWER)

    with pytest.raises(TimeoutError):
        async with guard.while_admitted(context, caller):
            raise TimeoutError
