"""An accepted call takes effect exactly once, whatever is killed at any moment.

*Exactly once* is about the effect: an accepted reply is stored once, and counts once in the run's
output. Its delivery may be repeated: after a crash between a delivery and its record, a second
process gets the reply with the same interaction_id. A process that got the reply is running. If it
is killed with the service, its run fails as interrupted (or starts again, by its restart_policy),
and the reply stays stored.

REPLY_ROUNDS=200 REPLY_SEED=1 pytest tests/crash/test_acknowledged_calls.py for more.
"""

from __future__ import annotations

import fcntl
import os
import random
import termios
import threading
import time
import uuid
from array import array
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refused, status_word, struct, value
from support.engines import GOOD_ENGINES, script
from support.service import Home, ServiceProcess
from support.stores import lose_session, query
from support.waiting import until

NewHome = Callable[..., Home]

ROUNDS: Final = int(os.environ.get("REPLY_ROUNDS", "8"))
CANCEL_ROUNDS: Final = int(os.environ.get("CANCEL_ROUNDS", "5"))
ASKS: Final = {"questions": [{"prompt": "Which?"}]}
CALLERS: Final = 50
CHANNELS: Final = 5
PATIENCE_S: Final = 20.0


# -- one request_id has one effect ---------------------------------------------------------------


def create_request(request_id: str, *, other: bool = False) -> pb.CreateRunRequest:
    given = struct({**ASKS, "result": {"other": other}})
    return pb.CreateRunRequest(engine="resumable", input=given, request_id=request_id)


def reply_request(request_id: str, *, other: bool = False) -> pb.SubmitReplyRequest:
    return pb.SubmitReplyRequest(
        run_id="asks",
        interaction_id=1,
        response=value("another" if other else "this"),
        request_id=request_id,
    )


def cancel_request(request_id: str, *, other: bool = False) -> pb.CancelRunRequest:
    run_id = "waits" if other else "canceled"
    return pb.CancelRunRequest(run_id=run_id, request_id=request_id)


def reopen_request(request_id: str, *, other: bool = False) -> pb.ReopenRunRequest:
    if other:
        return pb.ReopenRunRequest(run_id="lost", session_handle="0" * 32, request_id=request_id)
    return pb.ReopenRunRequest(run_id="lost", keep_session=True, request_id=request_id)


MAKE: Final[dict[str, Callable[..., Any]]] = {
    "CreateRun": create_request,
    "SubmitReply": reply_request,
    "CancelRun": cancel_request,
    "ReopenRun": reopen_request,
}


def call(api: Api, method: str, request: object) -> run_pb2.Run:
    answer = getattr(api.runs, method)(request, timeout=PATIENCE_S)
    assert isinstance(answer.run, run_pb2.Run)
    return answer.run


def call_from_all_sides(service: ServiceProcess, method: str, request: object) -> list[run_pb2.Run]:
    """Send one request from 50 callers on five channels at once; return all answers."""
    apis = [service.api() for _ in range(CHANNELS)]
    gate = threading.Barrier(CALLERS)

    def send(number: int) -> run_pb2.Run:
        gate.wait(PATIENCE_S)
        return call(apis[number % CHANNELS], method, request)

    with ThreadPoolExecutor(CALLERS) as callers:
        return list(callers.map(send, range(CALLERS)))


def assert_reuse_is_refused(api: Api, ids: dict[str, str]) -> None:
    """Assert that no request id is accepted for another payload or method."""
    for method, request_id in ids.items():
        for other in MAKE:
            request = MAKE[other](request_id, other=other == method)
            refusal = refused(lambda m=other, r=request: call(api, m, r))  # type: ignore[misc]
            assert refusal.code is grpc.StatusCode.ALREADY_EXISTS, (method, other)
            assert (refusal.reason, refusal.metadata) == (
                "REQUEST_ID_REUSED",
                {"request_id": request_id},
            )


def everything(api: Api) -> dict[str, run_pb2.Run]:
    listed = api.runs.ListRuns(pb.ListRunsRequest(page_size=1000), timeout=PATIENCE_S).runs
    return {run.run_id: run for run in listed}


def test_one_request_id_has_one_effect_from_50_callers_and_over_a_kill(
    new_database_url: Callable[[], str], new_home: NewHome
) -> None:
    home = new_home(database=new_database_url())
    service, api = home.start()
    for run_id in ("lost", "asks", "waits", "canceled"):
        api.create("resumable", ASKS, run_id=run_id)
        api.until_status(run_id, "WAITING_USER")
    kept = lose_session(home, "lost")
    service.kill()
    service, api = home.start()
    assert api.get("lost").error.code == "SESSION_RESUME_FAILED"
    for name, text in kept.items():
        Path(name).write_bytes(text)
    ids = {method: str(uuid.uuid4()) for method in MAKE}

    answers = {m: call_from_all_sides(service, m, MAKE[m](ids[m])) for m in MAKE}

    made = {method: {run.run_id for run in runs} for method, runs in answers.items()}
    (created,) = made["CreateRun"]
    assert made == {
        "CreateRun": {created},
        "SubmitReply": {"asks"},
        "CancelRun": {"canceled"},
        "ReopenRun": {"lost"},
    }
    assert all(len(runs) == CALLERS for runs in answers.values())
    assert status_word(api.until_ended("asks")) == "SUCCEEDED"
    api.until_status(created, "WAITING_USER")
    assert_one_effect_each(api, created)
    assert_reuse_is_refused(api, ids)
    before = everything(api)

    service.kill()
    service, api = home.start()

    for method, request_id in ids.items():
        again = call_from_all_sides(service, method, MAKE[method](request_id))
        assert {run.run_id for run in again} == made[method]
    assert_reuse_is_refused(api, ids)
    assert_one_effect_each(api, created)
    after = everything(api)
    assert {name: run.etag for name, run in after.items()} == {
        name: run.etag for name, run in before.items()
    }


def assert_one_effect_each(api: Api, created: str) -> None:
    """Assert that the events of each run have the effect of its method once."""
    kinds = {run_id: kinds_of(api, run_id) for run_id in ("asks", "canceled", "lost")}
    assert everything(api).keys() == {"asks", "waits", "canceled", "lost", created}
    assert [kinds["asks"].count(kind) for kind in ("ANSWERED", "SUCCEEDED")] == [1, 1]
    assert [one.response.string_value for one in api.interactions("asks")] == ["this"]
    assert (kinds["canceled"].count("CANCELED"), kinds["lost"].count("REOPENED")) == (1, 1)
    assert status_word(api.get("canceled")) == "CANCELED"
    assert status_word(api.get("lost")) == "WAITING_USER"


def kinds_of(api: Api, run_id: str) -> list[str]:
    """Return the kinds of a run's events so far."""
    last = api.runs.WatchRun(pb.WatchRunRequest(run_id=run_id), timeout=PATIENCE_S)
    sequence = next(iter(last)).sequence
    last.cancel()
    watch = api.runs.WatchRun(
        pb.WatchRunRequest(run_id=run_id, after_sequence=0), timeout=PATIENCE_S
    )
    found = []
    for update in watch:
        found.append(run_pb2.RunEventKind.Name(update.event.kind))
        if update.sequence == sequence:
            break
    watch.cancel()
    return [kind.removeprefix("RUN_EVENT_KIND_") for kind in found]


# -- an accepted reply ---------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True)
class Replier:
    """Sends one reply at its moment, and keeps the service's answer."""

    run_id: str
    answer: str
    after_s: float
    accepted: bool = False
    broken: BaseException | None = None

    def send(self, address: str) -> None:
        ends = time.monotonic() + self.after_s
        try:
            with Api(address, timeout_s=PATIENCE_S) as api:
                api.get(self.run_id)  # the connection stands when its moment comes
                until(lambda: time.monotonic() >= ends, "its moment has come")
                api.reply(self.run_id, 1, self.answer)
            self.accepted = True
        except grpc.RpcError as error:
            self.broken = None if is_gone(error) else error
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            self.broken = error


def is_gone(error: grpc.RpcError) -> bool:
    """Return whether a call failed because its service was killed."""
    call: Any = error
    return call.code() is grpc.StatusCode.UNAVAILABLE


def kill(home: Home, service: ServiceProcess, dice: random.Random) -> None:
    """Kill the service, and sometimes its shims."""
    if dice.random() < 0.4:
        home.kill_with_shims(service)
    else:
        service.kill()


def state_of(home: Home, run_id: str) -> tuple[str, str]:
    """Return the stored status of a run and of its question."""
    ((status, state),) = query(
        home,
        "SELECT r.status, i.state FROM run r JOIN interaction i ON i.run = r.id"
        " WHERE r.run_id = ? AND i.no = 1",
        run_id,
    )
    return status, state


def reply_around_a_kill(home: Home, number: int, dice: random.Random) -> list[Replier]:
    """Answer four waiting runs and kill the service, each at a random moment."""
    service, api = home.start()
    names = [f"r{number}-{one}" for one in range(4)]
    for run_id in names:
        api.create("resumable", ASKS, run_id=run_id)
    for run_id in names:
        api.until_status(run_id, "WAITING_USER")
    repliers = [
        Replier(run_id=run_id, answer=uuid.uuid4().hex, after_s=dice.uniform(0.02, 0.1))
        for run_id in names
    ]
    threads = [threading.Thread(target=one.send, args=(service.address,)) for one in repliers]
    for thread in threads:
        thread.start()
    ends = time.monotonic() + dice.uniform(0.02, 0.15)
    until(lambda: time.monotonic() >= ends, "the moment has come")
    kill(home, service, dice)
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    for one in repliers:
        if one.broken is not None:
            raise one.broken
    return repliers


@pytest.mark.timeout(120 + 5 * ROUNDS)
def test_an_accepted_reply_is_never_lost_and_counts_once(new_home: NewHome) -> None:
    # Fewer slots than replies: some are accepted and not yet given to a process when it is killed.
    home = new_home(safe_mode_after=0, max_concurrent=2)
    seed = int(os.environ.get("REPLY_SEED", time.time_ns()))
    print(f"REPLY_SEED={seed}")
    dice = random.Random(seed)  # noqa: S311 - moments, not secrets
    sent: list[Replier] = []
    given_to_a_process: set[str] = set()

    for number in range(ROUNDS):
        sent += reply_around_a_kill(home, number, dice)
        if dice.random() < 0.3:  # and once more, while what was accepted resumes
            note_the_given(home, sent, given_to_a_process)
            service, _ = home.start()
            ends = time.monotonic() + dice.uniform(0, 0.15)
            until(lambda ends=ends: time.monotonic() >= ends, "the moment has come")  # type: ignore[misc]
            kill(home, service, dice)
        note_the_given(home, sent, given_to_a_process)

    _, api = home.start()
    for one in sent:
        assert_counts_once(api, one, given=one.run_id in given_to_a_process)
    accepted = {one.run_id for one in sent if one.accepted}
    print(f"accepted={len(accepted)} of {len(sent)}, given={len(given_to_a_process)}")
    assert accepted - given_to_a_process


def note_the_given(home: Home, sent: list[Replier], given: set[str]) -> None:
    """Note the runs whose process had got the reply at the kill: they may be interrupted."""
    given.update(
        one.run_id for one in sent if state_of(home, one.run_id) == ("RUNNING", "DELIVERED")
    )


def assert_counts_once(api: Api, sent: Replier, *, given: bool) -> None:
    run = api.until_status(sent.run_id, "SUCCEEDED", "FAILED", "WAITING_USER")
    if status_word(run) == "WAITING_USER":
        assert not sent.accepted, f"lost: {run}"
        (asked,) = api.interactions(sent.run_id)
        assert not asked.HasField("response")
        api.reply(sent.run_id, 1, sent.answer)
        run = api.until_ended(sent.run_id)
    (asked,) = api.interactions(sent.run_id)
    assert asked.response.string_value == sent.answer
    if given and status_word(run) == "FAILED":
        assert run.error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
        assert run.recovery.recovery_reason == "running_interrupted"
    else:
        if given:  # the process had printed its result and ended before the kill
            assert run.recovery.recovery_reason == "result_found_in_output"
        assert status_word(run) == "SUCCEEDED", run
        assert MessageToDict(run.output) == {"answers": [sent.answer]}
    assert (run.attempt, run.interaction_count) == (1, 1)
    assert refused(lambda: api.reply(sent.run_id, 1, "another")).reason == "INTERACTION_SUPERSEDED"
    assert api.reply(sent.run_id, 1, sent.answer) == run


def test_a_reply_accepted_while_every_slot_is_taken_resumes_after_several_kills(
    new_home: NewHome,
) -> None:
    home = new_home(max_concurrent=1)
    service, api = home.start()
    api.create("resumable", ASKS, run_id="asks")
    api.until_status("asks", "WAITING_USER")
    api.create("resumable", {"hold": True}, run_id="blocks")
    api.until_status("blocks", "RUNNING")
    assert status_word(api.reply("asks", 1, "this")) == "QUEUED"
    home.kill_with_shims(service)
    home.write_config(safe_mode_after=1)  # this start marks states only: the reply goes on waiting
    with home.store(writable=True) as store:
        store.execute("UPDATE reconciliation SET state = 'FAILED'")
    service, api = home.start()
    waits = api.get("asks")
    service.kill()

    _, api = home.start()

    assert (status_word(waits), waits.recovery.recovery_reason) == (
        "QUEUED",
        "accepted_reply_redriven",
    )
    run = api.until_ended("asks")
    assert MessageToDict(run.output) == {"answers": ["this"]}
    turns = home.rows(
        "SELECT l.attempt, l.turn FROM process_lease l JOIN run r ON r.id = l.run"
        " WHERE r.run_id = 'asks' ORDER BY l.turn"
    )
    assert turns == [(1, 1), (1, 2)]


@pytest.mark.parametrize("length", [5, 300_000], ids=["in the pipe", "more than a pipe holds"])
def test_a_reply_that_its_process_has_not_read_yet_is_given_to_the_next_one(
    new_home: NewHome, tmp_path: Path, length: int
) -> None:
    go, long = tmp_path / "go", "x" * length
    reads_late = script(
        "import json, os, sys, time\n"
        "say = lambda **fields: print(json.dumps(fields), flush=True)\n"
        "if not os.path.exists('asked'):\n"
        "    open('asked', 'w').close()\n"
        "    say(type='session', value='s')\n"
        "    say(type='ask', kind='open_text', prompt='?')\n"
        "    sys.exit(0)\n"
        f"while not os.path.exists({str(go)!r}):\n"
        "    time.sleep(0.01)\n"
        "reply = json.loads(sys.stdin.readline())['reply']\n"
        "say(type='result', output={'got': [reply['interaction_id'], len(reply['response'])]})\n"
    )
    home = new_home(engines={"reads-late": reads_late})
    service, api = home.start()
    api.create("reads-late", run_id="asks")
    api.until_status("asks", "WAITING_USER")
    api.reply("asks", 1, long)
    until(lambda: any(map(is_told, home.agents_of("asks"))), "its process has it before it")
    running = api.until_status("asks", "RUNNING")
    api.create("reads-late", run_id="later")  # what was written before it is in the store by now
    home.kill_with_shims(service)
    _, api = home.start()
    go.touch()

    run = api.until_ended("asks")

    assert status_word(running) == "RUNNING"
    assert (run.recovery.recovery_reason, run.recovery.status_before) == (
        "accepted_reply_redriven",
        run_pb2.RUN_STATUS_RUNNING,
    )
    assert MessageToDict(run.output) == {"got": [1.0, len(long)]}
    assert len(api.interactions("asks")) == 1


def is_told(pid: int) -> bool:
    """Return whether the input of a process has unread bytes."""
    held = array("i", [0])
    try:
        with Path(f"/proc/{pid}/fd/0").open("rb", buffering=0) as stdin:
            fcntl.ioctl(stdin, termios.FIONREAD, held)
    except OSError:  # it has just ended
        return False
    return held[0] > 0


# -- an accepted cancel --------------------------------------------------------------------------

RESULT_AT_THE_END: Final = script(
    "import json, os, signal, sys, time\n"
    "def end(*_):\n"
    "    print(json.dumps({'type': 'result', 'output': {'done': True}}), flush=True)\n"
    "    os._exit(0)\n"
    "signal.signal(signal.SIGTERM, end)\n"
    "sys.stdin.readline()\n"
    "print(json.dumps({'type': 'progress', 'message': 'ready'}), flush=True)\n"
    "time.sleep(60)\n"
)
RESULT_THEN_HANGS: Final = script(
    "import json, signal, sys, time\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "sys.stdin.readline()\n"
    "print(json.dumps({'type': 'result', 'output': {'done': True}}), flush=True)\n"
    "time.sleep(60)\n"
)
CANCELED_ENGINES: Final = {
    **GOOD_ENGINES,
    "result_at_the_end": RESULT_AT_THE_END,
    "result_then_hangs": RESULT_THEN_HANGS,
}


def said_something(api: Api, run_id: str) -> bool:
    return api.get(run_id).attempt > 0 and any(piece.data for piece in api.output(run_id))


@pytest.mark.parametrize("engine", ["result_at_the_end", "result_then_hangs"])
@pytest.mark.parametrize("killed", ["nobody", "service", "service and shims"])
def test_a_cancel_wins_over_a_result_that_the_agent_is_printing(
    new_home: NewHome, engine: str, killed: str
) -> None:
    home = new_home(engines=CANCELED_ENGINES, cancel_grace_s=0.5, exit_grace_s=60.0)
    service, api = home.start()
    run_id = api.create(engine).run_id
    until(lambda: said_something(api, run_id), "it is at its result")
    accepted = api.cancel(run_id)
    if killed == "service":
        service.kill()
    elif killed == "service and shims":
        home.kill_with_shims(service)
    if killed != "nobody":
        service, api = home.start()

    run = api.until_ended(run_id)

    assert accepted.cancel_requested
    assert status_word(run) == "CANCELED"
    assert not run.HasField("output")
    assert api.cancel(run_id) == run
    service.kill()
    _, api = home.start()
    assert api.get(run_id) == run
    assert home.agents() == []


@dataclass(slots=True, kw_only=True)
class Canceler(Replier):
    """Sends one cancel at its moment."""

    too_late: bool = False

    def send(self, address: str) -> None:
        ends = time.monotonic() + self.after_s
        try:
            with Api(address, timeout_s=PATIENCE_S) as api:
                api.get(self.run_id)
                until(lambda: time.monotonic() >= ends, "its moment has come")
                api.cancel(self.run_id)
            self.accepted = True
        except grpc.RpcError as error:
            code: Any = error
            self.too_late = code.code() is grpc.StatusCode.FAILED_PRECONDITION
            self.broken = None if self.too_late or is_gone(error) else error
        except BaseException as error:  # noqa: BLE001 - told by the main thread
            self.broken = error


def cancel_around_a_kill(home: Home, number: int, dice: random.Random) -> list[Canceler]:
    """Cancel short runs around their end and around a kill."""
    service, api = home.start()
    sent = [
        Canceler(run_id=f"c{number}-{one}", answer="", after_s=dice.uniform(0, 0.4))
        for one in range(4)
    ]
    for one in sent:
        waits = dice.random() < 0.3
        given = ASKS if waits else {"work_s": 0.2}
        api.create("resumable", given, run_id=one.run_id)
    threads = [threading.Thread(target=one.send, args=(service.address,)) for one in sent]
    for thread in threads:
        thread.start()
    ends = time.monotonic() + dice.uniform(0.1, 0.45)
    until(lambda: time.monotonic() >= ends, "the moment has come")
    kill(home, service, dice)
    for thread in threads:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    for one in sent:
        if one.broken is not None:
            raise one.broken
    return sent


@pytest.mark.timeout(120 + 5 * CANCEL_ROUNDS)
def test_an_accepted_cancel_ends_in_canceled_over_kills_at_any_moment(new_home: NewHome) -> None:
    home = new_home(safe_mode_after=0)
    seed = int(os.environ.get("CANCEL_SEED", time.time_ns()))
    print(f"CANCEL_SEED={seed}")
    dice = random.Random(seed)  # noqa: S311 - moments, not secrets

    sent = [
        one for number in range(CANCEL_ROUNDS) for one in cancel_around_a_kill(home, number, dice)
    ]
    _, api = home.start()

    for one in sent:
        if status_word(run := api.get(one.run_id)) == "WAITING_USER":
            assert not one.accepted
            run = api.cancel(one.run_id)  # as good after the restart as before it
            one.accepted = True
        if one.accepted:
            assert status_word(api.until_ended(one.run_id)) == "CANCELED", run
        if one.too_late:
            assert status_word(run) == "SUCCEEDED", run
    assert any(one.accepted for one in sent)
    assert home.agents() == []


def test_a_waiting_run_can_be_canceled_before_and_after_a_restart(new_home: NewHome) -> None:
    home = new_home()
    service, api = home.start()
    for run_id in ("before", "after"):
        api.create("resumable", ASKS, run_id=run_id)
        etag = api.until_status(run_id, "WAITING_USER").etag
    api.cancel("before")
    service.kill()
    service, api = home.start()
    recovered = api.get("after")
    api.cancel("after", etag=etag)
    service.kill()

    _, api = home.start()

    assert recovered.recovery.recovery_reason == "resumable_waiting_preserved"
    for run_id in ("before", "after"):
        assert status_word(api.get(run_id)) == "CANCELED"
        assert refused(lambda r=run_id: api.reply(r, 1, "late")).reason == "RUN_NOT_WAITING"  # type: ignore[misc]
    assert [one.run_id for one in api.recovered()] == ["after"]
