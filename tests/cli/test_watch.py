"""`runrecovery runs watch`."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from runrecovery.v1 import run_pb2, run_service_pb2
from runrecovery_service.cli.exit_codes import ExitCode

from .conftest import FixedAnswers, Run, a_run, script_watch


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


def test_a_watch_prints_a_line_for_each_event(run: Run, server: FixedAnswers) -> None:
    script_watch(server, *a_watched_run(run_pb2.RUN_STATUS_SUCCEEDED))

    ended = run("runs", "watch", "r", "--server", server.address)

    assert ended.code == ExitCode.OK
    assert [line.split("  ")[1:] for line in ended.out.splitlines()] == [
        ["#4", "WAITING_USER", "snapshot", r"Ship \x1b[2J it?"],
        ["#5", "ANSWERED", "→ RUNNING", "attempt 2", "question 1"],
        ["#6", "RECOVERED", "→ SUCCEEDED", "GONE", "rule_7"],
    ]


def test_a_watch_in_json_prints_an_update_per_line(run: Run, server: FixedAnswers) -> None:
    updates = a_watched_run(run_pb2.RUN_STATUS_SUCCEEDED)
    script_watch(server, *updates)

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
        (run_pb2.RUN_STATUS_WAITING_USER, ExitCode.FAILED),  # quarantined
    ],
)
@pytest.mark.parametrize("seen_before", [True, False])
def test_a_watch_exits_with_the_code_of_the_final_status(
    run: Run,
    server: FixedAnswers,
    status: run_pb2.RunStatus.ValueType,
    code: ExitCode,
    seen_before: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    script_watch(server, *([] if seen_before else a_watched_run(status)))
    server.answers["GetRun"] = [run_service_pb2.GetRunResponse(run=a_run(status=status))]

    assert run("runs", "watch", "r", "--server", server.address).code == code


@pytest.mark.parametrize(
    ("said", "after"),
    [([], None), (["--from-start"], 0), (["--after-sequence", "3"], 3)],
)
def test_a_watch_begins_after_the_given_sequence(
    run: Run, server: FixedAnswers, said: list[str], after: int | None
) -> None:
    script_watch(server)
    server.answers["GetRun"] = [run_service_pb2.GetRunResponse(run=a_run())]

    run("runs", "watch", "r", *said, "--server", server.address)

    asked = [request for name, request in server.asked if name == "WatchRun"]
    request = run_service_pb2.WatchRunRequest.FromString(asked[0])
    assert (request.after_sequence if request.HasField("after_sequence") else None) == after


def test_a_watch_takes_only_one_start(run: Run, server: FixedAnswers) -> None:
    said = ["--from-start", "--after-sequence", "3"]

    assert run("runs", "watch", "r", *said, "--server", server.address).code == ExitCode.USAGE
    assert server.asked == []


@pytest.mark.parametrize("command", [["runs", "watch", "r"], ["recovery", "watch"]])
def test_a_watch_of_an_absent_service_is_unavailable_after_its_timeout(
    run: Run, command: list[str]
) -> None:
    ended = run(*command, "--timeout", "0.2", "--server", "127.0.0.1:1")

    assert ended.code == ExitCode.UNAVAILABLE


def test_ctrl_c_ends_a_watch_quietly_with_130(server: FixedAnswers) -> None:
    def silently(_request: bytes, context: grpc.ServicerContext) -> Iterator[Message]:
        yield a_watched_run(run_pb2.RUN_STATUS_RUNNING)[0]
        gone = threading.Event()
        context.add_callback(gone.set)
        gone.wait(60)

    script_watch(server)
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
