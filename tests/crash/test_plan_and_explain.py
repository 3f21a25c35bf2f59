"""A restart decides as its plan says, and ExplainRecovery explains each decision."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from support.api import Api, status_word
from support.engines import GOOD_ENGINES, script
from support.service import Home, ServiceProcess
from support.stores import change, dump, lose_session, query
from support.waiting import until

NewHome = Callable[..., Home]

ASKS: Final = {"questions": [{"prompt": "Which?"}]}
HOLDS: Final = {"hold": True}
REQUEUE: Final = run_pb2.RESTART_POLICY_REQUEUE
PATIENCE_S: Final = 20.0
SLOTS: Final = 5
# Unlike the demo agent it lives on when its service is gone.
STAYS: Final = script(
    "import json, sys, time\n"
    "sys.stdin.readline()\n"
    "print(json.dumps({'type': 'ask', 'kind': 'open_text', 'prompt': 'So?'}), flush=True)\n"
    "time.sleep(60)\n",
    profile="sticky_process",
)
ENGINES: Final = {**GOOD_ENGINES, "stays": STAYS}
WAITING: Final = (
    "waiting", "waiting-too", "session-gone", "question-gone", "profile-gone",
    "status-damaged", "labels-damaged",
)  # fmt: skip
LAUNCHED: Final = ("sticky", "tree", "stubborn", "canceling", "again")
# What a restart is to find damaged must not have been decided on by the one before: these rows say
# that they were last written by the start that is to come.
DAMAGE: Final = (
    "DELETE FROM interaction WHERE run = (SELECT id FROM run WHERE run_id = 'question-gone')",
    "UPDATE run SET owner_epoch = 2 WHERE run_id = 'question-gone'",
    "UPDATE run SET owner_epoch = 2, profile = NULL WHERE run_id = 'profile-gone'",
    "UPDATE run SET owner_epoch = 2, status = 'GARBAGE' WHERE run_id = 'status-damaged'",
    "UPDATE run SET owner_epoch = 2, labels = 'x' WHERE run_id = 'labels-damaged'",
)
EXPECTED: Final = {
    "waiting": "resumable_waiting_preserved",
    "waiting-too": "resumable_waiting_preserved",
    "session-gone": "session_handle_lost",
    "question-gone": "pending_interaction_lost",
    "profile-gone": "profile_missing",
    "status-damaged": "record_damaged",
    "labels-damaged": "record_damaged",
    "sticky": "sticky_process_lost",
    "tree": "running_interrupted",
    "stubborn": "running_interrupted",
    "canceling": "cancel_completed",
    "again": "requeued",
    "queued": "queued_interrupted",
    "again-queued": "requeued",
    "replied": "accepted_reply_redriven",
    "replied-gone": "accepted_reply_session_lost",
}
OVER: Final = ("finished", "failed", "canceled")


def at_work(api: Api, run_id: str) -> bool:
    """Return whether the agent of a run has set up its children and its signal handlers."""
    run = api.get(run_id)
    if status_word(run) != "RUNNING" or run.attempt == 0:
        return False
    return b"worked" in b"".join(piece.data for piece in api.output(run_id))


def bring_into_every_situation(home: Home) -> tuple[ServiceProcess, Api]:
    """Start a service; put runs into every situation that a restart can find."""
    service, api = home.start()
    api.create("resumable", {}, run_id="finished")
    api.create("resumable", {"fail": "exit9"}, run_id="failed")
    for run_id in OVER[:2]:
        api.until_ended(run_id)
    answered = ("replied", "replied-gone")
    for run_id in (*WAITING, *answered, "canceled"):
        api.create("resumable", ASKS, run_id=run_id)
    for run_id in (*WAITING, *answered, "canceled"):
        api.until_status(run_id, "WAITING_USER")
    api.cancel("canceled")
    service.kill()
    for statement in DAMAGE:
        assert change(home, statement) == 1
    service, api = home.start()
    api.create("stays", {}, run_id="sticky")
    api.until_status("sticky", "WAITING_USER")
    api.create("resumable", {**HOLDS, "children": 2}, run_id="tree")
    for run_id in ("stubborn", "canceling"):
        api.create("resumable", {**HOLDS, "ignore_sigterm": True}, run_id=run_id)
    api.create("resumable", HOLDS, run_id="again", restart_policy=REQUEUE)
    for run_id in LAUNCHED[1:]:
        until(partial(at_work, api, run_id), f"{run_id} is at work")
    # Every slot is taken: what comes now stays QUEUED.
    api.create("resumable", HOLDS, run_id="queued")
    api.create("resumable", HOLDS, run_id="again-queued", restart_policy=REQUEUE)
    for run_id in answered:
        assert status_word(api.reply(run_id, 1, "this")) == "QUEUED"
    assert api.cancel("canceling").cancel_requested
    for run_id in ("session-gone", "replied-gone"):
        lose_session(home, run_id)
    return service, api


def plan(
    api: Api, *, page_size: int = 1000
) -> tuple[list[recovery_pb.PlannedDecision], recovery_pb.RecoveryPlan]:
    """Return the whole plan from its pages; assert that only the first page has the totals.

    Without the time that turns have been running, which grows from one plan to the next.
    """
    found: list[recovery_pb.PlannedDecision] = []
    numbers, token = None, ""
    while True:
        request = recovery_pb.PlanRecoveryRequest(page_size=page_size, page_token=token)
        page = api.recovery.PlanRecovery(request, timeout=PATIENCE_S)
        assert page.HasField("plan") is (not token)
        assert len(page.decisions) <= page_size
        numbers = numbers or page.plan
        found += page.decisions
        token = page.next_page_token
        if not token:
            for group in numbers.groups:
                group.ClearField("running_time")
            return found, numbers


def decision_of(planned: recovery_pb.PlannedDecision) -> tuple[Any, ...]:
    return (
        planned.recovery_reason,
        planned.recovery_state,
        planned.status_before,
        planned.status_after,
        planned.error_code,
    )


def decision_made(info: run_pb2.RecoveryInfo) -> tuple[Any, ...]:
    return (
        info.recovery_reason,
        info.recovery_state,
        info.status_before,
        info.status_after,
        info.error_code,
    )


def history(api: Api, run_ids: tuple[str, ...]) -> dict[str, list[run_pb2.RecoveryInfo]]:
    return {run_id: list(api.recovery_info(run_id).history) for run_id in run_ids}


def assert_restart_keeps_to_plan(
    home: Home, service: ServiceProcess, api: Api, run_ids: tuple[str, ...]
) -> tuple[ServiceProcess, Api, dict[str, str]]:
    """Plan, kill -9, restart, compare runs and totals; return the plan."""
    before = dump(home)
    planned, numbers = plan(api, page_size=2)
    everything = plan(api)
    assert dump(home) == before
    assert everything == (planned, numbers)
    assert len({one.run_id for one in planned}) == len(planned)
    decided = history(api, run_ids)
    open_launches = query(home, "SELECT count(*) FROM process_lease WHERE state <> 'CLOSED'")
    service.kill()
    service = home.listen()
    api = service.until_serving()

    report = api.status().reconciliation
    assert list(numbers.decisions) == list(report.decisions)
    assert (numbers.runs_total, numbers.runs_unchanged, numbers.quarantined) == (
        report.runs_total,
        report.runs_unchanged,
        report.quarantined,
    )
    assert report.runs_total == report.runs_scanned == len(planned)
    assert [(numbers.launches,)] == open_launches
    by_run = {one.run_id: one for one in planned}
    for run_id, earlier in decided.items():
        now = list(api.recovery_info(run_id).history)
        one = by_run.get(run_id)
        if one is None or one.unchanged:
            assert now == earlier, run_id
        else:
            assert now[1:] == earlier, run_id
            assert decision_made(now[0]) == decision_of(one), run_id
        if one is not None:
            assert decision_of(one)[:2] == decision_made(now[0])[:2]
    told = [event["run_id"] for event in service.events("recovery.run_decided")]
    assert told == [one.run_id for one in planned if not one.unchanged]
    return service, api, {one.run_id: one.recovery_reason for one in planned}


def test_a_restart_decides_as_planned_and_the_plan_changes_nothing(
    new_database_url: Callable[[], str], new_home: NewHome
) -> None:
    home = new_home(
        database=new_database_url(), engines=ENGINES, max_concurrent=SLOTS, cancel_grace_s=60.0
    )
    service, api = bring_into_every_situation(home)
    run_ids = (*EXPECTED, *OVER)

    service, api, planned = assert_restart_keeps_to_plan(home, service, api, run_ids)

    assert planned == EXPECTED
    # What goes on comes to rest again, and is planned for once more.
    for run_id in ("again", "again-queued"):
        until(partial(at_work, api, run_id), f"{run_id} is at work again")
    api.until_ended("replied")
    service, api, planned = assert_restart_keeps_to_plan(home, service, api, run_ids)
    assert planned == {
        "waiting": "resumable_waiting_preserved",
        "waiting-too": "resumable_waiting_preserved",
        "again": "requeued",
        "again-queued": "requeued",
    }
    for run_id in ("again", "again-queued"):
        api.cancel(run_id)
        api.until_ended(run_id)
    service, api, planned = assert_restart_keeps_to_plan(home, service, api, run_ids)
    assert planned.keys() == {"waiting", "waiting-too"}
    rest, numbers = plan(api)
    assert [one.unchanged for one in rest] == [True, True]
    assert (numbers.runs_unchanged, list(numbers.decisions), numbers.launches) == (2, [], 0)


def test_a_plan_sees_a_session_that_is_back(new_home: NewHome) -> None:
    home = new_home()
    service, api = home.start()
    for run_id in ("waits", "waits-too"):
        api.create("resumable", ASKS, run_id=run_id)
        api.until_status(run_id, "WAITING_USER")
    kept = lose_session(home, "waits")
    lost, _ = plan(api)
    for name, text in kept.items():
        Path(name).write_bytes(text)

    _, _, planned = assert_restart_keeps_to_plan(home, service, api, ("waits", "waits-too"))

    assert [one.recovery_reason for one in lost] == [
        "session_handle_lost",
        "resumable_waiting_preserved",
    ]
    assert set(planned.values()) == {"resumable_waiting_preserved"}


# -- explained -----------------------------------------------------------------------------------


def explanations(api: Api, run_id: str) -> list[recovery_pb.RecoveryExplanation]:
    request = recovery_pb.ExplainRecoveryRequest(run_id=run_id)
    return list(api.recovery.ExplainRecovery(request, timeout=PATIENCE_S).explanations)


FACTS: Final = ["PENDING", "HANDLE", "CANCEL", "REPLY", "REQUEUE"]


@pytest.mark.parametrize(
    ("guarded", "ended_by"), [(True, "shim"), (False, "service")], ids=["guarded", "shims killed"]
)
def test_the_explanation_of_an_orphaned_tree_names_each_process_and_who_killed_it(
    new_home: NewHome, *, guarded: bool, ended_by: str
) -> None:
    home = new_home()
    service, api = home.start()
    given = {**HOLDS, "children": 3, "ignore_sigterm": True}
    api.create("resumable", given, run_id="tree")
    until(lambda: at_work(api, "tree"), "the tree is complete")
    tree = home.agents_of("tree")
    shims = [shim.pid for shim in home.shims()]
    if guarded:
        service.kill()
        until(lambda: not home.shims(), "the shims have done their work")
    else:
        home.kill_with_shims(service)
    _, api = home.start()

    (one,) = explanations(api, "tree")

    assert one.decision == api.get("tree").recovery
    assert (one.decision.recovery_reason, one.because) == (
        "running_interrupted",
        "The service restarted while the run was running.",
    )
    assert one.profile == run_pb2.INTERACTIVE_PROFILE_KIND_RESUMABLE
    assert [fact.name for fact in one.facts] == [*FACTS, "RESULT", "QUESTION", "OVER_BUDGET"]
    # The demo agent names its session before it works.
    assert [fact.name for fact in one.facts if fact.held] == ["HANDLE"]
    assert all(fact.source.endswith(".") for fact in one.facts)
    processes = {process.pid: process for process in one.processes}
    assert set(tree) - set(shims) == processes.keys()
    assert len(processes) == len(one.processes) == 4
    for process in one.processes:
        assert (process.attempt, process.turn, process.ended) == (1, 1, True)
        assert process.ended_by == ended_by
        assert process.evidence in {"watermark", "cookie", "cgroup", "shim", "descent"}
        signals = [name for name in process.signals if name != "SIGSTOP"]  # held, to be killed
        assert signals in (["SIGTERM"], ["SIGTERM", "SIGKILL"], ["SIGKILL"])
    assert any("SIGKILL" in process.signals for process in one.processes)
    assert one.decision.processes_ended == 4
    assert home.agents() == []


def test_two_restarts_are_explained_newest_first_each_with_its_own_processes(
    new_home: NewHome,
) -> None:
    home = new_home()
    service, api = home.start()
    api.create("resumable", HOLDS, run_id="again", restart_policy=REQUEUE)
    pids = []
    for attempt in (1, 2):
        until(partial(at_work, api, "again"), "it works")
        assert api.get("again").attempt == attempt
        (pid,) = set(home.agents_of("again")) - {shim.pid for shim in home.shims()}
        pids.append(pid)
        home.kill_with_shims(service)
        service, api = home.start()

    second, first = explanations(api, "again")

    history = list(api.recovery_info("again").history)
    assert [second.decision, first.decision] == history
    assert [one.epoch for one in history] == [3, 2]
    told = [[(one.pid, one.attempt) for one in each.processes] for each in (first, second)]
    assert told == [[(pids[0], 1)], [(pids[1], 2)]]
    requeue = [fact for each in (first, second) for fact in each.facts if fact.name == "REQUEUE"]
    assert [fact.held for fact in requeue] == [True, True]
    assert ["1 of 3" in requeue[0].source, "2 of 3" in requeue[1].source] == [True, True]


def test_an_explanation_has_the_facts_of_its_situation(new_home: NewHome) -> None:
    home = new_home(engines=ENGINES, max_concurrent=SLOTS, cancel_grace_s=60.0)
    service, api = bring_into_every_situation(home)
    service.kill()
    _, api = home.start()

    held = {
        run_id: [fact.name for fact in explanations(api, run_id)[0].facts if fact.held]
        for run_id in EXPECTED
    }
    because = {run_id: explanations(api, run_id)[0].because for run_id in EXPECTED}

    assert held == {
        "waiting": ["PENDING", "HANDLE"],
        "waiting-too": ["PENDING", "HANDLE"],
        "session-gone": ["PENDING"],
        "question-gone": ["HANDLE"],
        "profile-gone": ["PENDING", "HANDLE"],
        "status-damaged": [],
        "labels-damaged": [],
        "sticky": ["PENDING"],
        "tree": ["HANDLE"],
        "stubborn": ["HANDLE"],
        "canceling": ["HANDLE", "CANCEL"],
        "again": ["HANDLE", "REQUEUE"],
        "queued": [],
        "again-queued": ["REQUEUE"],
        "replied": ["HANDLE", "REPLY"],
        "replied-gone": ["REPLY"],
    }
    assert all(text.endswith(".") for text in because.values())
    gone = {fact.name: fact.source for fact in explanations(api, "session-gone")[0].facts}
    assert "its session file was gone" in gone["HANDLE"]
