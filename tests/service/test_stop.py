"""Drains, signals and terminals: how a service stops, and the answers to callers meanwhile."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import grpc
import pytest
from runrecovery.v1 import recovery_pb2, run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refusal_of, refused, status_word
from support.engines import script
from support.service import Home, ServiceProcess
from support.waiting import until

NewHome = Callable[..., Home]
QUESTION: Final = {"kind": "open_text", "prompt": "What next?"}
HOLDS: Final = {"hold": True, "ignore_sigterm": True}
LONG_S: Final = 60.0


def test_a_draining_service_answers_reads_and_refuses_changes(new_home: NewHome) -> None:
    home = new_home(drain_delay_s=2.0, cancel_grace_s=0.3)
    service, api = home.start()
    waits = api.create("resumable", {"questions": [QUESTION]})
    waits = api.until_status(waits.run_id, "WAITING_USER")
    holds = api.create("resumable", HOLDS)
    api.until_status(holds.run_id, "RUNNING")
    tree = api.create("resumable", {"hold": True, "children": 2})
    until(lambda: len(home.agents_of(tree.run_id)) == 3, "the tree stands")
    followed = api.runs.StreamOutput(
        pb.StreamOutputRequest(run_id=holds.run_id, follow=True), timeout=LONG_S
    )
    next(followed)
    service.terminate()
    until(lambda: api.health_of() == "NOT_SERVING", "health says so")

    for call in (
        lambda: api.create("resumable", {}),
        lambda: api.reply(waits.run_id, 1, "yes"),
        lambda: api.cancel(waits.run_id),
    ):
        refusal = refused(call)
        assert (refusal.code.name, refusal.reason) == ("UNAVAILABLE", "SHUTTING_DOWN")
        assert refusal.retry_after_s == 1.0
        assert refusal.pushback_ms == "1000"
    assert api.get(waits.run_id) == waits
    assert api.status().state == recovery_pb2.SERVICE_STATE_DRAINING
    assert api.health_of("liveness") == "SERVING"
    with pytest.raises(grpc.RpcError) as ended:
        list(followed)
    assert refusal_of(ended.value).reason == "SHUTTING_DOWN"
    assert service.exit_code() == 0
    assert home.agents() == []


WAITS_FOR_FILE: Final = """
import json, os, time
task = json.loads(input())
while not os.path.exists(task["input"]["go"]):
    time.sleep(0.01)
print(json.dumps({"type": "result", "output": {}}), flush=True)
"""


def test_a_slot_that_becomes_free_during_the_drain_launches_no_queued_run(
    new_home: NewHome,
) -> None:
    home = new_home(engines={"waits": script(WAITS_FOR_FILE)}, max_concurrent=1, drain_delay_s=4.0)
    service, api = home.start()
    given = {"go": str(home.path / "go")}
    running = api.create("waits", given)
    queued = api.create("waits", given, restart_policy=run_pb2.RESTART_POLICY_REQUEUE)
    api.until_status(running.run_id, "RUNNING")

    service.terminate()
    until(lambda: api.health_of() == "NOT_SERVING", "the service drains")
    (home.path / "go").touch()
    api.until_status(running.run_id, "SUCCEEDED")

    assert service.exit_code() == 0
    launched = "SELECT r.run_id FROM process_lease l JOIN run r ON r.id = l.run"
    assert home.rows(launched) == [(running.run_id,)]
    assert home.rows("SELECT status FROM run WHERE run_id = ?", queued.run_id) == [("QUEUED",)]


Refusals = set[tuple[str, str]]


def record_refusals_until(
    stopped: threading.Event, address: str, seen: Refusals, *, changes: bool
) -> None:
    """Call without a pause until `stopped`; record the code and the reason of each refusal."""
    api = Api(address)
    while not stopped.is_set():
        refusal = refused(lambda: api.cancel("nothing") if changes else api.get("nothing"))
        seen.add((refusal.code.name, refusal.reason))
    api.channel.close()


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix:{home}/s"])
def test_a_planned_stop_answers_no_call_with_cancelled(new_home: NewHome, listen: str) -> None:
    home = new_home(drain_delay_s=0.1)
    seen: list[Refusals] = []
    for _ in range(3):
        service, _ = home.start("--listen", listen.format(home=home.path))
        stopped, here = threading.Event(), [Refusals() for _ in range(6)]
        with ThreadPoolExecutor(6) as threads:
            calls = [
                threads.submit(
                    record_refusals_until, stopped, service.address, one, changes=bool(number % 2)
                )
                for number, one in enumerate(here)
            ]
            try:
                until(lambda: all(here), "every caller is answered")  # noqa: B023 - used at once
                assert service.stop() == 0
            finally:
                stopped.set()
        for call in calls:
            call.result()
        seen += here

    assert {code for one in seen for code, _ in one} == {"NOT_FOUND", "UNAVAILABLE"}
    assert any(("UNAVAILABLE", "SHUTTING_DOWN") in one for one in seen)


def test_a_second_sigterm_ends_the_service_at_once(new_home: NewHome) -> None:
    home = new_home(drain_delay_s=LONG_S)
    service, _ = home.start()
    service.terminate()
    service.until_event("service.stop_asked")
    began = time.monotonic()
    service.terminate()

    assert service.exit_code() == 128 + signal.SIGTERM
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_service_exits_with_0_and_leaves_no_wal_file(
    new_home: NewHome, number: int
) -> None:
    home = new_home()
    service, _ = home.start()
    service.popen.send_signal(number)

    assert service.exit_code() == 0
    assert service.events("service.stopped")
    assert not home.database.with_name("runrecovery.db-wal").exists()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE])
def test_hangup_user_and_pipe_signals_end_nothing(new_home: NewHome, number: int) -> None:
    service, api = new_home().start()
    run = api.create("resumable", {"questions": [QUESTION]})
    api.until_status(run.run_id, "WAITING_USER")

    service.popen.send_signal(number)
    if number == signal.SIGHUP:
        assert service.until_event("service.reloaded")["changed"] == []
    elif number != signal.SIGPIPE:  # which Python itself ignores
        told = service.until_event("service.signal_ignored")
        assert told["signal"] == signal.Signals(number).name
    api.reply(run.run_id, 1, "yes")

    assert status_word(api.until_ended(run.run_id)) == "SUCCEEDED"
    assert service.stop() == 0


@contextmanager
def terminal() -> Iterator[tuple[Callable[[], None], str]]:
    """Yield a function that closes a terminal, and the name of the terminal."""
    ours, theirs = os.openpty()
    name = os.ttyname(theirs)
    os.close(theirs)
    open_ends = [ours]

    def hang_up() -> None:
        os.close(open_ends.pop())

    yield hang_up, name
    if open_ends:
        hang_up()


def test_a_service_whose_terminal_is_closed_stops_as_planned(new_home: NewHome) -> None:
    with terminal() as (hang_up, name):
        # The leader of a session that opens a terminal has it as its own.
        home = new_home(prefix=("/bin/sh", "-c", f'exec "$@" <{name}', "sh"))
        service, api = home.start()
        run = api.create("resumable", HOLDS, run_id="holds")
        api.until_status(run.run_id, "RUNNING")
        service.popen.send_signal(signal.SIGHUP)
        service.until_event("service.reloaded")

        hang_up()

        assert service.exit_code() == 0
    assert service.until_event("service.stop_asked")["signal"] == "SIGHUP"
    assert home.rows("SELECT count(*) FROM run WHERE recovery_count = 1") == [(1,)]


def test_a_closed_terminal_does_not_count_as_a_first_signal(new_home: NewHome) -> None:
    with terminal() as (hang_up, name):
        home = new_home(prefix=("/bin/sh", "-c", f'exec "$@" <{name}', "sh"), drain_delay_s=LONG_S)
        service, _ = home.start()

        def asked() -> list[tuple[object, object]]:
            return [(one["signal"], one["times"]) for one in service.events("service.stop_asked")]

        hang_up()
        until(lambda: len(asked()) == 1, "the service was asked by the terminal")
        service.terminate()
        until(lambda: len(asked()) == 2, "the service was asked by SIGTERM")
        service.terminate()

        assert service.exit_code() == 128 + signal.SIGTERM
    assert asked() == [("SIGHUP", 0), ("SIGTERM", 1), ("SIGTERM", 2)]


def test_a_service_that_ignores_hangups_from_its_start_outlives_its_terminal(
    new_home: NewHome,
) -> None:
    with terminal() as (hang_up, name):
        home = new_home(prefix=("/bin/sh", "-c", f'trap "" HUP; exec "$@" <{name}', "sh"))
        service, api = home.start()

        hang_up()
        until(lambda: _terminal_of(service) == "0", "the terminal is gone")

        assert status_word(api.until_ended(api.create("resumable", {}).run_id)) == "SUCCEEDED"
        assert not service.events("service.stop_asked")
        assert service.stop() == 0


def _terminal_of(service: ServiceProcess) -> str:
    stat = Path(f"/proc/{service.pid}/stat").read_text()
    return stat.rpartition(")")[2].split()[4]


def test_a_run_that_a_stop_interrupts_has_its_reason_after_the_next_start(
    new_home: NewHome,
) -> None:
    home = new_home(cancel_grace_s=0.2)
    service, api = home.start()
    holds = api.create("resumable", HOLDS)
    api.until_status(holds.run_id, "RUNNING")
    assert service.stop() == 0
    assert home.agents() == []

    _, api = home.start()

    run = api.get(holds.run_id)
    assert run.error.code == "ORCHESTRATOR_RESTART_INTERRUPTED"
    assert run.recovery.recovery_reason == "running_interrupted"
