"""ReopenRun lets a run wait again that failed for a lost session, once the session is back."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import grpc
from google.protobuf.json_format import MessageToDict, MessageToJson
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, Refusal, refused, status_word
from support.engines import GOOD_ENGINES, agent
from support.observer import kinds
from support.service import Home, ServiceProcess
from support.stores import lose_session
from support.waiting import until

NewHome = Callable[..., Home]

ASKS: Final = {"questions": [{"kind": "confirm", "prompt": "Go on?", "options": ["yes", "no"]}]}
PATIENCE_S: Final = 20.0


def reopen(api: Api, run_id: str, **more: Any) -> run_pb2.Run:
    given = more or {"keep_session": True}
    return api.runs.ReopenRun(pb.ReopenRunRequest(run_id=run_id, **given), timeout=PATIENCE_S).run


def refused_reopening(api: Api, run_id: str, **more: Any) -> Refusal:
    return refused(lambda: reopen(api, run_id, **more))


def put_back(kept: dict[str, bytes]) -> None:
    for name, text in kept.items():
        Path(name).write_bytes(text)


def handle_in(kept: dict[str, bytes]) -> str:
    (name,) = kept
    found = re.search(r"session-([0-9a-f]{32})\.json", name)
    assert found
    return found[1]


def events_of(api: Api, run_id: str) -> list[str]:
    """Return the events of an ended run."""
    request = pb.WatchRunRequest(run_id=run_id, after_sequence=0)
    updates = api.runs.WatchRun(request, timeout=PATIENCE_S)
    return kinds([(update.sequence, update.event) for update in updates])


def lose_in_a_restart(home: Home, *run_ids: str) -> tuple[Api, dict[str, dict[str, bytes]]]:
    """Kill a service with waiting runs, remove their sessions, and restart the service."""
    service, api = home.start()
    for run_id in run_ids:
        api.create("resumable", ASKS, run_id=run_id)
    for run_id in run_ids:
        api.until_status(run_id, "WAITING_USER")
    service.kill()
    kept = {run_id: lose_session(home, run_id) for run_id in run_ids}
    _, api = home.start()
    return api, kept


def current(home: Home) -> ServiceProcess:
    return home.services[-1]


def test_a_lost_session_that_is_back_waits_with_its_question_and_succeeds(
    new_home: NewHome,
) -> None:
    home = new_home()
    service, api = home.start()
    api.create("resumable", ASKS, run_id="lost")
    before = api.until_status("lost", "WAITING_USER")
    service.kill()
    kept = lose_session(home, "lost")
    service, api = home.start()
    failed = api.get("lost")
    put_back(kept)

    reopened = reopen(api, "lost", keep_session=True, etag=failed.etag)

    assert (status_word(failed), failed.error.code) == ("FAILED", "SESSION_RESUME_FAILED")
    assert failed.recovery.recovery_reason == "session_handle_lost"
    assert failed.reopenable_until.ToNanoseconds() > failed.ended_at.ToNanoseconds()
    assert not failed.HasField("pending_interaction")
    assert status_word(reopened) == "WAITING_USER"
    assert reopened.pending_interaction == before.pending_interaction
    assert (reopened.recovery.recovery_reason, reopened.recovery.recovery_count) == (
        "reopened_by_caller",
        2,
    )
    assert not {"error", "endedAt", "reopenableUntil"} & set(MessageToDict(reopened))
    assert reopen(api, "lost") == reopened  # again: the same, and nothing changes
    service.kill()
    _, api = home.start()
    assert api.get("lost").etag == reopened.etag
    api.reply("lost", 1, "yes", etag=reopened.etag)
    ended = api.until_ended("lost")
    assert MessageToDict(ended.output) == {"answers": ["yes"]}
    assert ended.attempt == 1
    assert events_of(api, "lost") == [
        "CREATED", "STARTED", "ASKED", "RECOVERED", "REOPENED", "RECOVERED",
        "ANSWERED", "STARTED", "SUCCEEDED",
    ]  # fmt: skip


def test_reopening_without_the_session_is_refused_and_changes_nothing(new_home: NewHome) -> None:
    home = new_home()
    api, kept = lose_in_a_restart(home, "lost")
    failed = api.get("lost")

    missing = refused_reopening(api, "lost")
    wrong = refused_reopening(api, "lost", session_handle="0" * 32)

    for refusal in (missing, wrong):
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "SESSION_NOT_RESUMABLE",
        )
    assert api.get("lost") == failed
    current(home).kill()
    put_back(kept["lost"])
    _, api = home.start()
    assert api.get("lost") == failed  # a restart does not set it back by itself
    assert status_word(reopen(api, "lost")) == "WAITING_USER"  # and it still can be


def test_another_valid_handle_replaces_the_lost_one(new_home: NewHome) -> None:
    home = new_home()
    api, kept = lose_in_a_restart(home, "lost")
    (name,), (text,) = kept["lost"], kept["lost"].values()
    other = "f" * 32
    Path(name).with_name(f"session-{other}.json").write_bytes(text)

    reopened = reopen(api, "lost", session_handle=other)

    assert status_word(reopened) == "WAITING_USER"
    api.reply("lost", 1, "yes")
    assert MessageToDict(api.until_ended("lost").output) == {"answers": ["yes"]}
    assert other not in home.logs()


def test_a_run_with_an_accepted_reply_resumes_at_once_when_reopened(new_home: NewHome) -> None:
    home = new_home(max_concurrent=1)
    service, api = home.start()
    api.create("resumable", ASKS, run_id="replied")
    api.until_status("replied", "WAITING_USER")
    api.create("resumable", {"hold": True}, run_id="blocks")
    api.until_status("blocks", "RUNNING")
    api.reply("replied", 1, "yes")
    service.kill()
    kept = lose_session(home, "replied")
    _, api = home.start()
    failed = api.get("replied")
    put_back(kept)

    reopened = reopen(api, "replied")

    assert (status_word(failed), failed.recovery.recovery_reason) == (
        "FAILED",
        "accepted_reply_session_lost",
    )
    assert status_word(reopened) == "QUEUED"
    assert MessageToDict(api.until_ended("replied").output) == {"answers": ["yes"]}
    assert [one.response.string_value for one in api.interactions("replied")] == ["yes"]
    assert refused(lambda: api.reply("replied", 1, "no")).reason == "INTERACTION_SUPERSEDED"


def test_only_a_lost_session_can_be_reopened(new_home: NewHome) -> None:
    home = new_home(engines={**GOOD_ENGINES, "exits_3": agent("exits_3")})
    service, api = home.start()
    api.create("exits_3", run_id="engine-failed")
    api.create("resumable", run_id="succeeded")
    api.create("resumable", ASKS, run_id="canceled")
    api.until_status("canceled", "WAITING_USER")
    api.cancel("canceled")
    api.create("resumable", ASKS, run_id="waits")
    api.until_status("waits", "WAITING_USER")
    api.create("sticky", ASKS, run_id="sticky")
    api.until_status("sticky", "WAITING_USER")
    api.create("resumable", {"hold": True}, run_id="interrupted")
    api.until_status("interrupted", "RUNNING")
    for run_id in ("engine-failed", "succeeded"):
        api.until_ended(run_id)
    service.kill()
    _, api = home.start()
    run_ids = ("engine-failed", "succeeded", "canceled", "waits", "sticky", "interrupted")
    before = {run_id: api.get(run_id) for run_id in run_ids}

    refusals = {run_id: refused_reopening(api, run_id) for run_id in run_ids}

    assert before["sticky"].error.code == "INTERACTION_PROCESS_LOST"
    assert before["interrupted"].error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
    for run_id, refusal in refusals.items():
        assert (refusal.code, refusal.reason) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            "RUN_NOT_REOPENABLE",
        ), run_id
        assert not before[run_id].HasField("reopenable_until")
    assert {run_id: api.get(run_id) for run_id in run_ids} == before
    assert refused_reopening(api, "nobody").reason == "RUN_NOT_FOUND"


def test_a_reopening_with_an_old_etag_is_refused(new_home: NewHome) -> None:
    home = new_home()
    service, api = home.start()
    api.create("resumable", ASKS, run_id="lost")
    old = api.until_status("lost", "WAITING_USER").etag
    service.kill()
    kept = lose_session(home, "lost")
    _, api = home.start()
    put_back(kept)

    refusal = refused_reopening(api, "lost", keep_session=True, etag=old)

    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ABORTED, "ETAG_MISMATCH")
    etag = refusal.metadata["current_etag"]
    assert status_word(reopen(api, "lost", keep_session=True, etag=etag)) == "WAITING_USER"


def test_after_the_reopen_window_a_run_stays_failed_and_its_handle_is_deleted(
    new_home: NewHome,
) -> None:
    home = new_home(reopen_window_s=0.5)
    api, kept = lose_in_a_restart(home, "lost")
    put_back(kept["lost"])
    until(lambda: retired(home, "lost") is None, "the handle is forgotten")
    failed = api.get("lost")

    refusals = [refused_reopening(api, "lost")]
    current(home).kill()
    _, api = home.start()
    refusals.append(refused_reopening(api, "lost", session_handle=handle_in(kept["lost"])))

    assert [one.reason for one in refusals] == ["RUN_NOT_REOPENABLE"] * 2
    assert api.get("lost") == failed
    assert failed.HasField("reopenable_until")  # it says when the window was over


def test_a_reopen_window_also_passes_while_the_service_is_down(
    new_home: NewHome,
) -> None:
    home = new_home(reopen_window_s=600.0)
    api, kept = lose_in_a_restart(home, "passed", "open")
    put_back(kept["passed"] | kept["open"])
    current(home).kill()
    with home.store(writable=True) as store:  # as if the service had been down for ten minutes
        store.execute(
            "UPDATE run SET reopen_due_us = reopen_due_us - 600000000,"
            " reopenable_until = reopenable_until - 600000000 WHERE run_id = 'passed'"
        )
    _, api = home.start()

    refusal = refused_reopening(api, "passed")

    assert refusal.reason == "RUN_NOT_REOPENABLE"
    assert status_word(reopen(api, "open")) == "WAITING_USER"
    until(lambda: retired(home, "passed") is None, "the handle is forgotten")


def retired(home: Home, run_id: str) -> str | None:
    ((kept,),) = home.rows("SELECT retired_value FROM run WHERE run_id = ?", run_id)
    return None if kept is None else str(kept)


def test_no_answer_and_no_log_line_holds_the_handle(new_home: NewHome) -> None:
    home = new_home(log_level="debug")
    api, kept = lose_in_a_restart(home, "lost")
    secret, supplied = handle_in(kept["lost"]), "e" * 32
    (name,), (text,) = kept["lost"], kept["lost"].values()
    answers = [everything_about(api, "lost")]
    answers.append(repr(refused_reopening(api, "lost")))
    answers.append(repr(refused_reopening(api, "lost", session_handle=supplied)))
    Path(name).with_name(f"session-{supplied}.json").write_bytes(text)
    answers.append(MessageToJson(reopen(api, "lost", session_handle=supplied)))
    answers.append(everything_about(api, "lost"))
    current(home).kill()
    _, api = home.start()
    api.reply("lost", 1, "yes")
    api.until_ended("lost")

    answers.append(everything_about(api, "lost"))
    current(home).stop()

    for where in (*answers, home.logs()):
        assert "lost" in where
        assert secret not in where
        assert supplied not in where


def everything_about(api: Api, run_id: str) -> str:
    """Return all answers about a run as text."""
    explain = recovery_pb.ExplainRecoveryRequest(run_id=run_id)
    since = pb.WatchRunRequest(run_id=run_id)
    watch = api.runs.WatchRun(since, timeout=PATIENCE_S)
    snapshot = next(iter(watch))
    watch.cancel()
    messages = [
        api.get(run_id),
        api.recovery_info(run_id),
        api.recovery.ExplainRecovery(explain, timeout=PATIENCE_S),
        api.recovery.PlanRecovery(recovery_pb.PlanRecoveryRequest(), timeout=PATIENCE_S),
        api.runs.ListRuns(pb.ListRunsRequest(), timeout=PATIENCE_S),
        *api.recovered(),
        *api.interactions(run_id),
        api.status(),
        snapshot,
    ]
    shown = [MessageToJson(message) for message in messages]
    output = [piece.data.decode("utf-8", "replace") for piece in api.output(run_id)]
    return json.dumps([*shown, *output])
