"""Standard output: bytes, closed readers, full disks, encodings, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from grpc_health.v1.health_pb2 import HealthCheckResponse
from runrecovery.v1 import recovery_pb2, recovery_service_pb2, run_service_pb2
from runrecovery_service.cli.exit_codes import ExitCode

from .conftest import FixedAnswers, a_run


def test_output_is_written_byte_for_byte(server: FixedAnswers) -> None:
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


def test_a_reader_that_goes_away_is_no_error(server: FixedAnswers) -> None:
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
    server: FixedAnswers, path: str, redirect: str, why: str
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


def test_characters_that_the_encoding_lacks_are_escaped(server: FixedAnswers) -> None:
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


def test_ctrl_c_ends_it_quietly_with_130(server: FixedAnswers) -> None:
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
