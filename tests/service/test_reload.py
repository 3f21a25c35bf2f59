"""A service that reloads its configuration at SIGHUP, while it recovers, serves and stops."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import recovery_pb2
from runrecovery.v1 import run_service_pb2 as pb
from runrecovery.v1.recovery_service_pb2 import PlanRecoveryRequest
from runrecovery.v1.run_pb2 import RunEventKind
from runrecovery_service.config import reading
from runrecovery_service.config.reading import ConfigError
from support.api import Api, refusal_of, refused, status_word
from support.callers import caller, token_of
from support.engines import RESUMABLE, script
from support.processes import kill_below
from support.service import Home, Json, ServiceProcess
from support.waiting import until

NewHome = Callable[..., Home]
EXAMPLE: Final = "for example 32 hexadecimal digits"
LONG_S: Final = 60.0
QUESTION: Final = {"kind": "open_text", "prompt": "What next?"}
WAITS_FOR_FILE: Final = """
import json, os, time
task = json.loads(input())
while not os.path.exists(task["input"]["go"]):
    time.sleep(0.01)
print(json.dumps({"type": "result", "output": {"version": VERSION}}), flush=True)
"""


def outcomes(service: ServiceProcess) -> list[Json]:
    """Return the log lines of all reloads so far."""
    return [event for event in service.events() if event["event"].startswith("service.reload")]


def reload(service: ServiceProcess) -> Json:
    """Let the service reload, and return the log line."""
    seen = len(outcomes(service))
    service.popen.send_signal(signal.SIGHUP)
    return until(lambda: outcomes(service)[seen:], "it has reloaded")[0]


def reloaded(service: ServiceProcess) -> tuple[list[str], list[str]]:
    """Let the service reload; return the changed keys, and the keys that need a restart."""
    line = reload(service)
    assert line["event"] == "service.reloaded", line
    return line["changed"], line["needs_restart"]


def planned(api: Api) -> dict[str, str]:
    """Return the rule by which a restart would decide on each run."""
    plan = api.recovery.PlanRecovery(PlanRecoveryRequest(), timeout=LONG_S)
    return {decision.run_id: decision.recovery_reason for decision in plan.decisions}


def waiting(version: int) -> Any:
    return script(WAITS_FOR_FILE.replace("VERSION", str(version)))


def test_new_engines_are_for_launches_from_then_on_and_running_turns_keep_theirs(
    new_home: NewHome,
) -> None:
    engines = {"changed": waiting(1), "removed": waiting(1), "asks": RESUMABLE, "moved": RESUMABLE}
    home = new_home(engines=engines, max_concurrent=2)
    given = {"go": str(home.path / "go")}
    service, api = home.start()
    asks, moved = (api.create(e, {"questions": [QUESTION]}).run_id for e in ("asks", "moved"))
    api.until_status(asks, "WAITING_USER")
    api.until_status(moved, "WAITING_USER")
    assert planned(api)[moved] == "resumable_waiting_preserved"
    running = [api.create(engine, given).run_id for engine in ("changed", "removed")]
    for run_id in running:
        api.until_status(run_id, "RUNNING")
    queued = api.create("removed", given).run_id

    elsewhere = replace(RESUMABLE, more={"session_file": "/nowhere/{value}"})
    home.engines = {"changed": waiting(2), "added": RESUMABLE, "moved": elsewhere}
    home.write_config(log_level="debug", listen="127.0.0.1:9", max_queued=7)
    told = reloaded(service)
    assert planned(api)[moved] == "session_handle_lost"
    (home.path / "go").touch()
    ended = [api.until_ended(run_id) for run_id in running]
    api.reply(asks, 1, "yes")
    lost = [api.until_ended(run_id) for run_id in (queued, asks)]
    later = [api.until_ended(api.create(e, given).run_id) for e in ("changed", "added")]

    # The address is of the flag, which the file does not override.
    assert told == (["engines", "log_level"], ["max_queued"])
    assert [status_word(run) for run in ended] == ["SUCCEEDED", "SUCCEEDED"]
    assert MessageToDict(ended[0].output) == {"version": 1.0}
    assert [run.error.code for run in lost] == ["LAUNCH_FAILED", "LAUNCH_FAILED"]
    assert [status_word(run) for run in later] == ["SUCCEEDED", "SUCCEEDED"]
    assert MessageToDict(later[0].output) == {"version": 2.0}
    assert refused(lambda: api.create("removed", given)).reason == "UNKNOWN_ENGINE"
    assert reloaded(service) == ([], ["max_queued"])
    assert service.stop() == 0


HALF_WRITTEN: Final = '[engines.resumable]\ncommand = ["/bin/tr'


def test_a_bad_file_is_refused_with_the_words_of_check_and_the_old_one_stays(
    new_home: NewHome,
) -> None:
    home = new_home()
    good = home.config.read_text("utf-8")
    service, api = home.start()
    bad: list[Callable[[], object]] = [
        lambda: home.config.write_text(HALF_WRITTEN, "utf-8"),
        lambda: home.config.write_bytes(b"\xff\xfe"),
        lambda: home.config.write_text(good + "\n[engines.new]\ncomand = []\n", "utf-8"),
        home.config.unlink,
        home.config.mkdir,
    ]
    for spoil in bad:
        spoil()
        with pytest.raises(ConfigError) as refused_by_check:
            reading.load(path=home.config, flags={}, environ={})

        line = reload(service)

        assert (line["event"], line["level"]) == ("service.reload_refused", "error")
        assert line["problems"] == list(refused_by_check.value.problems)
        assert status_word(api.until_ended(api.create("resumable").run_id)) == "SUCCEEDED"
    home.config.rmdir()
    home.config.write_text("", "utf-8")  # as an editor leaves it for a moment
    assert reloaded(service)[1][-1] == "engines"
    assert status_word(api.until_ended(api.create("resumable").run_id)) == "SUCCEEDED"
    home.config.write_text(good, "utf-8")
    assert reloaded(service) == ([], [])


@contextmanager
def load_on(service: ServiceProcess, run_id: str, name: str) -> Iterator[None]:
    """Call without a pause as this caller, and fail if a call failed."""
    stopped = threading.Event()

    def call() -> int:
        calls = 0
        with Api(service.address, token=token_of(name)) as api:
            while not stopped.is_set():
                assert api.get(run_id).run_id == run_id
                calls += 1
        return calls

    with ThreadPoolExecutor(2) as threads:
        callers = [threads.submit(call) for _ in range(2)]
        try:
            yield
        finally:
            stopped.set()
    assert all(called.result() > 0 for called in callers)


def next_error(watch: Iterator[object]) -> grpc.RpcError:
    """Read a stream to its end, and return the error that ended it."""
    try:
        for _ in watch:
            pass
    except grpc.RpcError as error:
        return error
    raise AssertionError("the stream ended without an error")


def test_callers_are_replaced_under_load_and_the_streams_of_removed_ones_end(
    new_home: NewHome,
) -> None:
    home = new_home()
    tokens = home.path / "tokens"
    tokens.write_text(token_of("filed"))
    filed = caller("filed", "viewer", token_file=str(tokens))
    kept = caller("kept", "operator")
    home.write_config(callers=[kept, caller("gone", "viewer"), filed])
    home.token = token_of("kept")
    service, api = home.start()
    run_id = api.create("resumable", {"questions": [QUESTION]}).run_id
    api.until_status(run_id, "WAITING_USER")
    request = pb.WatchRunRequest(run_id=run_id)

    with (
        load_on(service, run_id, "kept"),
        Api(service.address, token=token_of("gone")) as gone,
        Api(service.address, token=token_of("new")) as new,
        Api(service.address, token=token_of("second")) as second,
    ):
        cut, goes_on = (one.runs.WatchRun(request, timeout=LONG_S) for one in (gone, api))
        next(cut), next(goes_on)
        assert refused(lambda: new.get(run_id)).reason == "CALLER_UNKNOWN"
        for _ in range(5):
            service.popen.send_signal(signal.SIGHUP)
        home.write_config(callers=[kept, caller("new", "viewer"), filed])
        reload(service)
        until(lambda: ["callers"] in [one["changed"] for one in outcomes(service)], "reloaded")
        ended = refusal_of(next_error(cut))
        assert new.get(run_id).run_id == run_id
        assert refused(lambda: gone.get(run_id)).reason == "CALLER_UNKNOWN"
        tokens.write_text(token_of("second"))
        assert reloaded(service) == (["callers"], [])
        assert second.get(run_id).run_id == run_id
        tokens.write_text("short")
        home.write_config(callers=[kept, filed])
        assert reload(service)["problems"] == [
            f"caller 'filed': {tokens}: a token must have at least 128 random bits, {EXAMPLE}"
        ]
        assert new.get(run_id).run_id == run_id
    api.cancel(run_id)

    assert (ended.code.name, ended.reason) == ("UNAUTHENTICATED", "CALLER_UNKNOWN")
    assert ended.message == "the caller of the call was removed or changed; call again"
    assert list(goes_on)[-1].event.kind == RunEventKind.RUN_EVENT_KIND_CANCELED
    assert service.stop() == 0


def test_a_service_reloads_while_it_recovers_and_while_it_lets_turns_end(
    new_home: NewHome,
) -> None:
    home = new_home(finish_s=LONG_S, retention={"outputs": "7d"})
    service, api = home.start()
    holds = {"hold": True, "ignore_sigterm": True}
    orphan = api.create("resumable", holds).run_id
    until(lambda: b"worked" in b"".join(one.data for one in api.output(orphan)), "it is at work")
    home.kill_with_shims(service)
    home.write_config(orphan_grace_s=LONG_S, orphan_deadline_s=2 * LONG_S)
    service = home.listen()
    service.until_event("recovery.started")
    api = service.api()

    home.engines = {**home.engines, "added": replace(RESUMABLE, more={})}
    home.write_config()
    assert reloaded(service) == (["engines"], [])
    assert api.status().state == recovery_pb2.SERVICE_STATE_RECOVERING
    assert kill_below(home.data / "runs")
    service.until_serving()
    run_id = api.create("added", holds).run_id
    until(lambda: home.agents_of(run_id), "it works")
    service.terminate()
    service.until_event("service.finishing")
    home.write_config(log_level="debug", retention={"outputs": "8d"})
    assert reloaded(service) == (["retention", "log_level"], [])
    api.cancel(run_id)

    assert service.exit_code() == 0
