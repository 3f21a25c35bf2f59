"""`runrecovery runs`: requests, tables and JSON."""

from __future__ import annotations

from pathlib import Path

import pytest
from google.protobuf import json_format
from runrecovery.v1 import run_pb2, run_service_pb2
from runrecovery_service.cli import printing
from runrecovery_service.cli.exit_codes import ExitCode

from .conftest import FixedAnswers, Run, a_run


def test_json_output_is_one_message_per_line_with_the_names_of_the_contract(
    run: Run, server: FixedAnswers
) -> None:
    rows = [a_run(run_id="a"), a_run(run_id="b", status=run_pb2.RUN_STATUS_RUNNING)]
    server.answers["ListRuns"] = [run_service_pb2.ListRunsResponse(runs=rows)]

    ended = run("runs", "list", "--json", "--server", server.address)

    found = [json_format.Parse(line, run_pb2.Run()) for line in ended.out.splitlines()]
    assert found == rows
    assert "run_id" in ended.out
    assert '"holds_slot": false' in ended.out


def test_a_table_in_a_pipe_is_plain_and_complete(run: Run, server: FixedAnswers) -> None:
    long_id = "r" * 64
    row = a_run(run_id=long_id, engine="e" * 63)
    server.answers["ListRuns"] = [run_service_pb2.ListRunsResponse(runs=[row])]

    ended = run("runs", "list", "--server", server.address)

    heading, line = ended.out.splitlines()
    assert heading.split("\t")[:3] == ["RUN ID", "STATUS", "ENGINE"]
    assert line.split("\t")[:3] == [long_id, "QUEUED", "e" * 63]


@pytest.mark.parametrize(("limit", "shown", "notes"), [(1, 1, 1), (2, 2, 0), (0, 2, 0)])
def test_a_limited_list_says_when_there_is_more(
    run: Run, server: FixedAnswers, limit: int, shown: int, notes: int
) -> None:
    rows = [a_run(run_id="a"), a_run(run_id="b")]
    server.answers["ListRuns"] = [run_service_pb2.ListRunsResponse(runs=rows)]

    ended = run("runs", "list", "--limit", str(limit), "--server", server.address)

    assert len(ended.out.splitlines()) == 1 + shown
    assert ended.err.count("--limit 0 shows all") == notes


def test_create_sends_every_option(run: Run, server: FixedAnswers) -> None:
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
def test_create_leaves_out_the_options_that_were_not_given(
    run: Run,
    server: FixedAnswers,
    said: list[str],
    required: bool | None,  # noqa: FBT001 - a parameter of the test
) -> None:
    server.answers["CreateRun"] = [run_service_pb2.CreateRunResponse(run=a_run())]

    run("runs", "create", "e", *said, "--server", server.address)

    request = run_service_pb2.CreateRunRequest.FromString(server.asked[0][1])
    profile = request.interactive_profile
    assert request.HasField("interactive_profile") == (required is not None)
    assert (profile.require_user_reply if profile.ListFields() else None) == required


def test_a_list_of_runs_sends_every_filter_and_requests_only_the_rows_that_it_shows(
    run: Run, server: FixedAnswers
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


def test_a_description_shows_the_times_of_a_run_and_its_open_question(
    run: Run, server: FixedAnswers
) -> None:
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
    ("status", "code"),
    [
        (run_pb2.RUN_STATUS_SUCCEEDED, ExitCode.OK),
        (run_pb2.RUN_STATUS_WAITING_USER, ExitCode.OK),
        (run_pb2.RUN_STATUS_FAILED, ExitCode.FAILED),
        (run_pb2.RUN_STATUS_CANCELED, ExitCode.FAILED),
    ],
)
def test_create_with_wait_exits_with_the_code_of_the_final_status(
    run: Run, server: FixedAnswers, status: run_pb2.RunStatus.ValueType, code: ExitCode
) -> None:
    server.answers["CreateRun"] = [run_service_pb2.CreateRunResponse(run=a_run())]
    server.answers["GetRun"] = [run_service_pb2.GetRunResponse(run=a_run(status=status))]

    assert run("runs", "create", "e", "--wait", "--server", server.address).code == code


@pytest.mark.parametrize(
    ("said", "answer"),
    [(["yes"], "yes"), (["--json-value", "true"], True), (["--json-value", "null"], None)],
)
def test_reply_answers_the_open_question(
    run: Run, server: FixedAnswers, said: list[str], answer: object
) -> None:
    waiting = a_run(status=run_pb2.RUN_STATUS_WAITING_USER)
    waiting.pending_interaction.interaction_id = 3
    server.answers["GetRun"] = [run_service_pb2.GetRunResponse(run=waiting)]
    server.answers["SubmitReply"] = [run_service_pb2.SubmitReplyResponse(run=a_run())]

    assert run("runs", "reply", "r", *said, "--server", server.address).code == ExitCode.OK

    request = run_service_pb2.SubmitReplyRequest.FromString(server.asked[-1][1])
    assert request.interaction_id == 3
    assert json_format.MessageToDict(request.response) == answer


def test_reply_without_an_open_question_is_refused(run: Run, server: FixedAnswers) -> None:
    server.answers["GetRun"] = [run_service_pb2.GetRunResponse(run=a_run())]

    ended = run("runs", "reply", "r", "yes", "--server", server.address)

    assert ended.code == ExitCode.REFUSED
    assert [name for name, _ in server.asked] == ["GetRun"]


@pytest.mark.parametrize("said", [[], ["a", "--json-value", "1"], ["--json-value", "{"]])
def test_reply_needs_exactly_one_answer(run: Run, server: FixedAnswers, said: list[str]) -> None:
    ended = run("runs", "reply", "r", *said, "--server", server.address)

    assert ended.code == ExitCode.USAGE
    assert server.asked == []


def test_an_enum_value_of_a_newer_service_is_shown_as_its_number() -> None:
    run = a_run()
    run.MergeFromString(b"\x20\x63")  # status = 99

    assert printing.word(run, "status") == "99"
