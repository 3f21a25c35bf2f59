"""A watcher that resumes gets every event and decision once, over kills and stops.

WATCH_ROUNDS=50 WATCH_SEED=1 pytest tests/crash/test_watches.py for more.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import pytest
from runrecovery import AsyncRunRecoveryClient, RunRecoveryClient
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refused, status_word
from support.engines import GOOD_ENGINES, script
from support.observer import Events, Observer, assert_whole, kinds, statuses
from support.service import Home, ServiceProcess
from support.waiting import until

NewHome = Callable[..., Home]

ROUNDS: Final = int(os.environ.get("WATCH_ROUNDS", "6"))
ASKS: Final = {"questions": [{"prompt": "Which?"}]}
REQUEUE: Final = run_pb2.RESTART_POLICY_REQUEUE
PATIENCE_S: Final = 30.0
# Asks for as long as it gets answers, quickly.
QUICK: Final = script(
    "import json, sys, time\n"
    "message = json.loads(sys.stdin.readline())\n"
    "say = lambda **fields: print(json.dumps(fields), flush=True)\n"
    "given = message['input']\n"
    "time.sleep(given.get('work_s', 0))\n"
    "answer = message.get('reply', {}).get('response')\n"
    "if given.get('asks') and answer != 'enough':\n"
    "    say(type='session', value='s')\n"
    "    say(type='ask', kind='open_text', prompt='?')\n"
    "else:\n"
    "    say(type='result', output={'answer': answer})\n"
)


def events_since(api: Api, run_id: str, sequence: int = 0) -> Events:
    """Return the events of an ended run."""
    request = pb.WatchRunRequest(run_id=run_id, after_sequence=sequence)
    updates = list(api.runs.WatchRun(request, timeout=PATIENCE_S))
    assert all(update.HasField("event") for update in updates)
    return [(update.sequence, update.event) for update in updates]


# -- one run, through any number of kills --------------------------------------------------------


@dataclass(slots=True)
class Play:
    """State that outlives the kills: the current address, the watches, the random numbers."""

    dice: random.Random
    address: str = ""
    observers: dict[str, Observer] = field(default_factory=dict)

    def create(self, api: Api) -> None:
        """Create a run of some kind, and watch it from then on."""
        run_id = f"w-{uuid.uuid4()}"
        given: dict[str, Any] = self.dice.choice(
            [{}, {"asks": True}, {"asks": True}, {"work_s": 0.2}]
        )
        policy = self.dice.choice([REQUEUE, run_pb2.RESTART_POLICY_FAIL])
        api.create("quick", given, run_id=run_id, restart_policy=policy)
        self.observers[run_id] = Observer(run_id=run_id, address=lambda: self.address)

    def touch(self, api: Api) -> None:
        """Answer or cancel a run, or look on."""
        run = api.get(self.dice.choice(list(self.observers)))
        choice = self.dice.random()
        with suppress_refusals():
            if status_word(run) == "WAITING_USER" and choice < 0.8:
                answer = self.dice.choice(["more", "enough"])
                api.reply(run.run_id, run.pending_interaction.interaction_id, answer)
            elif choice > 0.85:
                api.cancel(run.run_id)

    def work(self, api: Api, *, seconds: float) -> None:
        """Keep the service busy until it is killed."""
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            if len(self.observers) < 4 or self.dice.random() < 0.05:
                self.create(api)
            self.touch(api)

    def finish(self, api: Api, observer: Observer) -> None:
        """Bring a run to its end."""
        run = api.until_status(observer.run_id, "WAITING_USER", "SUCCEEDED", "FAILED", "CANCELED")
        if status_word(run) == "WAITING_USER":
            api.reply(run.run_id, run.pending_interaction.interaction_id, "enough")
            run = api.until_ended(run.run_id)
        observer.join(PATIENCE_S)


class suppress_refusals:  # noqa: N801 - reads as `contextlib.suppress` does
    """Ignore refusals of the service, but not its death."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        call: Any = error
        return isinstance(error, grpc.RpcError) and (
            call.code() is grpc.StatusCode.FAILED_PRECONDITION
        )


@pytest.mark.timeout(120 + 5 * ROUNDS)
def test_a_watch_that_resumes_sees_every_event_once_through_kills(new_home: NewHome) -> None:
    home = new_home(
        engines={**GOOD_ENGINES, "quick": QUICK},
        max_concurrent=3,
        cancel_grace_s=0.3,
        safe_mode_after=0,
        max_attempts=50,
    )
    seed = int(os.environ.get("WATCH_SEED", time.time_ns()))
    print(f"WATCH_SEED={seed}")
    play = Play(random.Random(seed))  # noqa: S311 - moments, not secrets

    for _ in range(ROUNDS):
        service, api = home.start()
        play.address = service.address
        play.work(api, seconds=play.dice.uniform(0.1, 0.5))
        service.kill()
    service, api = home.start()
    play.address = service.address
    for observer in play.observers.values():
        play.finish(api, observer)

    for run_id, observer in play.observers.items():
        run = api.get(run_id)
        assert_whole(observer.events)
        last, event = observer.events[-1]
        assert statuses(observer.events)[-1] == status_word(run)
        assert event.run == run
        assert events_since(api, run_id) == without_runs(observer.events, last)
        decisions = [told.recovery for _, told in observer.events if told.HasField("recovery")]
        assert decisions == [*reversed(api.recovery_info(run_id).history)]
        assert events_since(api, run_id, last) == []
    told = {kind for one in play.observers.values() for kind in kinds(one.events)}
    assert {"CREATED", "STARTED", "RECOVERED"} <= told
    assert sum(one.breaks for one in play.observers.values()) >= ROUNDS


def without_runs(events: Events, last: int) -> Events:
    """Return the events as a later watch sends them: only the last one has the run."""
    bare: Events = []
    for sequence, event in events:
        copy = run_pb2.RunEvent()
        copy.CopyFrom(event)
        if sequence != last:
            copy.ClearField("run")
        bare.append((sequence, copy))
    return bare


def test_a_recovered_wait_is_an_event_and_keeps_the_etag(new_home: NewHome) -> None:
    home = new_home()
    service, api = home.start()
    api.create("resumable", ASKS, run_id="waits")
    before = api.until_status("waits", "WAITING_USER")
    address = service.address
    observer = Observer(run_id="waits", address=lambda: address)
    until(lambda: len(observer.events) == 3, "all that has happened is told")
    home.kill_with_shims(service)
    service, api = home.start()
    address = service.address
    recovered = api.get("waits")
    until(lambda: len(observer.events) == 4, "the decision is told")
    api.reply("waits", 1, "this", etag=before.etag)

    observer.join(PATIENCE_S)

    assert recovered.etag == before.etag
    assert_whole(observer.events)
    assert kinds(observer.events) == [
        "CREATED", "STARTED", "ASKED", "RECOVERED", "ANSWERED", "STARTED", "SUCCEEDED",
    ]  # fmt: skip
    decision = observer.events[3][1]
    assert decision.run == recovered
    assert decision.recovery == recovered.recovery
    assert decision.recovery.recovery_reason == "resumable_waiting_preserved"
    assert [event.interaction_id for _, event in observer.events] == [0, 0, 1, 0, 1, 0, 0]


def test_a_watch_begins_with_a_snapshot_and_refuses_a_sequence_that_was_never_reached(
    new_home: NewHome,
) -> None:
    home = new_home()
    service, api = home.start()
    api.create("resumable", ASKS, run_id="waits")
    waiting = api.until_status("waits", "WAITING_USER")
    service.kill()
    _, api = home.start()

    watch = api.runs.WatchRun(pb.WatchRunRequest(run_id="waits"), timeout=PATIENCE_S)
    first = next(iter(watch))
    beyond = pb.WatchRunRequest(run_id="waits", after_sequence=first.sequence + 1)
    refusal = refused(lambda: list(api.runs.WatchRun(beyond, timeout=PATIENCE_S)))
    api.cancel("waits")
    rest = list(watch)

    assert first.snapshot.etag == waiting.etag
    assert first.sequence == 4
    assert (refusal.code, refusal.reason) == (
        grpc.StatusCode.OUT_OF_RANGE,
        "WATCH_SEQUENCE_UNKNOWN",
    )
    assert refusal.metadata["latest_sequence"] == "4"
    assert [(one.sequence, kinds([(0, one.event)])) for one in rest] == [(5, ["CANCELED"])]
    assert list(api.runs.WatchRun(pb.WatchRunRequest(run_id="waits"), timeout=PATIENCE_S))


def test_a_planned_stop_ends_a_watch_that_can_resume_after_it(new_home: NewHome) -> None:
    home = new_home()
    service, api = home.start()
    api.create("resumable", {"hold": True}, run_id="holds")
    api.until_status("holds", "RUNNING")
    address = service.address
    observer = Observer(run_id="holds", address=lambda: address)
    until(lambda: len(observer.events) == 2, "it is watched")

    assert service.stop() == 0
    service, api = home.start()
    address = service.address
    observer.join(PATIENCE_S)

    assert_whole(observer.events)
    assert kinds(observer.events) == ["CREATED", "STARTED", "RECOVERED"]
    assert observer.events[-1][1].error_code == "ORCHESTRATOR_RESTART_INTERRUPTED"
    assert observer.events[-1][1].recovery.epoch == 1


# -- the clients, over a restart at one address --------------------------------------------------


def abstract_address() -> str:
    """Return an abstract socket address, which stays free during a restart."""
    return f"unix-abstract:runrecovery-test-{uuid.uuid4()}"


def play_for_a_client(home: Home, address: str, seen: Callable[[], int]) -> None:
    """Let a run wait over a kill and a stop, then answer it; wait for the client at each step."""
    service, api = home.start("--listen", address)
    api.create("resumable", ASKS, run_id="waits")
    api.until_status("waits", "WAITING_USER")
    until(lambda: seen() >= 3, "the client saw the question")
    service.kill()
    service, api = home.start("--listen", address)
    until(lambda: seen() >= 4, "the client saw the first decision")
    assert service.stop() == 0
    service, api = home.start("--listen", address)
    api.reply("waits", 1, "this")


SEEN_BY_CLIENTS: Final = [
    "CREATED", "STARTED", "ASKED", "RECOVERED", "ANSWERED", "STARTED", "SUCCEEDED",
]  # fmt: skip


def test_the_client_watches_through_a_kill_and_a_stop(new_home: NewHome) -> None:
    home, address = new_home(), abstract_address()
    seen: Events = []

    def watch() -> None:
        with RunRecoveryClient(address) as client:
            until(lambda: exists(client), "the run is there")
            updates = client.runs.watch("waits", after_sequence=0, timeout_s=60.0)
            seen.extend((update.sequence, update.event) for update in updates)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    play_for_a_client(home, address, lambda: len(seen))
    watcher.join(PATIENCE_S)

    assert not watcher.is_alive()
    assert_whole(seen)
    assert kinds(seen) == SEEN_BY_CLIENTS


def exists(client: RunRecoveryClient) -> bool:
    with suppress(Exception):
        return bool(client.runs.get("waits", timeout_s=2.5).run_id)
    return False


async def test_the_asyncio_client_watches_through_a_kill_and_a_stop(new_home: NewHome) -> None:
    home, address = new_home(), abstract_address()
    seen: Events = []

    async def watch() -> None:
        async with AsyncRunRecoveryClient(address) as client:
            created = False
            while not created:
                with suppress(Exception):
                    created = bool((await client.runs.get("waits", timeout_s=2.5)).run_id)
            async for update in client.runs.watch("waits", after_sequence=0, timeout_s=60.0):
                seen.append((update.sequence, update.event))

    async with asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(watch())
        await asyncio.to_thread(play_for_a_client, home, address, lambda: len(seen))

    assert_whole(seen)
    assert kinds(seen) == SEEN_BY_CLIENTS


# -- the decisions of restarts -------------------------------------------------------------------

Told = tuple[str, recovery_pb.RecoveredRun]


class DecisionReader:
    """Reads decisions after a cursor in a thread, until the stream breaks."""

    def __init__(self, api: Api, after: str = "", **wanted: Any) -> None:
        self.cursors: list[str] = []
        self.told: list[Told] = []
        request = recovery_pb.WatchRecoveredRequest(
            after_cursor=after, filter=recovery_pb.RecoveredFilter(**wanted)
        )
        self._call = api.recovery.WatchRecovered(request, timeout=60.0)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        until(lambda: self.cursors, "the first bookmark came")

    def _read(self) -> None:
        with suppress(grpc.RpcError):
            for update in self._call:
                if update.HasField("decision"):
                    self.told.append((update.cursor, update.decision))
                self.cursors.append(update.cursor)

    def close(self) -> list[Told]:
        """Break the stream, and return what was told."""
        self._call.cancel()
        self._thread.join(PATIENCE_S)
        return self.told

    def until_broken(self) -> list[Told]:
        """Wait until the service has broken the stream, and return what was told."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return self.told


def read_decisions(api: Api, after: str, count: int, **wanted: Any) -> list[Told]:
    """Wait for so many decisions after a cursor; return them."""
    reader = DecisionReader(api, after, **wanted)
    until(lambda: len(reader.told) >= count, f"{count} decisions are told")
    return reader.close()


def decisions_on_record(api: Api, run_ids: Iterable[str]) -> set[tuple[str, int, str, int]]:
    return {
        (run_id, info.recovery_count, info.recovery_reason, info.epoch)
        for run_id in run_ids
        for info in api.recovery_info(run_id).history
    }


def summary(told: Sequence[Told]) -> list[tuple[str, int, str, int]]:
    return [
        (
            one.run_id,
            one.recovery.recovery_count,
            one.recovery.recovery_reason,
            one.recovery.epoch,
        )
        for _, one in told
    ]


RUNS: Final = ("waits", "waits-too", "holds", "again", "sticky", "queued")


def bring_into_every_situation(api: Api) -> None:
    labels = {"team": "docs"}
    api.create("resumable", ASKS, run_id="waits", labels=labels)
    api.create("resumable", ASKS, run_id="waits-too")
    for run_id in RUNS[:2]:
        api.until_status(run_id, "WAITING_USER")
    api.create("resumable", {"hold": True}, run_id="holds", labels=labels)
    api.create("resumable", {"hold": True}, run_id="again", restart_policy=REQUEUE)
    api.create("sticky", ASKS, run_id="sticky", labels=labels)
    api.until_status("sticky", "WAITING_USER")
    for run_id in ("holds", "again"):
        api.until_status(run_id, "RUNNING")
    api.create("resumable", {"hold": True}, run_id="queued")


def restart(home: Home, service: ServiceProcess, how: str) -> tuple[ServiceProcess, Api]:
    if how == "SIGTERM":
        assert service.stop() == 0
    else:
        service.kill()
    return home.start()


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM"])
def test_each_decision_of_two_restarts_is_sent_once_and_in_order(
    new_home: NewHome, how: str
) -> None:
    home = new_home(max_concurrent=3)
    service, api = home.start()
    reader = DecisionReader(api)
    begin = reader.cursors[0]
    bring_into_every_situation(api)
    service, api = restart(home, service, how)
    told = reader.until_broken()
    reader = DecisionReader(api, reader.cursors[-1])
    until(lambda: len(told) + len(reader.told) >= len(RUNS), "every first decision is told")
    api.until_status("again", "RUNNING")
    api.reply("waits", 1, "this")
    api.until_ended("waits")
    service, api = restart(home, service, how)
    told += reader.until_broken()
    second = decisions_on_record(api, RUNS)
    reader = DecisionReader(api, reader.cursors[-1])
    until(lambda: len(told) + len(reader.told) >= len(second), "every second decision is told")
    api.until_status("again", "RUNNING")
    api.create("resumable", {}, run_id="ends")
    api.until_ended("ends")
    service.kill()
    told += reader.until_broken()
    service, api = home.start()

    # "waits-too" keeps its standing decision; "again" starts again both times.
    assert len(second) == len(RUNS) + 1
    assert set(summary(told)) == second
    assert len(told) == len(second)
    order = [(one.recovery.epoch, one.run_id) for _, one in told]
    assert order[:-1] == [(order[0][0], run_id) for run_id in RUNS]
    assert order[-1] == (order[0][0] + 1, "again")
    for _, one in told:
        assert one.recovery in api.recovery_info(one.run_id).history
        assert dict(one.labels) == dict(api.get(one.run_id).labels)
    assert_any_cursor_returns_the_rest(api, begin, told)
    assert_listed(api, told)


def assert_any_cursor_returns_the_rest(api: Api, begin: str, told: list[Told]) -> None:
    """Assert that a watch from any cursor sends the same decisions again."""
    everything = read_decisions(api, begin, len(told) + 1)
    assert everything[: len(told)] == told
    for place, (cursor, _) in enumerate(told, start=1):
        assert read_decisions(api, cursor, len(everything) - place) == everything[place:]


def assert_listed(api: Api, told: list[Told]) -> None:
    latest = {one.run_id: one.recovery for _, one in told} | {
        "again": api.recovery_info("again").recovery
    }
    assert {run.run_id: run.recovery for run in api.recovered()} == latest


def test_decisions_are_filtered_by_state_engine_rule_and_labels(new_home: NewHome) -> None:
    home = new_home(max_concurrent=3)
    service, api = home.start()
    begin = DecisionReader(api).cursors[0]
    bring_into_every_situation(api)
    service.kill()
    _, api = home.start()
    everything = read_decisions(api, begin, len(RUNS))
    wanted: dict[str, tuple[dict[str, Any], list[str]]] = {
        "state": (
            {"recovery_states": [run_pb2.RECOVERY_STATE_RECOVERED_WAITING]},
            ["waits", "waits-too"],
        ),
        "engine": ({"engine": "sticky"}, ["sticky"]),
        "rule": ({"recovery_reason": "running_interrupted"}, ["holds"]),
        "labels": ({"labels": {"team": "docs"}}, ["waits", "holds", "sticky"]),
        "label and engine": (
            {"labels": {"team": "docs"}, "engine": "resumable"},
            ["waits", "holds"],
        ),
        "report": (
            {"reconciliation_id": api.status().reconciliation.reconciliation_id},
            list(RUNS),
        ),
    }

    found = {
        name: read_decisions(api, begin, len(run_ids), **given)
        for name, (given, run_ids) in wanted.items()
    }

    assert {name: [one.run_id for _, one in told] for name, told in found.items()} == {
        name: run_ids for name, (_, run_ids) in wanted.items()
    }
    assert all(one in everything for told in found.values() for one in told)
    for name, (given, run_ids) in wanted.items():
        assert sorted(run.run_id for run in api.recovered(**given)) == sorted(run_ids), name
