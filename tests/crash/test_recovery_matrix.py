"""A restart after kill -9 decides runs in every state by the recovery matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import recovery_pb2, run_pb2
from support.api import Api, refused, state_word, status_word
from support.engines import GOOD_ENGINES, script
from support.service import Home
from support.waiting import until

NewHome = Callable[..., Home]

QUESTION: Final = {"kind": "confirm", "prompt": "Go on?"}
REQUEUE: Final = run_pb2.RESTART_POLICY_REQUEUE
RESTART = "ORCHESTRATOR_RESTART_INTERRUPTED"
HOLDS: Final = {"hold": True}
STUBBORN: Final = {"hold": True, "ignore_sigterm": True}


@dataclass(frozen=True, kw_only=True)
class Told:
    """The expected state of a run after the restart."""

    status: str
    state: str
    rule: str
    before: str
    code: str = ""
    processes: int = 0


def failed(rule: str, before: str, code: str, *, processes: int = 0) -> Told:
    return Told(
        status="FAILED",
        state="FAILED_RECONCILED",
        rule=rule,
        before=before,
        code=code,
        processes=processes,
    )


EXPECTED: Final = {
    "waiting": Told(
        status="WAITING_USER",
        state="RECOVERED_WAITING",
        rule="resumable_waiting_preserved",
        before="WAITING_USER",
    ),
    "session-gone": failed("session_handle_lost", "WAITING_USER", "SESSION_RESUME_FAILED"),
    "question-gone": failed("pending_interaction_lost", "WAITING_USER", "SESSION_RESUME_FAILED"),
    "profile-gone": failed("profile_missing", "WAITING_USER", RESTART),
    "sticky": failed(
        "sticky_process_lost", "WAITING_USER", "INTERACTION_PROCESS_LOST", processes=1
    ),
    "tree": failed("running_interrupted", "RUNNING", RESTART, processes=4),
    "stubborn": failed("running_interrupted", "RUNNING", RESTART, processes=1),
    "canceling": Told(
        status="CANCELED",
        state="CANCELED_RECONCILED",
        rule="cancel_completed",
        before="RUNNING",
        processes=1,
    ),
    "again": Told(
        status="QUEUED", state="RECOVERED_QUEUED", rule="requeued", before="RUNNING", processes=1
    ),
    "again-queued": Told(
        status="QUEUED", state="RECOVERED_QUEUED", rule="requeued", before="QUEUED"
    ),
    "replied": Told(
        status="QUEUED", state="RECOVERED_QUEUED", rule="accepted_reply_redriven", before="QUEUED"
    ),
    "replied-gone": failed("accepted_reply_session_lost", "QUEUED", "SESSION_RESUME_FAILED"),
    "queued": failed("queued_interrupted", "QUEUED", RESTART),
}
# Unlike the demo agent it lives on when its service is gone.
STAYS: Final = script(
    "import json, sys, time\n"
    "sys.stdin.readline()\n"
    "print(json.dumps({'type': 'ask', 'kind': 'open_text', 'prompt': 'So?'}), flush=True)\n"
    "time.sleep(60)\n",
    profile="sticky_process",
)
ENGINES: Final = {**GOOD_ENGINES, "stays": STAYS}
UNTOUCHED: Final = ("finished", "failed", "canceled")
SLOTS: Final = 5


def lose_sessions(home: Home, key: int) -> None:
    """Remove the session files of a run."""
    files = list((home.data / "runs" / str(key)).rglob("session-*.json"))
    assert files
    for file in files:
        file.unlink()


def key_of(home: Home, run_id: str) -> int:
    (row,) = home.rows("SELECT id FROM run WHERE run_id = ?", run_id)
    return int(row[0])


def play_until_the_crash(home: Home, api: Api) -> None:
    """Create a run in every state."""
    asks = {"questions": [QUESTION]}
    api.create("resumable", {}, run_id="finished")
    api.create("resumable", {"fail": "exit9"}, run_id="failed")
    for run_id in UNTOUCHED[:2]:
        api.until_ended(run_id)
    waiting = ("waiting", "session-gone", "question-gone", "profile-gone", "canceled")
    for run_id in (*waiting, "replied", "replied-gone"):
        api.create("resumable", asks, run_id=run_id)
    for run_id in (*waiting, "replied", "replied-gone"):
        api.until_status(run_id, "WAITING_USER")
    api.cancel("canceled")
    api.create("stays", {}, run_id="sticky")
    api.until_status("sticky", "WAITING_USER")
    api.create("resumable", {**HOLDS, "children": 3}, run_id="tree")
    for run_id in ("stubborn", "canceling"):
        api.create("resumable", STUBBORN, run_id=run_id)
    api.create("resumable", HOLDS, run_id="again", restart_policy=REQUEUE)
    for run_id in ("tree", "stubborn", "canceling", "again"):
        until(partial(at_work, api, run_id), f"{run_id} is at work")
    # Every slot is taken: what comes now stays QUEUED.
    api.create("resumable", HOLDS, run_id="queued")
    api.create("resumable", HOLDS, run_id="again-queued", restart_policy=REQUEUE)
    for run_id in ("replied", "replied-gone"):
        assert status_word(api.reply(run_id, 1, "yes")) == "QUEUED"
    assert api.cancel("canceling").cancel_requested


def at_work(api: Api, run_id: str) -> bool:
    """Return whether the agent of a run has set up its children and its signal handlers."""
    started = api.get(run_id).attempt > 0
    return started and b"worked" in b"".join(piece.data for piece in api.output(run_id))


def damage(home: Home) -> None:
    """Remove what a crash of the machine may lose, while no service runs."""
    for run_id in ("session-gone", "replied-gone"):
        lose_sessions(home, key_of(home, run_id))
    with home.store(writable=True) as store:
        asked = (key_of(home, "question-gone"),)
        store.execute("DELETE FROM interaction WHERE run = ?", asked)
        store.execute("UPDATE run SET profile = NULL WHERE run_id = 'profile-gone'")


def as_told(run: run_pb2.Run, info: run_pb2.RecoveryInfo) -> Told:
    return Told(
        status=status_word(run),
        state=state_word(info),
        rule=info.recovery_reason,
        before=run_pb2.RunStatus.Name(info.status_before).removeprefix("RUN_STATUS_"),
        code=run.error.code,
        processes=info.processes_ended,
    )


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "shims killed too"])
def test_every_run_has_its_decision_of_the_matrix_and_all_answers_agree(
    new_home: NewHome, *, guarded: bool
) -> None:
    home = new_home(engines=ENGINES, max_concurrent=SLOTS, cancel_grace_s=60.0)
    service, api = home.start()
    play_until_the_crash(home, api)
    untouched = {run_id: api.get(run_id) for run_id in UNTOUCHED}
    etag = api.get("waiting").etag
    assert len(home.agents()) == 1 + 4 + 1 + 1 + 1
    if guarded:
        service.kill()
        until(lambda: not home.agents(), "the shims have ended their trees", timeout_s=5.0)
    else:
        home.kill_with_shims(service)
        assert len(home.agents()) == 1 + 4 + 1 + 1 + 1
    damage(home)
    demand_safe_mode(home)

    _, api = home.start()

    assert home.agents() == []
    assert {name: as_told((run := api.get(name)), run.recovery) for name in EXPECTED} == EXPECTED
    assert {run_id: api.get(run_id) for run_id in UNTOUCHED} == untouched
    assert api.get("waiting").etag == etag
    for name, told in EXPECTED.items():
        assert_consistent(home, api, name, told)
    assert_report(api)


def demand_safe_mode(home: Home) -> None:
    """Put the next start into safe mode: it decides every run and launches none."""
    home.write_config(safe_mode_after=1)
    with home.store(writable=True) as store:
        store.execute("UPDATE reconciliation SET state = 'FAILED'")


def assert_consistent(home: Home, api: Api, name: str, told: Told) -> None:
    """Assert that the run, its history, its questions and the lists agree."""
    run, info = api.get(name), api.recovery_info(name)
    assert list(info.history) == [info.recovery] == [run.recovery]
    assert (info.recovery.recovery_count, info.recovery.epoch) == (1, 2)
    assert info.recovery.reconciliation_id == api.status().reconciliation.reconciliation_id
    assert info.recovery.error_code == told.code
    assert info.recovery.recovered_at.ToNanoseconds() > run.created_at.ToNanoseconds()
    assert [one.run_id for one in api.recovered(recovery_reason=told.rule)].count(name) == 1
    ended = told.status in {"FAILED", "CANCELED"}
    keeps = told.rule in {"resumable_waiting_preserved", "accepted_reply_redriven"}
    assert run.HasField("ended_at") is ended
    assert run.HasField("error") is (told.status == "FAILED")
    assert run.session.has_handle is keeps
    assert run.HasField("pending_interaction") is (told.status == "WAITING_USER")
    assert not run.holds_slot
    states = home.rows("SELECT state FROM interaction WHERE run = ?", key_of(home, name))
    wanted = {"resumable_waiting_preserved": "OPEN", "accepted_reply_redriven": "ANSWERED"}
    assert {state for (state,) in states} <= {wanted.get(told.rule, "CLOSED")}


def assert_report(api: Api) -> None:
    report = api.status().reconciliation
    assert report.state == recovery_pb2.RECONCILIATION_STATE_COMPLETED
    counts = {count.rule: count.count for count in report.decisions}
    expected: dict[str, int] = {}
    for told in EXPECTED.values():
        expected[told.rule] = expected.get(told.rule, 0) + 1
    assert counts == expected
    assert report.runs_scanned == report.runs_total == len(EXPECTED)
    assert (report.runs_unchanged, report.quarantined) == (0, 0)
    assert (report.orphans.found, report.orphans.ended, report.orphans.refused) == (8, 8, 0)
    assert report.bindings.slots == SLOTS
    assert [phase.name for phase in report.phases] == [
        "orphans",
        "sessions",
        "converge",
        "bindings",
        "trust",
        "deadlines",
        "containment",
    ]
    assert list(report.warnings) == []


def test_further_restarts_decide_nothing_and_change_no_answer(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES, max_concurrent=SLOTS, cancel_grace_s=60.0)
    service, api = home.start()
    play_until_the_crash(home, api)
    service.kill()
    damage(home)
    demand_safe_mode(home)
    service, api = home.start()
    # These would start once the service is in its right mind again.
    for run_id in ("again", "again-queued", "replied"):
        api.cancel(run_id)
    everything = (*EXPECTED, *UNTOUCHED)
    before = {
        run_id: api.get(run_id).SerializeToString(deterministic=True) for run_id in everything
    }
    infos = {run_id: api.recovery_info(run_id) for run_id in everything}

    for _ in range(2):
        service.kill()
        service, api = home.start()
        report = api.status().reconciliation
        now = {
            run_id: api.get(run_id).SerializeToString(deterministic=True) for run_id in everything
        }
        assert now == before
        assert {run_id: api.recovery_info(run_id) for run_id in everything} == infos
        assert list(report.decisions) == []
        assert (report.runs_scanned, report.runs_unchanged) == (1, 1)
        assert not report.safe_mode
        assert home.agents() == []


def test_recovered_runs_continue(new_home: NewHome) -> None:
    home = new_home(max_concurrent=1, cancel_grace_s=60.0)
    service, api = home.start()
    asks = {"questions": [QUESTION], "result": {"name": "x"}}
    for run_id in ("waiting", "replied", "canceled-later"):
        api.create("resumable", asks, run_id=run_id)
        api.until_status(run_id, "WAITING_USER")
    waiting = api.get("waiting")
    api.create("resumable", {"work_s": 60}, run_id="blocks")
    api.until_status("blocks", "RUNNING")
    api.reply("replied", 1, "yes")
    api.create("resumable", {}, run_id="again", restart_policy=REQUEUE)
    service.kill()

    _, api = home.start()

    replied, again = api.until_ended("replied"), api.until_ended("again")
    api.reply("waiting", 1, "late", etag=waiting.etag)
    answered = api.until_ended("waiting")
    canceled = api.cancel("canceled-later")
    assert MessageToDict(replied.output) == {"name": "x", "answers": ["yes"]}
    assert (replied.attempt, replied.recovery.recovery_reason) == (1, "accepted_reply_redriven")
    assert (status_word(again), again.attempt) == ("SUCCEEDED", 1)
    assert MessageToDict(answered.output) == {"name": "x", "answers": ["late"]}
    assert status_word(canceled) == "CANCELED"
    launches = home.rows(
        "SELECT attempt, turn FROM process_lease WHERE run = ?", key_of(home, "replied")
    )
    assert sorted(launches) == [(1, 1), (1, 2)]
    (asked,) = api.interactions("replied")
    assert (asked.response.string_value, asked.interaction_id) == ("yes", 1)


def test_a_requeued_run_starts_again_until_its_attempts_are_used_up(new_home: NewHome) -> None:
    home = new_home(max_attempts=3)
    service, api = home.start()
    api.create("resumable", HOLDS, run_id="again", restart_policy=REQUEUE)
    workspaces = set()
    for attempt in (1, 2, 3):
        run = until_attempt(api, attempt)
        (pid,) = until(lambda: home.agents_of("again"), "its process lives")
        workspaces.add(Path(f"/proc/{pid}/cwd").readlink())
        assert run.recovery.recovery_count == attempt - 1
        service.kill()
        service, api = home.start()

    run = api.get("again")
    assert (status_word(run), run.error.code) == ("FAILED", RESTART)
    rules = [info.recovery_reason for info in api.recovery_info("again").history]
    assert rules == ["running_interrupted", "requeued", "requeued"]
    assert len(workspaces) == 3
    assert home.agents() == []


def until_attempt(api: Api, attempt: int) -> run_pb2.Run:
    def look() -> run_pb2.Run | None:
        run = api.get("again")
        return run if run.attempt == attempt and status_word(run) == "RUNNING" else None

    found: Any = until(look, f"attempt {attempt} runs")
    assert isinstance(found, run_pb2.Run)
    return found


def test_a_sticky_cancel_that_a_kill_interrupts_is_completed(new_home: NewHome) -> None:
    stubborn = script(
        "import json, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "sys.stdin.readline()\n"
        "print(json.dumps({'type': 'ask', 'kind': 'open_text', 'prompt': 'So?'}), flush=True)\n"
        "time.sleep(60)\n",
        profile="sticky_process",
    )
    home = new_home(engines={**GOOD_ENGINES, "stubborn": stubborn}, cancel_grace_s=60.0)
    service, api = home.start()
    run = api.create("stubborn", {})
    api.until_status(run.run_id, "WAITING_USER")
    accepted = api.cancel(run.run_id)
    refusal = refused(lambda: api.reply(run.run_id, 1, "too late"))
    service.kill()

    _, api = home.start()

    assert (status_word(accepted), accepted.cancel_requested) == ("WAITING_USER", True)
    assert refusal.reason == "RUN_NOT_WAITING"
    ended = api.get(run.run_id)
    assert (status_word(ended), ended.recovery.recovery_reason) == ("CANCELED", "cancel_completed")
    assert home.agents() == []
