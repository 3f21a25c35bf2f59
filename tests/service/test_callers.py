"""Callers: tokens, roles, engines and limits, by calls to one service."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_service_pb2 as pb
from runrecovery.v1.run_pb2 import RunEventKind
from support.api import Api, Refusal, refusal_of, refused
from support.callers import EXPECTED, RECOVERY, REFLECTION, ROLES, RUNS, caller, digest_of, token_of
from support.service import Home, Json, ServiceProcess
from support.waiting import until

SECOND = token_of("a second token of twice")
FILED = token_of("filed")

UNKNOWN = (grpc.StatusCode.UNAUTHENTICATED, "CALLER_UNKNOWN")
DENIED = (grpc.StatusCode.PERMISSION_DENIED, "ROLE_NOT_SUFFICIENT")


def _methods() -> dict[str, MethodDescriptor]:
    """Return every method that the service serves, by its path."""
    files = (pb, recovery_pb, health_pb2)
    found = {
        f"{service.full_name}/{method.name}": method
        for file in files
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }
    (reflection,) = reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].methods
    return found | {f"{name}/{reflection.name}": reflection for name in REFLECTION}


METHODS = _methods()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    path = tmp_path_factory.mktemp("callers")
    tokens = path / "tokens"
    tokens.write_text(f"{FILED}\n{token_of('replaced')}\n")
    callers = [caller(role, role) for role in ROLES]
    callers += [
        caller("only-sticky", "creator", engines=["sticky"]),
        caller("twice", "viewer", token_sha256=[digest_of(token_of("twice")), digest_of(SECOND)]),
        caller("filed", "viewer", token_file=str(tokens)),
        caller("narrow", "viewer", max_calls=2),
    ]
    with Home(path, callers=callers, token=token_of("operator")) as home:
        yield home


@pytest.fixture(scope="module")
def service(home: Home) -> ServiceProcess:
    service, _ = home.start()
    return service


Connect = Callable[[str], Api]


@pytest.fixture(scope="module")
def connect(service: ServiceProcess) -> Iterator[Connect]:
    """Connect as a caller of the module's service."""
    apis: dict[str, Api] = {}

    def as_caller(name: str) -> Api:
        if name not in apis:
            token = "" if name == "nobody" else token_of(name)
            apis[name] = Api(service.address, token=token)
        return apis[name]

    yield as_caller
    for api in apis.values():
        api.channel.close()


def refusal(
    api: Api,
    path: str,
    *,
    metadata: tuple[tuple[str, str | bytes], ...] = (),
    raw: bytes | None = None,
) -> Refusal | None:
    """Call a method with an empty request; return how it was refused, None for an answer.

    Args:
        raw: the bytes to send instead of the request.
    """
    method = METHODS[path]
    serializer = message_factory.GetMessageClass(method.input_type)
    kind = (
        api.channel.stream_stream
        if method.client_streaming
        else api.channel.unary_stream
        if method.server_streaming
        else api.channel.unary_unary
    )
    invoke: Any = kind(
        f"/{path}",
        request_serializer=lambda request: request.SerializeToString() if raw is None else raw,
    )
    try:
        if method.client_streaming:
            list(invoke(iter([serializer(list_services="")]), timeout=10, metadata=metadata))
        elif method.server_streaming:
            stream = invoke(serializer(), timeout=10, metadata=metadata)
            next(stream)
            stream.cancel()
        else:
            invoke(serializer(), timeout=10, metadata=metadata)
    except grpc.RpcError as error:
        return refusal_of(error)
    return None


def test_the_table_of_this_test_has_every_method() -> None:
    assert sorted(METHODS) == sorted(EXPECTED)


@pytest.mark.parametrize("path", EXPECTED)
def test_every_role_may_call_what_the_table_says_and_nothing_else(
    connect: Connect, path: str
) -> None:
    seen = {name: refusal(connect(name), path) for name in ("nobody", "stranger", *ROLES)}

    refusals = {
        name: (found.code, found.reason)
        for name, found in seen.items()
        if found is not None and found.code.name in {"UNAUTHENTICATED", "PERMISSION_DENIED"}
    }
    unknown = (grpc.StatusCode.UNAUTHENTICATED, "CALLER_UNKNOWN")
    denied = (grpc.StatusCode.PERMISSION_DENIED, "ROLE_NOT_SUFFICIENT")
    assert refusals == {
        name: denied if name in ROLES else unknown
        for name in ("nobody", "stranger", *ROLES)
        if name not in EXPECTED[path]
    }


def test_a_denied_caller_sees_its_role_and_the_one_that_is_needed(connect: Connect) -> None:
    found = refused(lambda: connect("viewer").cancel("r"))

    assert found.message == "caller 'viewer' is a VIEWER; this call needs the role REPLIER"
    assert found.metadata == {"role": "VIEWER", "needed_role": "REPLIER"}
    assert found.domain == "runrecovery"


# -- credentials ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ([], "the call has no token, and its caller is not known otherwise"),
        ([f"Bearer {token_of('viewer')}x"], "the token of the call is not valid"),
        ([f"Basic {token_of('viewer')}"], "the token of the call is not valid"),
        ([token_of("viewer")], "the token of the call is not valid"),
        (["Bearer "], "the token of the call is not valid"),
        ([f"Bearer {digest_of(token_of('viewer'))}"], "the token of the call is not valid"),
        ([f"Bearer {token_of('viewer')}"] * 2, "the call has more than one authorization"),
    ],
)
def test_a_call_without_one_valid_token_is_refused(
    connect: Connect, metadata: list[str], message: str
) -> None:
    given = tuple(("authorization", value) for value in metadata)
    found = refused(
        lambda: connect("nobody").runs.GetRun(pb.GetRunRequest(run_id="r"), metadata=given)
    )

    assert (found.code, found.reason) == (grpc.StatusCode.UNAUTHENTICATED, "CALLER_UNKNOWN")
    assert found.message == message


NEED_A_CALLER = [path for path, roles in EXPECTED.items() if "nobody" not in roles]
NO_ONE = {
    "two callers": [f"Bearer {token_of('operator')}", f"Bearer {token_of('viewer')}"],
    "a valid one twice": [f"Bearer {token_of('operator')}"] * 2,
    "a valid one, then nonsense": [f"Bearer {token_of('operator')}", "x"],
    "two in one value": [f"Bearer {token_of('operator')}, Bearer {token_of('operator')}"],
    "spaces": [f"Bearer  {token_of('operator')}"],
    "no scheme": [token_of("operator")],
    "empty": [""],
    "long": ["Bearer " + "a" * 3000],
    "its upper case": [f"Bearer {token_of('operator').upper()}"],
}
BESIDE = (
    ("authorization-bin", b"\xff\0" + token_of("operator").encode()),
    ("x-authorization", f"Bearer {token_of('operator')}"),
    ("cookie", f"authorization=Bearer {token_of('operator')}"),
    ("grpc-trace-bin", b"\xff" * 40),
    ("traceparent", "00-" + "g" * 32 + "-zz-ff"),
    ("x-odd", "a" * 2000),
)
"""Metadata that are no credentials. Some have the token of an operator."""
ANSWERED = {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.INTERNAL}
"""Requests that cannot be parsed: by this service, and by the health and reflection of gRPC."""


def test_no_method_takes_odd_credentials_for_a_caller(connect: Connect) -> None:
    for path, (name, values) in product(NEED_A_CALLER, NO_ONE.items()):
        given = tuple(("authorization", value) for value in values)
        found = refusal(connect("nobody"), path, metadata=given)
        assert found is not None, (path, name)
        assert (found.code, found.reason) == UNKNOWN, (path, name)


def test_odd_metadata_and_requests_give_no_role_more_than_the_table_says(connect: Connect) -> None:
    for path, role in product(EXPECTED, ("nobody", *ROLES)):
        found = refusal(connect(role), path, metadata=BESIDE, raw=b"\xff\xff")
        if role in EXPECTED[path]:
            assert found is None or (found.code, found.reason) not in {UNKNOWN, DENIED}, (
                path,
                role,
            )
        else:
            # Before the request is parsed: it is not valid.
            assert found is not None, (path, role)
            refused_as = UNKNOWN if role == "nobody" else DENIED
            assert (found.code, found.reason) == refused_as, (path, role)


def test_the_scheme_may_be_written_in_any_case(connect: Connect) -> None:
    given = (("authorization", f"bEARER {token_of('viewer')}"),)

    answer = connect("nobody").runs.ListRuns(pb.ListRunsRequest(), metadata=given)

    assert answer.next_page_token == ""


def test_each_of_two_tokens_is_the_callers(service: ServiceProcess) -> None:
    for token in (token_of("twice"), SECOND, FILED, token_of("replaced")):
        with closing((api := Api(service.address, token=token)).channel):
            assert refused(lambda: api.get("r")).reason == "RUN_NOT_FOUND"


def test_a_token_in_the_path_is_no_token_and_is_not_logged(
    connect: Connect, service: ServiceProcess
) -> None:
    path = f"/{RUNS}/GetRun?access_token={token_of('operator')}"
    invoke: Any = connect("nobody").channel.unary_unary(path)

    assert refused(lambda: invoke(b"")).code is grpc.StatusCode.UNIMPLEMENTED
    assert token_of("operator") not in service.text


def test_wrong_tokens_lock_nobody_out_and_write_few_lines(service: ServiceProcess) -> None:
    # A busy machine needs some seconds for so many calls.
    viewer = Api(service.address, token=token_of("viewer"), timeout_s=90)
    with Api(service.address, token=token_of("wrong")) as wrong, viewer:
        calls = [
            wrong.runs.GetRun.future(pb.GetRunRequest(run_id="r"), timeout=90) for _ in range(1050)
        ]
        good = [refused(lambda: viewer.get("none")).reason for _ in range(5)]
        codes = {call.code() for call in calls}

    # Of so many refused calls at once gRPC's server ends a few by CANCELLED, whatever the refusal.
    assert codes - {grpc.StatusCode.CANCELLED} == {grpc.StatusCode.UNAUTHENTICATED}
    assert good == ["RUN_NOT_FOUND"] * 5
    lines = [event for event in service.events("rpc.call_refused") if event["caller"] == ""]
    assert 1 <= len(lines) <= 10  # one a minute
    assert token_of("wrong") not in service.text


# -- what is recorded ----------------------------------------------------------------------------


def test_every_change_records_its_caller(connect: Connect, service: ServiceProcess) -> None:
    creator, replier = connect("creator"), connect("replier")
    run = creator.create("resumable", {"questions": [{"prompt": "a"}, {"prompt": "b"}]})
    assert (run.created_by, run.canceled_by) == ("creator", "")
    creator.until_status(run.run_id, "WAITING_USER")
    replier.reply(run.run_id, 1, "yes")
    until(lambda: replier.get(run.run_id).interaction_count == 2, "the second question is asked")
    creator.until_status(run.run_id, "WAITING_USER")
    canceled = connect("operator").cancel(run.run_id)
    again = connect("replier").cancel(run.run_id)

    assert (canceled.created_by, canceled.canceled_by) == ("creator", "operator")
    assert again.canceled_by == "operator"
    first, second = replier.interactions(run.run_id)
    assert (first.replied_by, second.replied_by) == ("replier", "")
    watch = creator.runs.WatchRun(pb.WatchRunRequest(run_id=run.run_id, after_sequence=0))
    assert [
        (RunEventKind.Name(update.event.kind).removeprefix("RUN_EVENT_KIND_"), update.event.caller)
        for update in watch
        if update.event.caller
    ] == [("CREATED", "creator"), ("ANSWERED", "replier"), ("CANCELED", "operator")]

    def logged() -> list[Json]:
        return [event for event in service.events("audit.changed") if event["run_id"] == run.run_id]

    until(lambda: len(logged()) == 4, "every change is logged")  # by a thread
    assert [(event["caller"], event["method"]) for event in logged()] == [
        ("creator", "CreateRun"), ("replier", "SubmitReply"), ("operator", "CancelRun"),
        ("replier", "CancelRun"),
    ]  # fmt: skip


# -- engines -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hidden(connect: Connect) -> str:
    """A run that waits for its user, of an engine that `only-sticky` does not see."""
    run = connect("operator").create("resumable", {"questions": [{"prompt": "?"}]})
    connect("operator").until_status(run.run_id, "WAITING_USER")
    return run.run_id


def test_runs_of_other_engines_do_not_exist_for_a_caller(connect: Connect, hidden: str) -> None:
    api = connect("only-sticky")
    calls: dict[str, Callable[[str], object]] = {
        "GetRun": api.get,
        "SubmitReply": lambda run_id: api.reply(run_id, 1, "x"),
        "CancelRun": api.cancel,
        "ReopenRun": lambda run_id: api.runs.ReopenRun(
            pb.ReopenRunRequest(run_id=run_id, keep_session=True)
        ),
        "ListInteractions": api.interactions,
        "StreamOutput": api.output,
        "WatchRun": lambda run_id: next(api.runs.WatchRun(pb.WatchRunRequest(run_id=run_id))),
        "GetRecoveryInfo": api.recovery_info,
        "ExplainRecovery": lambda run_id: api.recovery.ExplainRecovery(
            recovery_pb.ExplainRecoveryRequest(run_id=run_id)
        ),
    }
    takes_run_id = [
        method.name
        for path, method in METHODS.items()
        if path.startswith((RUNS, RECOVERY)) and "run_id" in method.input_type.fields_by_name
    ]
    assert sorted(calls) == sorted(set(takes_run_id) - {"CreateRun"})

    for call in calls.values():
        found, unknown = refused(lambda: call(hidden)), refused(lambda: call("none"))  # noqa: B023

        assert found.reason == "RUN_NOT_FOUND"
        assert found.message == unknown.message.replace("none", hidden)
        assert found.details == unknown.details
    assert connect("operator").get(hidden).cancel_requested is False


def test_lists_hold_the_callers_engines_only_in_full_pages(connect: Connect, hidden: str) -> None:
    api, operator = connect("only-sticky"), connect("operator")
    made = []
    for engine in ("sticky", "resumable", "sticky", "resumable", "sticky"):
        run = operator.create(engine, {}, labels={"test": "lists"})
        made += [run.run_id] if engine == "sticky" else []
    pages, token = [], ""
    while True:
        request = pb.ListRunsRequest(
            filter=pb.RunFilter(labels={"test": "lists"}), page_size=2, page_token=token
        )
        answer = api.runs.ListRuns(request)
        pages.append([run.run_id for run in answer.runs])
        if not (token := answer.next_page_token):
            break

    assert pages == [[made[2], made[1]], [made[0]]]
    every = api.runs.ListRuns(pb.ListRunsRequest(page_size=1000)).runs
    assert {run.engine for run in every} == {"sticky"}
    of_another = pb.ListRunsRequest(filter=pb.RunFilter(engine="resumable"))
    assert list(api.runs.ListRuns(of_another).runs) == []


@pytest.mark.parametrize("engine", ["resumable", "no-such-engine"])
def test_runs_of_other_engines_cannot_be_created(connect: Connect, engine: str) -> None:
    found = refused(lambda: connect("only-sticky").create(engine))

    assert (found.code, found.reason) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "ENGINE_NOT_ALLOWED",
    )
    assert found.metadata == {"engine": engine}


def test_only_an_operator_sees_the_report_in_the_status(connect: Connect) -> None:
    assert connect("operator").status().HasField("reconciliation")
    assert not connect("creator").status().HasField("reconciliation")
    assert connect("viewer").status().instance == "default"


# -- limits --------------------------------------------------------------------------------------


def test_a_caller_at_its_limit_is_refused_and_others_are_not(connect: Connect, hidden: str) -> None:
    api = connect("narrow")
    watches = [api.runs.WatchRun(pb.WatchRunRequest(run_id=hidden)) for _ in range(2)]
    for watch in watches:
        next(watch)

    found = refused(lambda: api.get(hidden))
    assert (found.code, found.reason) == (
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        "CALLER_OVERLOADED",
    )
    assert found.pushback_ms == "1000"
    assert connect("viewer").get(hidden).run_id == hidden

    watches[0].cancel()

    def admitted() -> bool:
        try:
            return bool(api.get(hidden).run_id)
        except grpc.RpcError:
            return False

    until(admitted, "a call is admitted again")
    watches[1].cancel()


# -- starts --------------------------------------------------------------------------------------


def test_token_files_that_cannot_be_used_refuse_a_start_with_every_problem(
    new_home: Callable[..., Home], tmp_path: Path
) -> None:
    contents = {
        "weak": "hunter2hunter2",
        "same": "ab" * 32,
        "three": "\n".join(map(token_of, "abc")),
        "empty": "",
        "shared": token_of("shared"),
        "again": token_of("shared"),
    }
    callers = []
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
        callers.append(caller(name, "viewer", token_file=str(tmp_path / name)))
    callers.append(caller("gone", "viewer", token_file=str(tmp_path / "gone")))
    home = new_home(callers=callers)

    service = home.spawn()

    assert service.exit_code() == 2
    assert [
        reason
        for reason in (
            f"{tmp_path}/weak: a token must have at least 128 random bits",
            f"{tmp_path}/same: a token must have at least 128 random bits",
            f"{tmp_path}/three: must hold one token, or 2, each on its own line",
            f"{tmp_path}/empty: must hold one token",
            "caller 'gone': token_file: No such file or directory",
            "callers 'shared' and 'again' have the same token",
        )
        if reason not in service.text
    ] == []
    assert [
        token
        for token, line in product(contents.values(), [service.text])
        if token and token in line
    ] == []


def test_public_reflection_needs_no_caller(new_home: Callable[..., Home]) -> None:
    home = new_home(
        callers=[caller("operator", "operator")],
        public_reflection=True,
        token=token_of("operator"),
    )
    service, _ = home.start()

    with closing((api := Api(service.address)).channel):
        assert refusal(api, f"{REFLECTION[0]}/ServerReflectionInfo") is None
        found = refusal(api, f"{RUNS}/GetRun")
    assert found is not None
    assert found.reason == "CALLER_UNKNOWN"
