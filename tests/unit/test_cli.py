"""The command line: help, exit codes, and what it prints; against a scripted server."""

from __future__ import annotations

import inspect
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import click
import grpc
import pytest
from google.protobuf import any_pb2, json_format
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1.health_pb2 import HealthCheckResponse
from runrecovery import errors
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_pb2, run_service_pb2
from runrecovery_service import logs
from runrecovery_service.cli import COMMANDS, connection, local, main, printing, root
from runrecovery_service.cli.exit_codes import ExitCode
from runrecovery_service.domain import start_errors
from runrecovery_service.domain.errors import Fenced
from support.service import processes_below, until

CLIENT_ERRORS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.RunRecoveryClientError)
]
START_ERRORS = {
    ExitCode.HELD: start_errors.Held("data directory /d", "pid 7"),
    ExitCode.STORAGE: start_errors.DatabaseRefused("/d/x.db", "is not one of ours"),
    ExitCode.RECOVERY: start_errors.RecoveryGaveUp(5, "StorageFull"),
    ExitCode.FENCED: Fenced("instance 'a'"),
}


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


def commands(group: click.Group, *path: str) -> Iterator[tuple[str, ...]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        yield (*path, name)
        if isinstance(command, click.Group):
            yield from commands(command, *path, name)


@pytest.mark.parametrize("path", [(), *commands(root)], ids=" ".join)
def test_every_command_explains_itself(run: Run, path: Sequence[str]) -> None:
    ended = run(*path, "--help")

    assert ended.code == ExitCode.OK
    assert ended.out.startswith(f"Usage: {' '.join(('runrecovery', *path))} ")


def test_the_overview_names_every_command_without_importing_grpc() -> None:
    code = "import sys; from runrecovery_service.cli import main\ntry: main(['--help'])\n"
    code += "finally: print('grpc' in sys.modules or 'structlog' in sys.modules)"

    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)

    assert all(f"  {name} " in said.stdout for name in COMMANDS)
    assert said.stdout.splitlines()[-1] == "False"


def test_the_version_is_the_packages(run: Run) -> None:
    from runrecovery_service import __version__

    assert __version__ in run("--version").out


def test_python_m_is_the_same_command() -> None:
    command = [sys.executable, "-m", "runrecovery_service", "no-such-command"]

    ended = subprocess.run(command, check=False, capture_output=True, text=True)

    assert ended.returncode == ExitCode.USAGE
    assert "No such command" in ended.stderr


# -- commands on this machine's store ----------------------------------------------------------


@pytest.mark.parametrize("command", [["serve"], ["check"], ["migrate"], ["backup", "copy.db"]])
def test_a_refused_configuration_is_told_completely(run: Run, command: list[str]) -> None:
    Path("runrecovery.toml").write_text("max_queued = 0\nlistn = 1", encoding="utf-8")

    ended = run(*command, "--instance", "Not This")

    assert ended.code == ExitCode.USAGE
    assert ended.out == ""
    for place in ("runrecovery.toml: max_queued", "runrecovery.toml: listn", "flag --instance"):
        assert f"\n  {place}: " in ended.err


def test_a_refusal_cannot_steer_the_terminal(run: Run) -> None:
    Path("runrecovery.toml").write_text(r'instance = "\u001b[2Jx"', encoding="utf-8")

    ended = run("check")

    assert ended.code == ExitCode.USAGE
    assert "\x1b" not in ended.err
    assert r"\x1b[2Jx" in ended.err


def test_a_configuration_without_end_is_refused_with_its_size(run: Run) -> None:
    ended = run("check", "--config", "/dev/zero")

    assert ended.code == ExitCode.USAGE
    assert "  /dev/zero: has more than 1048576 bytes\n" in ended.err


def test_a_byte_of_a_path_that_is_not_utf8_is_shown_as_that_byte(run: Run) -> None:
    ended = run("check", "--config", os.fsdecode(b"/nonexistent/a\xffb.toml"))

    assert ended.code == ExitCode.USAGE
    assert r"  /nonexistent/a\xffb.toml: No such file or directory" in ended.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_demo_that_is_told_to_end_leaves_nothing(tmp_path: Path, number: int) -> None:
    command = [sys.executable, "-m", "runrecovery_service", "demo"]

    with subprocess.Popen(
        command, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.DEVNULL
    ) as process:
        until(lambda: len(processes_below(tmp_path)) > 1, "its service and an agent run")
        process.send_signal(number)

        assert process.wait(60) == 128 + number
    assert processes_below(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


def test_a_demo_without_a_place_for_its_files_says_so(tmp_path: Path) -> None:
    code = "import tempfile, sys; tempfile.tempdir = sys.argv.pop(); "
    code += "from runrecovery_service.cli import main; main(['demo'])"

    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "none")],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert ended.returncode == ExitCode.FAILED
    assert ended.stderr.startswith("error: the demo cannot continue: ")
    assert len(ended.stderr.splitlines()) == 1


@pytest.mark.parametrize("code", START_ERRORS)
def test_a_refused_start_has_its_own_exit_code(
    run: Run, monkeypatch: pytest.MonkeyPatch, code: ExitCode
) -> None:
    from runrecovery_service import app

    def refuse(_settings: object) -> None:
        raise START_ERRORS[code]

    monkeypatch.setattr(app, "serve", refuse)

    ended = run("serve")

    assert ended.code == code
    assert f"error: {START_ERRORS[code]}\n" in ended.err


def test_a_taken_port_has_its_own_exit_code_and_says_so(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        command = [sys.executable, "-m", "runrecovery_service", "serve", "--listen", listen]

        ended = subprocess.run(
            command, cwd=tmp_path, check=False, capture_output=True, text=True, timeout=60
        )

    assert ended.returncode == ExitCode.LISTEN
    *log, error, hint = ended.stderr.splitlines()
    assert all(json.loads(line)["event"] for line in log)
    assert error == f"error: cannot listen on {listen}: Address already in use"
    assert hint == "hint: choose another address with --listen, or free this one"


def test_flags_reach_the_service(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from runrecovery_service import app

    taken: list[Any] = []
    monkeypatch.setattr(app, "serve", taken.append)

    assert (
        run("serve", "--listen", "127.0.0.1:0", "--data-dir", "d", "--log-level", "error").code == 0
    )
    assert [("127.0.0.1:0", Path("d"), "error")] == [
        (settings.listen, settings.data_dir, settings.log_level) for settings in taken
    ]


def test_every_start_error_that_is_mapped_is_a_start_error() -> None:
    assert all(issubclass(kind, start_errors.StartRefused | Fenced) for kind in local.EXIT_CODES)
    assert local.HINTS.keys() <= local.EXIT_CODES.keys()


def test_what_a_service_ends_by_has_the_exit_code_that_the_docs_give_it() -> None:
    assert {kind.__name__: int(code) for kind, code in local.EXIT_CODES.items()} == {
        "CgroupRefused": 2,
        "Held": 3,
        "DatabaseRefused": 4,
        "StoreLost": 4,
        "DataDirRefused": 4,
        "OpenFilesRefused": 4,
        "ThreadsRefused": 4,
        "DatabaseOutOfReach": 6,
        "BackupRefused": 8,
        "RecoveryGaveUp": 9,
        "Fenced": 10,
        "ClaimLost": 10,
        "RunGone": 10,
        "LeaseLost": 10,
        "ContainmentRefused": 11,
    }


# -- commands that ask a service ---------------------------------------------------------------


@pytest.mark.parametrize("kind", CLIENT_ERRORS)
def test_every_failed_call_has_an_exit_code_and_no_hint_breaks(
    kind: type[errors.RunRecoveryClientError],
) -> None:
    error = kind("sentence")

    assert connection.exit_code(error) in set(ExitCode) - {ExitCode.OK}
    assert "\n" not in connection.hint(error, "h:1")


@pytest.mark.parametrize(
    ("code", "reason", "exit_code"),
    [
        (grpc.StatusCode.NOT_FOUND, "RUN_NOT_FOUND", ExitCode.NOT_FOUND),
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", ExitCode.USAGE),
        (grpc.StatusCode.FAILED_PRECONDITION, "RUN_ALREADY_TERMINAL", ExitCode.REFUSED),
        (grpc.StatusCode.FAILED_PRECONDITION, "RUN_QUARANTINED", ExitCode.REFUSED),
        (grpc.StatusCode.FAILED_PRECONDITION, "RUN_NOT_REOPENABLE", ExitCode.REFUSED),
        (grpc.StatusCode.FAILED_PRECONDITION, "SESSION_NOT_RESUMABLE", ExitCode.REFUSED),
        (grpc.StatusCode.FAILED_PRECONDITION, "RUN_OF_ANOTHER_INSTANCE", ExitCode.REFUSED),
        (grpc.StatusCode.OUT_OF_RANGE, "WATCH_HISTORY_PRUNED", ExitCode.REFUSED),
        (grpc.StatusCode.OUT_OF_RANGE, "WATCH_SEQUENCE_UNKNOWN", ExitCode.REFUSED),
        (grpc.StatusCode.INVALID_ARGUMENT, "WATCH_CURSOR_INVALID", ExitCode.USAGE),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "SLOW_READER", ExitCode.UNAVAILABLE),
        (grpc.StatusCode.ABORTED, "ETAG_MISMATCH", ExitCode.REFUSED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", ExitCode.UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", ExitCode.UNAVAILABLE),
        (grpc.StatusCode.INTERNAL, "INTERNAL", ExitCode.FAILED),
        (grpc.StatusCode.DATA_LOSS, "NEW_REASON", ExitCode.FAILED),
    ],
)
def test_a_refused_call_ends_in_its_exit_code_with_one_sentence(
    run: Run, server: Script, code: grpc.StatusCode, reason: str, exit_code: ExitCode
) -> None:
    server.answers["CancelRun"] = (code, reason)

    ended = run("runs", "cancel", "r", "--server", server.address)

    assert (ended.code, ended.out) == (exit_code, "")
    assert ended.err.splitlines()[0] == "error: scripted"


def test_an_absent_service_is_unavailable_and_the_hint_names_it(run: Run) -> None:
    ended = run("health", "--server", "127.0.0.1:1")

    assert ended.code == ExitCode.UNAVAILABLE
    assert "is a service running at 127.0.0.1:1?" in ended.err


def test_a_list_of_an_absent_service_is_no_empty_table(run: Run) -> None:
    ended = run("runs", "list", "--server", "127.0.0.1:1", "--timeout", "0.2")

    assert (ended.code, ended.out) == (ExitCode.UNAVAILABLE, "")
    assert ended.err.splitlines()[0] == "error: 127.0.0.1:1 did not answer in time"


@pytest.mark.parametrize("scheme", ["http://", "https://", "grpc://"])
def test_a_url_as_the_server_is_a_usage_error(run: Run, scheme: str) -> None:
    ended = run("health", "--server", f"{scheme}127.0.0.1:1")

    assert ended.code == ExitCode.USAGE
    assert f'must be HOST:PORT without "{scheme}"' in ended.err


def test_a_health_check_that_waited_says_for_what(run: Run) -> None:
    ended = run("health", "--server", "127.0.0.1:1", "--wait", "0.2")

    assert ended.code == ExitCode.UNAVAILABLE
    assert ended.err.startswith("error: waiting for the service to be SERVING took too long; last")


def test_the_server_may_come_from_the_environment(
    run: Run, server: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNRECOVERY_SERVER", server.address)
    server.answers["GetRun"] = [run_service_pb2.GetRunResponse(run=a_run())]

    assert run("runs", "get", "r").code == ExitCode.OK


def test_json_is_one_message_a_line_in_the_contracts_names(run: Run, server: Script) -> None:
    rows = [a_run(run_id="a"), a_run(run_id="b", status=run_pb2.RUN_STATUS_RUNNING)]
    server.answers["ListRuns"] = [run_service_pb2.ListRunsResponse(runs=rows)]

    ended = run("runs", "list", "--json", "--server", server.address)

    found = [json_format.Parse(line, run_pb2.Run()) for line in ended.out.splitlines()]
    assert found == rows
    assert "run_id" in ended.out
    assert '"holds_slot": false' in ended.out


def test_a_table_in_a_pipe_is_plain_and_complete(run: Run, server: Script) -> None:
    long_id = "r" * 64
    row = a_run(run_id=long_id, engine="e" * 63)
    server.answers["ListRuns"] = [run_service_pb2.ListRunsResponse(runs=[row])]

    ended = run("runs", "list", "--server", server.address)

    heading, line = ended.out.splitlines()
    assert heading.split("\t")[:3] == ["RUN ID", "STATUS", "ENGINE"]
    assert line.split("\t")[:3] == [long_id, "QUEUED", "e" * 63]


@pytest.mark.parametrize(("limit", "shown", "notes"), [(1, 1, 1), (2, 2, 0), (0, 2, 0)])
def test_a_limited_list_says_when_there_is_more(
    run: Run, server: Script, limit: int, shown: int, notes: int
) -> None:
    rows = [a_run(run_id="a"), a_run(run_id="b")]
    server.answers["ListRuns"] = [run_service_pb2.ListRunsResponse(runs=rows)]

    ended = run("runs", "list", "--limit", str(limit), "--server", server.address)

    assert len(ended.out.splitlines()) == 1 + shown
    assert ended.err.count("--limit 0 shows all") == notes


def test_create_sends_what_was_said(run: Run, server: Script) -> None:
    server.answers["CreateRun"] = [run_service_pb2.CreateRunResponse(run=a_run())]
    Path("input.json").write_text('{"task": "hello"}', encoding="utf-8")

    said = ["--input", "@input.json", "--label", "a=b=c", "--restart-policy", "requeue"]
    said += ["--session-timeout", "90", "--no-require-user-reply"]
    assert run("runs", "create", "e", *said, "--server", server.address).code == ExitCode.OK

    request = run_service_pb2.CreateRunRequest.FromString(server.asked[0][1])
    assert json_format.MessageToDict(request.input) == {"task": "hello"}
    assert dict(request.labels) == {"a": "b=c"}
    assert request.restart_policy == run_pb2.RESTART_POLICY_REQUEUE
    assert request.interactive_profile.session_timeout.seconds == 90
    assert request.interactive_profile.HasField("require_user_reply")
    assert not request.interactive_profile.require_user_reply


@pytest.mark.parametrize(
    ("said", "required"),
    [([], None), (["--require-user-reply"], True), (["--no-require-user-reply"], False)],
)
def test_create_leaves_to_the_engine_what_was_not_said(
    run: Run,
    server: Script,
    said: list[str],
    required: bool | None,  # noqa: FBT001 - a parameter of the test
) -> None:
    server.answers["CreateRun"] = [run_service_pb2.CreateRunResponse(run=a_run())]

    run("runs", "create", "e", *said, "--server", server.address)

    request = run_service_pb2.CreateRunRequest.FromString(server.asked[0][1])
    profile = request.interactive_profile
    assert request.HasField("interactive_profile") == (required is not None)
    assert (profile.require_user_reply if profile.ListFields() else None) == required


def test_a_list_of_runs_is_filtered_as_said_and_asks_for_no_more_than_it_shows(
    run: Run, server: Script
) -> None:
    server.answers["ListRuns"] = [run_service_pb2.ListRunsResponse()]

    said = ["--status", "queued", "--label", "a=1", "--label", "b=2"]
    said += ["--created-after", "2026-11-24T10:00", "--created-before", "2026-11-24T10:00+02:00"]
    assert run("runs", "list", *said, "--server", server.address).code == ExitCode.OK

    request = run_service_pb2.ListRunsRequest.FromString(server.asked[0][1])
    assert list(request.filter.statuses) == [run_pb2.RUN_STATUS_QUEUED]
    assert dict(request.filter.labels) == {"a": "1", "b": "2"}
    assert request.filter.created_after.ToJsonString() == "2026-11-24T10:00:00Z"
    assert request.filter.created_before.ToJsonString() == "2026-11-24T08:00:00Z"
    assert request.view == run_pb2.RUN_VIEW_BASIC


def a_watched_run(status: run_pb2.RunStatus.ValueType) -> list[Message]:
    waiting = a_run(status=run_pb2.RUN_STATUS_WAITING_USER)
    waiting.pending_interaction.prompt = "Ship \x1b[2J it?"
    event = run_pb2.RunEvent(
        kind=run_pb2.RUN_EVENT_KIND_ANSWERED,
        status=run_pb2.RUN_STATUS_RUNNING,
        attempt=2,
        interaction_id=1,
    )
    ended = run_pb2.RunEvent(
        kind=run_pb2.RUN_EVENT_KIND_RECOVERED,
        status=status,
        error_code="GONE",
        recovery=run_pb2.RecoveryInfo(recovery_reason="rule_7"),
    )
    return [
        run_service_pb2.WatchRunResponse(sequence=4, snapshot=waiting),
        run_service_pb2.WatchRunResponse(sequence=5, event=event),
        run_service_pb2.WatchRunResponse(sequence=5, bookmark=run_pb2.WatchBookmark()),
        run_service_pb2.WatchRunResponse(sequence=6, event=ended),
    ]


def watching(server: Script, *updates: Message) -> Script:
    server.answers["GetRecoveryStatus"] = [recovery_service_pb2.GetRecoveryStatusResponse()]
    server.answers["WatchRun"] = list(updates)
    return server


def test_a_watch_tells_a_line_for_each_event(run: Run, server: Script) -> None:
    watching(server, *a_watched_run(run_pb2.RUN_STATUS_SUCCEEDED))

    ended = run("runs", "watch", "r", "--server", server.address)

    assert ended.code == ExitCode.OK
    assert [line.split("  ")[1:] for line in ended.out.splitlines()] == [
        ["#4", "WAITING_USER", "snapshot", r"Ship \x1b[2J it?"],
        ["#5", "ANSWERED", "→ RUNNING", "attempt 2", "question 1"],
        ["#6", "RECOVERED", "→ SUCCEEDED", "GONE", "rule_7"],
    ]


def test_a_watch_in_json_is_an_update_a_line(run: Run, server: Script) -> None:
    updates = a_watched_run(run_pb2.RUN_STATUS_SUCCEEDED)
    watching(server, *updates)

    ended = run("runs", "watch", "r", "--json", "--server", server.address)

    parsed = [
        json_format.Parse(line, run_service_pb2.WatchRunResponse())
        for line in ended.out.splitlines()
    ]
    assert parsed == [update for update in updates if not update.HasField("bookmark")]


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (run_pb2.RUN_STATUS_SUCCEEDED, ExitCode.OK),
        (run_pb2.RUN_STATUS_FAILED, ExitCode.FAILED),
        (run_pb2.RUN_STATUS_CANCELED, ExitCode.FAILED),
        (run_pb2.RUN_STATUS_WAITING_USER, ExitCode.FAILED),  # set aside
    ],
)
@pytest.mark.parametrize("seen_before", [True, False])
def test_a_watch_tells_how_the_run_ended(
    run: Run,
    server: Script,
    status: run_pb2.RunStatus.ValueType,
    code: ExitCode,
    seen_before: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    watching(server, *([] if seen_before else a_watched_run(status)))
    server.answers["GetRun"] = [run_service_pb2.GetRunResponse(run=a_run(status=status))]

    assert run("runs", "watch", "r", "--server", server.address).code == code


@pytest.mark.parametrize(
    ("said", "after"),
    [([], None), (["--from-start"], 0), (["--after-sequence", "3"], 3)],
)
def test_a_watch_begins_where_it_is_told_to(
    run: Run, server: Script, said: list[str], after: int | None
) -> None:
    watching(server)
    server.answers["GetRun"] = [run_service_pb2.GetRunResponse(run=a_run())]

    run("runs", "watch", "r", *said, "--server", server.address)

    asked = [request for name, request in server.asked if name == "WatchRun"]
    request = run_service_pb2.WatchRunRequest.FromString(asked[0])
    assert (request.after_sequence if request.HasField("after_sequence") else None) == after


def test_a_watch_begins_at_one_place(run: Run, server: Script) -> None:
    said = ["--from-start", "--after-sequence", "3"]

    assert run("runs", "watch", "r", *said, "--server", server.address).code == ExitCode.USAGE
    assert server.asked == []


@pytest.mark.parametrize("command", [["runs", "watch", "r"], ["recovery", "watch"]])
def test_a_watch_of_an_absent_service_is_unavailable_in_time(run: Run, command: list[str]) -> None:
    ended = run(*command, "--timeout", "0.2", "--server", "127.0.0.1:1")

    assert ended.code == ExitCode.UNAVAILABLE


def test_ctrl_c_ends_a_watch_quietly_with_130(server: Script) -> None:
    def silently(_request: bytes, context: grpc.ServicerContext) -> Iterator[Message]:
        yield a_watched_run(run_pb2.RUN_STATUS_RUNNING)[0]
        gone = threading.Event()
        context.add_callback(gone.set)
        gone.wait(60)

    watching(server)
    server.streams["WatchRun"] = silently
    command = [sys.executable, "-m", "runrecovery_service", "runs", "watch", "r"]

    with subprocess.Popen(
        [*command, "--server", server.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            assert "snapshot" in process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()

    assert process.returncode == 130
    assert said.strip() == ""


def typed(data: bytes) -> io.TextIOWrapper:
    """Standard input that holds this."""
    return io.TextIOWrapper(io.BytesIO(data))


@pytest.mark.parametrize("source", ["input.json", "-"])
def test_a_byte_order_mark_before_an_input_is_no_part_of_it(
    run: Run, server: Script, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    data = b'\xef\xbb\xbf{"task": "\xc3\xa4"}\r\n'
    server.answers["CreateRun"] = [run_service_pb2.CreateRunResponse(run=a_run())]
    Path("input.json").write_bytes(data)
    monkeypatch.setattr("sys.stdin", typed(data))
    said = source if source == "-" else f"@{source}"

    assert run("runs", "create", "e", "--input", said, "--server", server.address).code == 0
    request = run_service_pb2.CreateRunRequest.FromString(server.asked[0][1])
    assert json_format.MessageToDict(request.input) == {"task": "ä"}


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\xff\xfe{\x00}\x00", "is not UTF-8 text"),
        (b'{"a": ' + b"[" * 100_000, "is nested too deeply"),
        (b'{"a": NaN}', "nan is not a JSON number"),
    ],
    ids=["utf-16", "nested", "nan"],
)
@pytest.mark.parametrize("source", ["@input.json", "-"])
def test_an_input_that_is_no_json_text_is_a_usage_error(
    run: Run, server: Script, monkeypatch: pytest.MonkeyPatch, source: str, data: bytes, why: str
) -> None:
    Path("input.json").write_bytes(data)
    monkeypatch.setattr("sys.stdin", typed(data))

    ended = run("runs", "create", "e", "--input", source, "--server", server.address)

    assert (ended.code, server.asked) == (ExitCode.USAGE, [])
    assert why in ended.err


@pytest.mark.parametrize("source", ["handle.txt", "-"])
def test_reopening_reads_a_session_handle_that_is_never_shown(
    run: Run, server: Script, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    server.answers["ReopenRun"] = [run_service_pb2.ReopenRunResponse(run=a_run())]
    Path("handle.txt").write_text("hush-7\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed(b"hush-7\n"))

    ended = run("runs", "reopen", "r", "--session-handle-file", source, "--server", server.address)

    request = run_service_pb2.ReopenRunRequest.FromString(server.asked[0][1])
    assert ended.code == ExitCode.OK
    assert request.session_handle == "hush-7"
    assert "hush" not in ended.out + ended.err


def test_reopening_keeps_the_session_when_no_handle_is_given(run: Run, server: Script) -> None:
    server.answers["ReopenRun"] = [run_service_pb2.ReopenRunResponse(run=a_run())]

    run("runs", "reopen", "r", "--server", server.address)

    request = run_service_pb2.ReopenRunRequest.FromString(server.asked[0][1])
    assert request.WhichOneof("session") == "keep_session"
    assert request.keep_session


@pytest.mark.parametrize("content", [b"", b"\n", b"hush\nhush\n", b"\xff\n", None])
def test_a_file_that_holds_no_handle_is_a_usage_error_that_shows_nothing_of_it(
    run: Run, server: Script, content: bytes | None
) -> None:
    if content is not None:
        Path("handle.txt").write_bytes(content)
    said = ["--session-handle-file", "handle.txt"]

    ended = run("runs", "reopen", "r", *said, "--server", server.address)

    assert (ended.code, server.asked) == (ExitCode.USAGE, [])
    assert "hush" not in ended.out + ended.err


def test_a_run_is_described_with_its_times_and_its_waiting(run: Run, server: Script) -> None:
    described = a_run()
    described.interactive_profile.session_timeout.seconds = 90
    described.interactive_profile.require_user_reply = False
    described.auto_decided_count = 2
    described.run_deadline_at.FromJsonString("2026-11-24T10:00:00Z")
    described.reopenable_until.FromJsonString("2026-11-25T10:00:00Z")
    server.answers["GetRun"] = [run_service_pb2.GetRunResponse(run=described)]

    ended = run("runs", "get", "r", "--server", server.address)

    told = dict(line.split(":", maxsplit=1) for line in ended.out.splitlines())
    assert {name: text.strip() for name, text in told.items()}.items() >= {
        "each question": "waits 90 s, then is decided automatically",
        "auto-decided": "2",
        "run deadline": "2026-11-24 10:00:00Z",
        "reopenable until": "2026-11-25 10:00:00Z",
    }.items()


@pytest.mark.parametrize(
    "said",
    [
        ["--input", "[1]"],
        ["--input", "{"],
        ["--input", "@none.json"],
        ["--input", '{"n": 9007199254740993}'],
        ["--label", "a"],
        ["--label", "a=1", "--label", "a=2"],
        ["--restart-policy", "unspecified"],
    ],
)
def test_what_cannot_be_sent_is_a_usage_error_and_nothing_is_sent(
    run: Run, server: Script, said: list[str]
) -> None:
    assert run("runs", "create", "e", *said, "--server", server.address).code == ExitCode.USAGE
    assert server.asked == []


def test_grpcs_own_lines_do_not_stand_between_ours() -> None:
    environ = {key: text for key, text in os.environ.items() if key != "GRPC_VERBOSITY"}
    command = [sys.executable, "-m", "runrecovery_service", "health", "--server", "dns:///"]

    ended = subprocess.run(
        command, env=environ, check=False, capture_output=True, text=True, timeout=60
    )

    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) <= 2


NO_TEXT: Final = "\udcff"  # a byte of the command line that is not UTF-8
TOO_DEEP: Final = '{"a":' + "[" * 60 + "]" * 60 + "}"


@pytest.mark.parametrize(
    "said",
    [
        ["runs", "create", NO_TEXT],
        ["runs", "create", "e", "--input", f'{{"a": "{NO_TEXT}"}}'],
        ["runs", "create", "e", "--input", r'{"a": "\ud800"}'],
        ["runs", "create", "e", "--input", TOO_DEEP],
        ["runs", "create", "e", "--input", '{"a":' + "[" * 500 + "]" * 500 + "}"],
        ["runs", "create", "e", "--label", f"{NO_TEXT}=1"],
        ["runs", "create", "e", "--session-timeout", "nan"],
        ["runs", "list", "--created-after", "9999-12-31T23:59:59-23:59"],
        ["runs", "list", "--created-after", "0001-01-01T00:00:00+23:59"],
        ["runs", "list", "--label", f"a={NO_TEXT}"],
        ["runs", "list", "--timeout", "nan"],
        ["runs", "list", "--timeout", "1e300"],
        ["runs", "watch", "r", "--after-sequence", str(2**63)],
        ["runs", "watch", NO_TEXT],
        ["runs", "reply", "r", "x", "--interaction", str(2**31)],
        ["runs", "reply", "r", "--interaction", "1", "--json-value", "[" * 100_000],
        ["runs", "reply", "r", "--interaction", "1", "--json-value", TOO_DEEP],
        ["runs", "reply", "r", "--interaction", "1", NO_TEXT],
        ["runs", "output", "r", "--attempt", str(2**31)],
        ["runs", "output", NO_TEXT],
        ["runs", "interactions", NO_TEXT],
        ["recovery", "list", "--after", "0001-01-01T00:00:00+23:59"],
        ["recovery", "list", "--reason", NO_TEXT],
        ["recovery", "watch", "--after", NO_TEXT],
        ["recovery", "explain", NO_TEXT],
        ["health", "--service", NO_TEXT],
        ["health", "--timeout", "inf"],
        ["health", "--wait", "nan"],
        ["health", "--server", ""],
        ["health", "--server", NO_TEXT],
    ],
    ids=lambda said: " ".join(said)[:60].encode("ascii", "backslashreplace").decode(),
)
def test_what_no_message_can_hold_is_a_usage_error_in_few_words(
    run: Run, server: Script, said: list[str]
) -> None:
    there = [] if "--server" in said else ["--server", server.address]

    ended = run(*said, *there)

    assert (ended.code, server.asked) == (ExitCode.USAGE, [])
    assert "Error: Invalid value for" in ended.err
    assert len(ended.err) < 500


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (run_pb2.RUN_STATUS_SUCCEEDED, ExitCode.OK),
        (run_pb2.RUN_STATUS_WAITING_USER, ExitCode.OK),
        (run_pb2.RUN_STATUS_FAILED, ExitCode.FAILED),
        (run_pb2.RUN_STATUS_CANCELED, ExitCode.FAILED),
    ],
)
def test_create_and_wait_tells_how_the_run_ended(
    run: Run, server: Script, status: run_pb2.RunStatus.ValueType, code: ExitCode
) -> None:
    server.answers["CreateRun"] = [run_service_pb2.CreateRunResponse(run=a_run())]
    server.answers["GetRun"] = [run_service_pb2.GetRunResponse(run=a_run(status=status))]

    assert run("runs", "create", "e", "--wait", "--server", server.address).code == code


@pytest.mark.parametrize(
    ("said", "answer"),
    [(["yes"], "yes"), (["--json-value", "true"], True), (["--json-value", "null"], None)],
)
def test_reply_answers_the_open_question(
    run: Run, server: Script, said: list[str], answer: object
) -> None:
    waiting = a_run(status=run_pb2.RUN_STATUS_WAITING_USER)
    waiting.pending_interaction.interaction_id = 3
    server.answers["GetRun"] = [run_service_pb2.GetRunResponse(run=waiting)]
    server.answers["SubmitReply"] = [run_service_pb2.SubmitReplyResponse(run=a_run())]

    assert run("runs", "reply", "r", *said, "--server", server.address).code == ExitCode.OK

    request = run_service_pb2.SubmitReplyRequest.FromString(server.asked[-1][1])
    assert request.interaction_id == 3
    assert json_format.MessageToDict(request.response) == answer


def test_reply_without_an_open_question_is_refused(run: Run, server: Script) -> None:
    server.answers["GetRun"] = [run_service_pb2.GetRunResponse(run=a_run())]

    ended = run("runs", "reply", "r", "yes", "--server", server.address)

    assert ended.code == ExitCode.REFUSED
    assert [name for name, _ in server.asked] == ["GetRun"]


@pytest.mark.parametrize("said", [[], ["a", "--json-value", "1"], ["--json-value", "{"]])
def test_reply_needs_exactly_one_answer(run: Run, server: Script, said: list[str]) -> None:
    ended = run("runs", "reply", "r", *said, "--server", server.address)

    assert ended.code == ExitCode.USAGE
    assert server.asked == []


def test_output_is_written_byte_for_byte(server: Script) -> None:
    data = bytes(range(256))
    server.answers["StreamOutput"] = [
        run_service_pb2.StreamOutputResponse(attempt=1, offset=0, data=data),
        run_service_pb2.StreamOutputResponse(attempt=1, offset=256, data=data, truncated=True),
    ]
    command = [sys.executable, "-m", "runrecovery_service", "runs", "output", "r", "--stderr"]

    ended = subprocess.run(
        [*command, "--server", server.address], check=True, capture_output=True, timeout=60
    )

    assert ended.stdout == data * 2
    assert b"the rest of the output was not stored" in ended.stderr
    request = run_service_pb2.StreamOutputRequest.FromString(server.asked[0][1])
    assert request.channel == run_service_pb2.OUTPUT_CHANNEL_STDERR


def test_a_reader_that_goes_away_is_no_error(server: Script) -> None:
    rows = [a_run(run_id=f"r{number}") for number in range(1000)]
    page = run_service_pb2.ListRunsResponse(runs=rows, next_page_token=rows[0].run_id)
    server.answers["ListRuns"] = [page]
    command = [sys.executable, "-m", "runrecovery_service", "runs", "list", "--limit", "0"]

    with subprocess.Popen(
        [*command, "--server", server.address], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()

    assert said == b""


@pytest.mark.parametrize("path", ["--help", "health", "runs list", "runs output r"])
@pytest.mark.parametrize(
    ("redirect", "why"),
    [
        (">/dev/full", "error: standard output: No space left on device\n"),
        (">&-", "error: standard output: Bad file descriptor\n"),
        (">&- 2>&-", ""),
    ],
)
def test_output_that_cannot_be_written_is_one_sentence(
    server: Script, path: str, redirect: str, why: str
) -> None:
    server.answers["ListRuns"] = [run_service_pb2.ListRunsResponse(runs=[a_run()])]
    server.answers["StreamOutput"] = [run_service_pb2.StreamOutputResponse(data=b"x")]
    server.answers["Check"] = [HealthCheckResponse(status=HealthCheckResponse.SERVING)]
    command = f'exec "$0" -m runrecovery_service {path} {redirect}'

    ended = subprocess.run(
        ["/bin/sh", "-c", command, sys.executable],
        env={**os.environ, "RUNRECOVERY_SERVER": server.address},
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (ended.returncode, ended.stderr) == (ExitCode.FAILED, why)


@pytest.mark.parametrize("redirect", ["2>/dev/full", "2>&-"])
def test_a_message_that_cannot_be_written_changes_no_exit_code(redirect: str) -> None:
    command = (
        f'exec "$0" -m runrecovery_service health --timeout 0.1 --server 127.0.0.1:1 {redirect}'
    )

    ended = subprocess.run(["/bin/sh", "-c", command, sys.executable], check=False, timeout=60)

    assert ended.returncode == ExitCode.UNAVAILABLE


def test_what_the_encoding_of_the_output_lacks_is_written_out(server: Script) -> None:
    run = a_run(run_id="r→")
    server.answers["ListRuns"] = [run_service_pb2.ListRunsResponse(runs=[run])]
    command = [sys.executable, "-m", "runrecovery_service", "runs", "list"]

    ended = subprocess.run(
        [*command, "--server", server.address],
        env={**os.environ, "PYTHONIOENCODING": "iso-8859-1"},
        check=True,
        capture_output=True,
        timeout=60,
    )

    assert b"r\\u2192" in ended.stdout


def test_ctrl_c_ends_it_quietly_with_130(server: Script) -> None:
    running = recovery_service_pb2.GetRecoveryStatusResponse(
        state=recovery_pb2.SERVICE_STATE_RECOVERING
    )
    server.answers["GetRecoveryStatus"] = [running]
    command = [sys.executable, "-m", "runrecovery_service", "recovery", "status", "--watch"]

    with subprocess.Popen(
        [*command, "--server", server.address],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "RECOVERING" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=30)
        finally:
            process.kill()  # or leaving the block would wait for ever

    assert process.returncode == 130
    assert said.strip() == ""


def test_watching_ends_when_the_service_serves(run: Run, server: Script) -> None:
    serving = recovery_service_pb2.GetRecoveryStatusResponse(
        state=recovery_pb2.SERVICE_STATE_SERVING, instance="default", epoch=3
    )
    server.answers["GetRecoveryStatus"] = [serving]

    ended = run("recovery", "status", "--watch", "--server", server.address)

    assert ended.code == ExitCode.OK
    assert "default, epoch 3" in ended.out


def test_a_list_of_recovered_runs_is_filtered_as_said(run: Run, server: Script) -> None:
    server.answers["ListRecovered"] = [recovery_service_pb2.ListRecoveredResponse()]

    said = ["--state", "failed_reconciled", "--reason", "x", "--after", "2026-11-24T10:00:00"]
    said += ["--label", "a=1"]
    assert run("recovery", "list", *said, "--server", server.address).code == ExitCode.OK

    asked = recovery_service_pb2.ListRecoveredRequest.FromString(server.asked[0][1])
    request = asked.filter
    assert asked.view == run_pb2.RUN_VIEW_BASIC
    assert dict(request.labels) == {"a": "1"}
    assert list(request.recovery_states) == [run_pb2.RECOVERY_STATE_FAILED_RECONCILED]
    assert request.recovery_reason == "x"
    assert request.recovered_after.ToJsonString() == "2026-11-24T10:00:00Z"


def test_decisions_are_watched_as_said_a_line_each(run: Run, server: Script) -> None:
    made = run_pb2.RecoveryInfo(
        recovery_state=run_pb2.RECOVERY_STATE_FAILED_RECONCILED,
        recovery_reason="rule_7",
        status_before=run_pb2.RUN_STATUS_RUNNING,
        status_after=run_pb2.RUN_STATUS_FAILED,
        error_code="GONE",
    )
    decision = recovery_service_pb2.RecoveredRun(run_id="r", recovery=made)
    watching(server)
    server.answers["WatchRecovered"] = [
        recovery_service_pb2.WatchRecoveredResponse(cursor="c0", bookmark=run_pb2.WatchBookmark()),
        recovery_service_pb2.WatchRecoveredResponse(cursor="c1", decision=decision),
    ]

    said = ["--after", "c0", "--state", "failed_reconciled", "--reason", "rule_7"]
    said += ["--engine", "e", "--label", "a=1"]
    ended = run("recovery", "watch", *said, "--server", server.address)

    request = recovery_service_pb2.WatchRecoveredRequest.FromString(server.asked[-1][1])
    assert ended.out == "-  r  RUNNING → FAILED  FAILED_RECONCILED  rule_7  GONE\n"
    assert request == recovery_service_pb2.WatchRecoveredRequest(
        filter=recovery_service_pb2.RecoveredFilter(
            recovery_states=[run_pb2.RECOVERY_STATE_FAILED_RECONCILED],
            recovery_reason="rule_7",
            engine="e",
            labels={"a": "1"},
        ),
        after_cursor="c0",
    )


def test_an_explanation_tells_the_decision_the_facts_and_the_processes(
    run: Run, server: Script
) -> None:
    explanation = recovery_service_pb2.RecoveryExplanation(
        decision=run_pb2.RecoveryInfo(
            recovery_state=run_pb2.RECOVERY_STATE_FAILED_RECONCILED, recovery_reason="rule_7"
        ),
        because="its process was lost",
        facts=[
            recovery_service_pb2.RecoveryFact(name="HANDLE", held=True, source="the record"),
            recovery_service_pb2.RecoveryFact(name="CANCEL", source="no \x1b[2J cancel"),
        ],
        processes=[
            recovery_service_pb2.OrphanedProcess(
                pid=77,
                attempt=1,
                turn=2,
                evidence="cookie",
                signals=["SIGTERM", "SIGKILL"],
                ended=True,
                ended_by="shim",
            ),
            recovery_service_pb2.OrphanedProcess(pid=78, evidence="descent"),
        ],
    )
    server.answers["ExplainRecovery"] = [
        recovery_service_pb2.ExplainRecoveryResponse(explanations=[explanation])
    ]

    ended = run("recovery", "explain", "r", "--server", server.address)

    lines = [" ".join(line.split()) for line in ended.out.splitlines()]
    assert "decision: FAILED_RECONCILED, rule_7" in lines
    assert "because: its process was lost" in lines
    assert "HANDLE yes the record" in lines
    assert r"CANCEL no no \x1b[2J cancel" in lines
    assert "77 1 2 cookie SIGTERM SIGKILL ended by shim" in lines
    assert "78 0 0 descent - not found dead" in lines


def test_a_run_that_no_restart_has_touched_is_explained_so(run: Run, server: Script) -> None:
    server.answers["ExplainRecovery"] = [recovery_service_pb2.ExplainRecoveryResponse()]

    ended = run("recovery", "explain", "r", "--server", server.address)

    assert ended.out == "no restart has decided about this run\n"


@pytest.mark.parametrize("as_json", [True, False])
def test_a_plan_tells_its_totals_and_then_its_decisions(
    run: Run,
    server: Script,
    as_json: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    planned = recovery_service_pb2.PlannedDecision(
        run_id="a", engine="e", recovery_reason="rule_7", unchanged=True
    )
    totals = recovery_service_pb2.RecoveryPlan(
        decisions=[recovery_pb2.DecisionCount(rule="rule_7", count=2)],
        runs_total=2,
        runs_unchanged=1,
    )
    server.answers["PlanRecovery"] = [
        recovery_service_pb2.PlanRecoveryResponse(decisions=[planned, planned], plan=totals)
    ]

    said = ["--limit", "1", *(["--json"] if as_json else [])]
    ended = run("recovery", "plan", *said, "--server", server.address)

    first, *_, last = ended.out.splitlines()
    if as_json:
        assert json_format.Parse(first, recovery_service_pb2.RecoveryPlan()) == totals
        assert json_format.Parse(last, recovery_service_pb2.PlannedDecision()) == planned
    else:
        assert " ".join(first.split()) == "runs: 2, 1 unchanged"
        assert last.split("\t")[:2] == ["a", "e"]
        assert "2 x rule_7" in ended.out
        assert "--limit 0 shows all" in ended.err


def test_the_latest_report_is_shown_with_its_decisions_and_warnings(
    run: Run, server: Script
) -> None:
    report = recovery_pb2.Reconciliation(
        reconciliation_id="id-7",
        state=recovery_pb2.RECONCILIATION_STATE_COMPLETED,
        decisions=[
            recovery_pb2.DecisionCount(
                rule="running_interrupted",
                recovery_state=run_pb2.RECOVERY_STATE_FAILED_RECONCILED,
                count=12,
            )
        ],
        warnings=["pid 7 \x1b[2J refused"],
        bindings=recovery_pb2.BindingCounts(trust_entries=101),
        trust_removals=[
            recovery_pb2.TrustRemoval(run_id="r", file="/c", folder="/w\x1b", outcome="removed"),
            recovery_pb2.TrustRemoval(file="/c", folder="/x", outcome="gone"),
        ],
    )
    page = recovery_service_pb2.ListReconciliationsResponse(reconciliations=[report])
    server.answers["ListReconciliations"] = [page]

    ended = run("recovery", "show", "--server", server.address)

    assert "id-7" in ended.out
    assert "12 x running_interrupted → FAILED_RECONCILED" in ended.out
    assert r"warning: pid 7 \x1b[2J refused" in ended.out
    assert "101 trust entries" in ended.out
    assert r"trust of /w\x1b in /c: removed (run r)" in ended.out
    assert "trust of /x in /c: gone\n" in ended.out


def test_no_report_yet_is_not_found(run: Run, server: Script) -> None:
    server.answers["ListReconciliations"] = [recovery_service_pb2.ListReconciliationsResponse()]

    assert run("recovery", "show", "--server", server.address).code == ExitCode.NOT_FOUND


@pytest.mark.parametrize(("status", "code"), [(1, ExitCode.OK), (2, ExitCode.UNAVAILABLE)])
def test_health_is_ok_only_when_serving(
    run: Run, server: Script, status: int, code: ExitCode
) -> None:
    from google.protobuf import wrappers_pb2

    server.answers["Check"] = [wrappers_pb2.Int32Value(value=status)]

    ended = run("health", "--json", "--service", "liveness", "--server", server.address)

    assert ended.code == code
    assert json.loads(ended.out)["service"] == "liveness"


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_proxy_is_not_asked_about_a_service_on_loopback(
    run: Run, server: Script, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    from google.protobuf import wrappers_pb2

    server.answers["Check"] = [wrappers_pb2.Int32Value(value=1)]
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv(variable, "http://127.0.0.1:1")

    ended = run("health", "--server", server.address)

    assert (ended.code, ended.out) == (ExitCode.OK, "SERVING\n")


def test_waiting_for_health_ends_in_time(run: Run) -> None:
    ended = run("health", "--wait", "0.2", "--server", "127.0.0.1:1")

    assert ended.code == ExitCode.UNAVAILABLE


def test_an_enum_value_of_a_newer_service_is_shown_as_its_number() -> None:
    run = a_run()
    run.MergeFromString(b"\x20\x63")  # status = 99

    assert printing.word(run, "status") == "99"


def test_exit_codes_are_told_apart() -> None:
    assert len({code.value for code in ExitCode}) == len(ExitCode.__members__)


def a_run(
    run_id: str = "r",
    *,
    engine: str = "e",
    status: run_pb2.RunStatus.ValueType = run_pb2.RUN_STATUS_QUEUED,
) -> run_pb2.Run:
    return run_pb2.Run(run_id=run_id, engine=engine, status=status)
