"""Input of commands: JSON, session handles, text that no message can hold."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Final

import pytest
from google.protobuf import json_format
from runrecovery.v1 import run_service_pb2
from runrecovery_service.cli.exit_codes import ExitCode

from .conftest import FixedAnswers, Run, a_run


def typed(data: bytes) -> io.TextIOWrapper:
    """Return standard input with these bytes."""
    return io.TextIOWrapper(io.BytesIO(data))


@pytest.mark.parametrize("source", ["input.json", "-"])
def test_a_byte_order_mark_before_an_input_is_ignored(
    run: Run, server: FixedAnswers, monkeypatch: pytest.MonkeyPatch, source: str
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
    run: Run,
    server: FixedAnswers,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    data: bytes,
    why: str,
) -> None:
    Path("input.json").write_bytes(data)
    monkeypatch.setattr("sys.stdin", typed(data))

    ended = run("runs", "create", "e", "--input", source, "--server", server.address)

    assert (ended.code, server.asked) == (ExitCode.USAGE, [])
    assert why in ended.err


@pytest.mark.parametrize("source", ["handle.txt", "-"])
def test_reopening_reads_a_session_handle_that_is_never_shown(
    run: Run, server: FixedAnswers, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    server.answers["ReopenRun"] = [run_service_pb2.ReopenRunResponse(run=a_run())]
    Path("handle.txt").write_text("hush-7\n", encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed(b"hush-7\n"))

    ended = run("runs", "reopen", "r", "--session-handle-file", source, "--server", server.address)

    request = run_service_pb2.ReopenRunRequest.FromString(server.asked[0][1])
    assert ended.code == ExitCode.OK
    assert request.session_handle == "hush-7"
    assert "hush" not in ended.out + ended.err


def test_reopening_keeps_the_session_when_no_handle_is_given(
    run: Run, server: FixedAnswers
) -> None:
    server.answers["ReopenRun"] = [run_service_pb2.ReopenRunResponse(run=a_run())]

    run("runs", "reopen", "r", "--server", server.address)

    request = run_service_pb2.ReopenRunRequest.FromString(server.asked[0][1])
    assert request.WhichOneof("session") == "keep_session"
    assert request.keep_session


@pytest.mark.parametrize("content", [b"", b"\n", b"hush\nhush\n", b"\xff\n", None])
def test_a_file_that_holds_no_handle_is_a_usage_error_that_shows_nothing_of_it(
    run: Run, server: FixedAnswers, content: bytes | None
) -> None:
    if content is not None:
        Path("handle.txt").write_bytes(content)
    said = ["--session-handle-file", "handle.txt"]

    ended = run("runs", "reopen", "r", *said, "--server", server.address)

    assert (ended.code, server.asked) == (ExitCode.USAGE, [])
    assert "hush" not in ended.out + ended.err


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
def test_an_argument_that_cannot_be_sent_is_a_usage_error_and_nothing_is_sent(
    run: Run, server: FixedAnswers, said: list[str]
) -> None:
    assert run("runs", "create", "e", *said, "--server", server.address).code == ExitCode.USAGE
    assert server.asked == []


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
def test_text_that_no_message_can_hold_is_a_short_usage_error(
    run: Run, server: FixedAnswers, said: list[str]
) -> None:
    there = [] if "--server" in said else ["--server", server.address]

    ended = run(*said, *there)

    assert (ended.code, server.asked) == (ExitCode.USAGE, [])
    assert "Error: Invalid value for" in ended.err
    assert len(ended.err) < 500
