"""Refused and failed calls: exit codes, sentences and hints."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys

import grpc
import pytest
from runrecovery import errors
from runrecovery.v1 import run_service_pb2
from runrecovery_service.cli import connection
from runrecovery_service.cli.exit_codes import ExitCode
from support.scripted_server import Fail

from .conftest import FixedAnswers, Run, a_run

CLIENT_ERRORS = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, errors.RunRecoveryClientError)
]


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
        (grpc.StatusCode.UNAUTHENTICATED, "CALLER_UNKNOWN", ExitCode.DENIED),
        (grpc.StatusCode.UNAUTHENTICATED, "", ExitCode.DENIED),
        (grpc.StatusCode.PERMISSION_DENIED, "ROLE_NOT_SUFFICIENT", ExitCode.DENIED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED", ExitCode.UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "", ExitCode.UNAVAILABLE),
        (grpc.StatusCode.INTERNAL, "INTERNAL", ExitCode.FAILED),
        (grpc.StatusCode.DATA_LOSS, "NEW_REASON", ExitCode.FAILED),
    ],
)
def test_a_refused_call_ends_in_its_exit_code_with_one_sentence(
    run: Run, server: FixedAnswers, code: grpc.StatusCode, reason: str, exit_code: ExitCode
) -> None:
    server.answers["CancelRun"] = Fail(code=code, reason=reason)

    ended = run("runs", "cancel", "r", "--server", server.address)

    assert (ended.code, ended.out) == (exit_code, "")
    assert ended.err.splitlines()[0] == "error: scripted failure"


def test_an_absent_service_is_unavailable_and_the_hint_names_it(run: Run) -> None:
    ended = run("health", "--server", "127.0.0.1:1")

    assert ended.code == ExitCode.UNAVAILABLE
    assert "is a service running at 127.0.0.1:1?" in ended.err


def test_a_list_of_an_absent_service_prints_no_empty_table(run: Run) -> None:
    ended = run("runs", "list", "--server", "127.0.0.1:1", "--timeout", "0.2")

    assert (ended.code, ended.out) == (ExitCode.UNAVAILABLE, "")
    assert ended.err.splitlines()[0] == "error: 127.0.0.1:1 did not answer in time"


@pytest.mark.parametrize("scheme", ["http://", "https://", "grpc://"])
def test_a_url_as_the_server_is_a_usage_error(run: Run, scheme: str) -> None:
    ended = run("health", "--server", f"{scheme}127.0.0.1:1")

    assert ended.code == ExitCode.USAGE
    assert f'must be HOST:PORT without "{scheme}"' in ended.err


def test_the_server_may_come_from_the_environment(
    run: Run, server: FixedAnswers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUNRECOVERY_SERVER", server.address)
    server.answers["GetRun"] = [run_service_pb2.GetRunResponse(run=a_run())]

    assert run("runs", "get", "r").code == ExitCode.OK


def test_grpc_writes_no_lines_of_its_own_to_stderr() -> None:
    environ = {key: text for key, text in os.environ.items() if key != "GRPC_VERBOSITY"}
    command = [sys.executable, "-m", "runrecovery_service", "health", "--server", "dns:///"]

    ended = subprocess.run(
        command, env=environ, check=False, capture_output=True, text=True, timeout=60
    )

    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) <= 2
