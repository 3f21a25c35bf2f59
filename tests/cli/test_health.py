"""`runrecovery health`."""

from __future__ import annotations

import json

import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from runrecovery_service.cli.exit_codes import ExitCode

from .conftest import FixedAnswers, Run


def test_a_health_check_that_waited_says_for_what(run: Run) -> None:
    ended = run("health", "--server", "127.0.0.1:1", "--wait", "0.2")

    assert ended.code == ExitCode.UNAVAILABLE
    assert ended.err.startswith("error: waiting for the service to be SERVING took too long; last")


@pytest.mark.parametrize(
    ("status", "word", "code"),
    [(1, "SERVING", ExitCode.OK), (2, "NOT_SERVING", ExitCode.UNAVAILABLE)],
)
def test_health_is_ok_only_when_serving(
    run: Run, server: FixedAnswers, status: int, word: str, code: ExitCode
) -> None:
    from google.protobuf import wrappers_pb2

    server.answers["Check"] = [wrappers_pb2.Int32Value(value=status)]

    ended = run("health", "--json", "--service", "liveness", "--server", server.address)

    assert ended.code == code
    assert json.loads(ended.out) == {"service": "liveness", "status": word}


def test_health_waits_for_the_name_that_is_given(run: Run, server: FixedAnswers) -> None:
    server.answers["Check"] = [HealthCheckResponse(status=HealthCheckResponse.SERVING)]

    ended = run("health", "--wait", "5", "--service", "liveness", "--server", server.address)

    assert (ended.code, ended.out) == (ExitCode.OK, "SERVING\n")
    (asked,) = (request for method, request in server.asked if method == "Check")
    assert HealthCheckRequest.FromString(asked).service == "liveness"


@pytest.mark.parametrize("variable", ["http_proxy", "https_proxy", "grpc_proxy"])
def test_a_proxy_is_not_asked_about_a_service_on_loopback(
    run: Run, server: FixedAnswers, monkeypatch: pytest.MonkeyPatch, variable: str
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
