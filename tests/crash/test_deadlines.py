"""No deadline is early or forgotten over kills, stops and steps of the wall clock.

The budget of attempts counts over restarts.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refused, status_word
from support.engines import GOOD_ENGINES, RESUMABLE, EngineSpec, script
from support.observer import Events, assert_whole, kinds
from support.service import Home
from support.stores import lose_session
from support.waiting import until

NewHome = Callable[..., Home]

ASKS: Final = {"questions": [{"prompt": "Which?"}]}
HOLDS: Final = {"hold": True}
PATIENCE_S: Final = 20.0
SOON_S: Final = 0.3
FAR_S: Final = 1000.0
TEN_DAYS_S: Final = 10 * 24 * 3600
# Ends with what it was told: the reply as it came, members and all.
TELLS: Final = (
    "import json, sys\n"
    "say = lambda **fields: print(json.dumps(fields), flush=True)\n"
    "message = json.loads(sys.stdin.readline())\n"
    "if message['type'] == 'start':\n"
    "    say(type='session', value='s')\n"
    "    say(type='ask', kind='confirm', prompt='Go on?')\n"
    "    if not message['input'].get('stays'):\n"
    "        sys.exit(0)\n"
    "    message = {'reply': json.loads(sys.stdin.readline())}\n"
    "    message['reply'].pop('type')\n"
    "say(type='result', output={'told': message['reply']})\n"
)
# Asks, and works for ever on the answer.
STALLS: Final = (
    "import json, sys, time\n"
    "say = lambda **fields: print(json.dumps(fields), flush=True)\n"
    "if json.loads(sys.stdin.readline())['type'] == 'start':\n"
    "    say(type='session', value='s')\n"
    "    say(type='ask', kind='confirm', prompt='Go on?')\n"
    "else:\n"
    "    time.sleep(60)\n"
)
ENGINES: Final = {
    **GOOD_ENGINES,
    "tells": script(TELLS),
    "tells-sticky": script(TELLS, profile="sticky_process"),
}


def impatient(seconds: float, *, require_user_reply: bool = False) -> run_pb2.InteractiveProfile:
    return run_pb2.InteractiveProfile(
        session_timeout=Duration(nanos=int(seconds % 1 * 1e9), seconds=int(seconds)),
        require_user_reply=require_user_reply,
    )


def limited(engine: EngineSpec, seconds: float) -> EngineSpec:
    """Return the engine with a limit on the time of a run."""
    more = {**engine.more, "max_run_time_s": seconds}
    return EngineSpec(command=engine.command, profile=engine.profile, more=more)


def events_of(api: Api, run_id: str) -> Events:
    """Return the events of an ended run."""
    request = pb.WatchRunRequest(run_id=run_id, after_sequence=0)
    updates = api.runs.WatchRun(request, timeout=PATIENCE_S)
    return [(update.sequence, update.event) for update in updates]


# -- questions that nobody answers ---------------------------------------------------------------

NOBODYS_ANSWER: Final = {"interaction_id": 1.0, "response": None, "auto_decided": True}


def assert_auto_decided(api: Api, run_id: str) -> None:
    run = api.until_ended(run_id)
    assert status_word(run) == "SUCCEEDED", run
    assert MessageToDict(run.output) == {"told": NOBODYS_ANSWER}
    assert run.auto_decided_count == 1
    (asked,) = api.interactions(run_id)
    assert asked.auto_decided
    assert asked.response.HasField("null_value")
    assert asked.HasField("replied_at")
    events = events_of(api, run_id)
    assert_whole(events)
    assert kinds(events).count("AUTO_DECIDED") == 1
    assert "ANSWERED" not in kinds(events)
    assert refused(lambda: api.reply(run_id, 1, "late")).reason == "INTERACTION_SUPERSEDED"


@pytest.mark.parametrize(
    ("engine", "given"),
    [("tells", {}), ("tells-sticky", {"stays": True})],
    ids=["resumable", "sticky"],
)
def test_a_question_that_needs_no_user_is_decided_by_its_default_and_sent_to_the_agent(
    new_home: NewHome, engine: str, given: dict[str, Any]
) -> None:
    home = new_home(engines=ENGINES)
    _, api = home.start()

    api.create(engine, given, run_id="alone", interactive_profile=impatient(SOON_S))
    api.create(engine, given, run_id="waits", interactive_profile=impatient(FAR_S))

    assert_auto_decided(api, "alone")
    waits = api.until_status("waits", "WAITING_USER")
    assert (waits.auto_decided_count, waits.pending_interaction.HasField("wait_deadline_at")) == (
        0,
        True,
    )


def test_a_question_that_expires_while_the_service_is_down_is_decided_at_the_next_start(
    new_home: NewHome,
) -> None:
    home = new_home(engines=ENGINES)
    service, api = home.start()
    for run_id in ("passed", "waits"):
        api.create("tells", run_id=run_id, interactive_profile=impatient(FAR_S))
        api.until_status(run_id, "WAITING_USER")
    service.kill()
    let_pass(home, FAR_S, "passed")

    _, api = home.start()

    assert_auto_decided(api, "passed")
    recovered = api.get("passed").recovery
    assert recovered.recovery_reason == "resumable_waiting_preserved"
    assert status_word(api.get("waits")) == "WAITING_USER"
    assert api.get("waits").auto_decided_count == 0


def let_pass(home: Home, seconds: float, *run_ids: str) -> None:
    """Move the deadlines of these runs so much earlier, while no service runs."""
    us = int(seconds * 1e6)
    marks = ", ".join("?" * len(run_ids))
    with home.store(writable=True) as store:
        for column in ("wait_due_us", "run_due_us", "reopen_due_us", "run_deadline_at"):
            store.execute(
                f"UPDATE run SET {column} = {column} - {us} WHERE run_id IN ({marks})",  # noqa: S608 - our own words
                run_ids,
            )
        store.execute(
            f"UPDATE interaction SET wait_deadline_at = wait_deadline_at - {us}"  # noqa: S608
            f" WHERE run IN (SELECT id FROM run WHERE run_id IN ({marks}))",
            run_ids,
        )


def test_an_expired_sticky_wait_fails_and_leaves_no_process(new_home: NewHome) -> None:
    home = new_home()
    _, api = home.start()
    run_id = api.create(
        "sticky", ASKS, interactive_profile=impatient(SOON_S, require_user_reply=True)
    ).run_id

    run = api.until_ended(run_id)

    assert (status_word(run), run.error.code) == ("FAILED", "INTERACTION_WAIT_TIMEOUT")
    assert run.auto_decided_count == 0
    (asked,) = api.interactions(run_id)
    assert not asked.HasField("response")
    assert home.agents() == []
    assert not run.holds_slot
    assert refused(lambda: api.reply(run_id, 1, "late")).reason == "RUN_NOT_WAITING"


def test_a_resumable_wait_that_requires_a_user_reply_never_expires(new_home: NewHome) -> None:
    home = new_home()
    service, api = home.start()
    mine = impatient(SOON_S, require_user_reply=True)
    api.create("resumable", ASKS, run_id="waits", interactive_profile=mine)
    # Its deadline is the later one: once it is carried out, so would the other be.
    until(lambda: status_word(api.get("waits")) == "WAITING_USER", "it waits")
    api.create("sticky", ASKS, run_id="sticky", interactive_profile=mine)
    api.until_ended("sticky")

    run = api.get("waits")

    assert status_word(run) == "WAITING_USER"
    assert not run.pending_interaction.HasField("wait_deadline_at")
    service.kill()
    _, api = home.start()
    api.reply("waits", 1, "this")
    assert MessageToDict(api.until_ended("waits").output) == {"answers": ["this"]}


# -- whole runs ----------------------------------------------------------------------------------


def test_a_run_over_its_time_fails_in_every_status(new_home: NewHome) -> None:
    home = new_home(
        engines={"resumable": limited(RESUMABLE, 4.0), "free": RESUMABLE}, max_concurrent=2
    )
    _, api = home.start()
    # One waits, one was answered and waits for a slot, one is at work; each has been launched.
    for run_id in ("waiting", "queued"):
        api.create("resumable", ASKS, run_id=run_id)
    for run_id in ("waiting", "queued"):
        until(lambda r=run_id: status_word(api.get(r)) == "WAITING_USER", "it waits")  # type: ignore[misc]
    api.create("free", HOLDS, run_id="free")
    api.create("resumable", HOLDS, run_id="running")
    until(lambda: api.get("running").attempt == 1, "it runs")
    queued = api.reply("queued", 1, "this")

    ended = {run_id: api.until_ended(run_id) for run_id in ("waiting", "queued", "running")}

    assert status_word(queued) == "QUEUED"
    for run_id, run in ended.items():
        assert (status_word(run), run.error.code) == ("FAILED", "RUN_TIMEOUT"), run_id
        assert run.HasField("run_deadline_at")
        assert not run.HasField("pending_interaction")
        assert_whole(events_of(api, run_id))
    until(lambda: home.agents_of("running") == [], "its process has ended")
    free = api.get("free")
    assert (status_word(free), free.HasField("run_deadline_at")) == ("RUNNING", False)
    assert refused(lambda: api.reply("waiting", 1, "late")).reason == "RUN_NOT_WAITING"


def test_the_time_of_a_run_also_counts_while_the_service_is_down(new_home: NewHome) -> None:
    engines = {"resumable": limited(RESUMABLE, FAR_S), "stalls": limited(script(STALLS), FAR_S)}
    home = new_home(engines=engines, max_concurrent=1)
    service, api = home.start()
    for run_id, engine in (
        ("waiting", "resumable"),
        ("in-time", "resumable"),
        ("queued", "stalls"),
    ):
        api.create(engine, ASKS, run_id=run_id)
        api.until_status(run_id, "WAITING_USER")
    api.create("resumable", HOLDS, run_id="running", restart_policy=run_pb2.RESTART_POLICY_REQUEUE)
    until(lambda: api.get("running").attempt == 1, "it runs")
    api.reply("queued", 1, "this")
    service.kill()
    let_pass(home, FAR_S, "waiting", "queued", "running")

    _, api = home.start()

    # Starting again does not begin the time of a run anew: it is counted from its first launch.
    for run_id in ("waiting", "queued", "running"):
        assert api.until_ended(run_id).error.code == "RUN_TIMEOUT", run_id
    rules = {run_id: api.get(run_id).recovery.recovery_reason for run_id in ("queued", "running")}
    assert rules == {"queued": "accepted_reply_redriven", "running": "requeued"}
    assert status_word(api.get("in-time")) == "WAITING_USER"
    api.reply("in-time", 1, "this")
    assert status_word(api.until_ended("in-time")) == "SUCCEEDED"
    assert home.agents() == []


# -- a wall clock that steps ---------------------------------------------------------------------

WALL: Final = {
    "run": (
        "created_at", "started_at", "updated_at", "ended_at", "queued_at", "recovered_at",
        "cancel_requested_at", "run_deadline_at", "reopenable_until",
    ),
    "interaction": ("asked_at", "wait_deadline_at", "replied_at"),
    "run_event": ("happened_at",),
    "recovery_event": ("recovered_at",),
    "reconciliation": ("started_at", "finished_at"),
    "instance": ("lease_until", "started_at"),
    "process_lease": ("created_at", "closed_at"),
    "request_receipt": ("created_at",),
}  # fmt: skip


def step_the_wall_clock(home: Home, seconds: int) -> None:
    """Make every recorded time older by `seconds`, as if the wall clock had been set ahead.

    With negative seconds the recorded times are in the future, as if it had been set back.
    """
    with home.store(writable=True) as store:
        for table, columns in WALL.items():
            settings = ", ".join(f"{name} = {name} - {seconds * 10**6}" for name in columns)
            store.execute(f"UPDATE {table} SET {settings}")  # noqa: S608 - our own words


@pytest.mark.parametrize("seconds", [TEN_DAYS_S, -TEN_DAYS_S], ids=["forwards", "backwards"])
def test_no_deadline_is_early_or_lost_when_the_wall_clock_steps(
    new_home: NewHome, seconds: int
) -> None:
    home = new_home(engines={**ENGINES, "limited": limited(RESUMABLE, FAR_S)})
    service, api = home.start()
    api.create("resumable", ASKS, run_id="lost")
    api.until_status("lost", "WAITING_USER")
    service.kill()
    kept = lose_session(home, "lost")
    service, api = home.start()
    for run_id in ("wait-far", "wait-near"):
        api.create("tells", run_id=run_id, interactive_profile=impatient(FAR_S))
        api.until_status(run_id, "WAITING_USER")
    for run_id in ("run-far", "run-near"):
        api.create("limited", ASKS, run_id=run_id)
        api.until_status(run_id, "WAITING_USER")
    assert api.get("lost").error.code == "SESSION_RESUME_FAILED"
    for name, text in kept.items():
        Path(name).write_bytes(text)
    service.kill()
    let_pass(home, FAR_S, "wait-near", "run-near")
    step_the_wall_clock(home, seconds)
    service, api = home.start()

    # The near ones come to pass, by the clock that nobody sets; by then the far ones would have,
    # had the wall clock been asked.
    assert_auto_decided(api, "wait-near")
    assert api.until_status("run-near", "FAILED").error.code == "RUN_TIMEOUT"
    for run_id in ("wait-far", "run-far"):
        far = api.get(run_id)
        assert (status_word(far), far.auto_decided_count) == ("WAITING_USER", 0), far
    request = pb.ReopenRunRequest(run_id="lost", keep_session=True)
    assert status_word(api.runs.ReopenRun(request, timeout=PATIENCE_S).run) == "WAITING_USER"
    # And they are not lost either: once their time is up they come to pass.
    service.kill()
    let_pass(home, FAR_S, "wait-far", "run-far")
    _, api = home.start()
    assert_auto_decided(api, "wait-far")
    assert api.until_status("run-far", "FAILED").error.code == "RUN_TIMEOUT"


def test_after_a_reboot_the_remaining_time_follows_the_wall_clock(new_home: NewHome) -> None:
    engines = {**ENGINES, "limited": limited(RESUMABLE, FAR_S)}
    home = new_home(engines=engines)
    service, api = home.start()
    names = ("wait-passed", "wait-open", "run-passed", "run-open")
    for run_id in names:
        engine = "tells" if run_id.startswith("wait") else "limited"
        profile = {"interactive_profile": impatient(FAR_S)} if engine == "tells" else {}
        api.create(engine, ASKS, run_id=run_id, **profile)
        api.until_status(run_id, "WAITING_USER")
    service.kill()
    let_pass(home, FAR_S, "wait-passed", "run-passed")
    with home.store(writable=True) as store:
        # Of another boot, whose clock had come to somewhere else.
        store.execute(
            "UPDATE run SET due_clock = 'another boot', run_due_us = CASE WHEN run_id LIKE"
            " '%passed' THEN run_due_us * 1000 ELSE run_due_us / 1000 END"
        )
        store.execute(
            "UPDATE run SET wait_due_us = CASE WHEN run_id LIKE '%passed'"
            " THEN wait_due_us * 1000 ELSE wait_due_us / 1000 END"
        )

    _, api = home.start()

    assert_auto_decided(api, "wait-passed")
    assert api.until_status("run-passed", "FAILED").error.code == "RUN_TIMEOUT"
    for run_id in ("wait-open", "run-open"):
        assert status_word(api.get(run_id)) == "WAITING_USER"


# -- a budget of attempts ------------------------------------------------------------------------


def lines_of(folder: Path) -> Sequence[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "told.jsonl").read_text("utf-8").splitlines()]


def test_a_budget_of_attempts_is_counted_over_restarts_each_in_a_fresh_workspace(
    new_home: NewHome, tmp_path: Path
) -> None:
    # Notes, outside of its workspace, what it finds there and which attempt it is told to be.
    notes = tmp_path / "told.jsonl"
    engine = script(
        "import json, os, sys, time\n"
        "message = json.loads(sys.stdin.readline())\n"
        "here = message['workspace']\n"
        "found = sorted(os.listdir(here))\n"
        "open(os.path.join(here, 'mine'), 'w').close()\n"
        f"with open({str(notes)!r}, 'a') as file:\n"
        "    print(json.dumps({'attempt': message['attempt'], 'at': here, 'found': found}),"
        " file=file)\n"
        "time.sleep(60)\n"
    )
    home = new_home(engines={"notes": engine}, max_attempts=3)
    service, api = home.start()
    api.create("notes", run_id="again", restart_policy=run_pb2.RESTART_POLICY_REQUEUE)
    for attempt in (1, 2, 3):
        until(
            lambda a=attempt: notes.exists() and len(lines_of(tmp_path)) == a,  # type: ignore[misc]
            f"attempt {attempt} is at work",
        )
        run = api.get("again")
        assert (run.attempt, run.recovery.recovery_count) == (attempt, attempt - 1)
        if attempt == 2:
            home.kill_with_shims(service)
        else:
            service.kill()
        service, api = home.start()

    run = api.get("again")

    assert (status_word(run), run.error.code) == ("FAILED", "ORCHESTRATOR_RESTART_INTERRUPTED")
    told = lines_of(tmp_path)
    assert [one["attempt"] for one in told] == [1, 2, 3]
    assert [one["found"] for one in told] == [[], [], []]
    assert len({one["at"] for one in told}) == 3
    rules = [info.recovery_reason for info in api.recovery_info("again").history]
    assert rules == ["running_interrupted", "requeued", "requeued"]
    assert_whole(events_of(api, "again"))
    assert home.agents() == []
