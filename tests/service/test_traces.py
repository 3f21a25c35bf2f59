"""With `[traces]` the service sends spans to a collector, and no collector can slow it down."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable

import grpc
import pytest
from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import run_service_pb2 as pb
from support.api import struct
from support.engines import script
from support.scraping import scrape
from support.service import Home, ServiceProcess
from support.trace_collector import Collected, Collector
from support.waiting import until

TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HIDDEN = "hidden-from-traces"
ASKS = """
import json, os, sys
message = json.loads(sys.stdin.readline())
found = os.environ.get("TRACEPARENT")
if message["type"] == "resume":
    print(json.dumps({"type": "result", "output": {"found": found}}), flush=True)
else:
    print(json.dumps({"type": "session", "value": "hidden-from-traces"}), flush=True)
    print(json.dumps({"type": "ask", "kind": "open_text", "prompt": str(found)}), flush=True)
    sys.stdin.readline()  # a sticky process waits here
"""


def test_the_spans_of_a_run_join_the_trace_of_its_caller_over_a_kill(
    new_home: Callable[..., Home],
) -> None:
    with Collector() as collector:
        home = new_home(engines={"asks": script(ASKS)}, traces={"endpoint": collector.endpoint})
        service, api = home.start()
        request = pb.CreateRunRequest(engine="asks", run_id="r", input=struct({"x": HIDDEN}))
        metadata = (("traceparent", f"00-{TRACE}-{CALLER}-01"),)
        api.runs.CreateRun(request, metadata=metadata, timeout=30)
        asked = api.until_status("r", "WAITING_USER").pending_interaction.prompt
        until(lambda: collector.named("turn"), "the first turn is exported")
        service.kill()
        service, api = home.start()
        api.reply("r", 1, HIDDEN)
        found = MessageToDict(api.until_ended("r").output)["found"]
        service.stop()

        spans = [span for span in collector.spans if span.trace_id == TRACE]
        [call] = [span for span in spans if span.name == "runrecovery.v1.RunService/CreateRun"]
        turns = [span for span in spans if span.name == "turn"]
        assert call.parent_id == CALLER
        assert call.facts["rpc.response.status_code"] == "OK"
        assert [facts(turn) for turn in turns] == [
            ("r", "asks", 1, 1, "WAITING_USER"),
            ("r", "asks", 1, 2, "SUCCEEDED"),
        ]
        assert {turn.parent_id for turn in turns} == {call.span_id}
        assert [asked, found] == [f"00-{TRACE}-{turn.span_id}-01" for turn in turns]
        launches = [span for span in spans if span.name == "launch"]
        assert [launch.parent_id for launch in launches] == [turn.span_id for turn in turns]
        queues = [span for span in spans if span.name == "queue"]
        assert [queue.parent_id for queue in queues] == [call.span_id] * 2
        assert all(
            queue.start_ns <= queue.end_ns <= turn.end_ns
            for queue, turn in zip(queues, turns, strict=True)
        )
        assert not any(span.has_failed for span in spans)
        assert HIDDEN.encode() not in b"".join(collector.bodies)
        phases = {span.name for span in collector.spans if span.parent_id == recoveries(collector)}
        assert phases == {
            "orphans", "sessions", "converge", "bindings", "trust", "deadlines", "containment"
        }  # fmt: skip


def test_a_turn_that_a_kill_cut_off_is_reported_by_the_recovery_as_the_parent_of_its_agent(
    new_home: Callable[..., Home],
) -> None:
    with Collector() as collector:
        engine = script(ASKS, profile="sticky_process")
        home = new_home(engines={"asks": engine}, traces={"endpoint": collector.endpoint})
        service, api = home.start()
        metadata = (("traceparent", f"00-{TRACE}-{CALLER}-01"),)
        api.runs.CreateRun(
            pb.CreateRunRequest(engine="asks", run_id="r"), metadata=metadata, timeout=30
        )
        asked = api.until_status("r", "WAITING_USER").pending_interaction.prompt
        until(lambda: collector.named("launch"), "the launch is exported")
        service.kill()
        service, _ = home.start()
        service.stop()

        [turn] = collector.named("turn")
        [launch] = collector.named("launch")
        [call] = collector.named("runrecovery.v1.RunService/CreateRun")
        assert asked == f"00-{TRACE}-{turn.span_id}-01"
        assert (turn.trace_id, turn.parent_id) == (TRACE, call.span_id)
        assert launch.parent_id == turn.span_id
        assert turn.start_ns <= launch.end_ns <= turn.end_ns
        assert turn.has_failed
        assert facts(turn) == ("r", "asks", 1, 1, "FAILED")
        assert turn.facts["runrecovery.rule"] == "sticky_process_lost"
        assert turn.facts["error.type"] == "sticky_process_lost"


def facts(turn: Collected) -> tuple[object, ...]:
    keys = ("run_id", "engine", "attempt", "turn", "status")
    return tuple(turn.facts[f"runrecovery.{key}"] for key in keys)


def recoveries(collector: Collector) -> str:
    """Return the span of the second start's recovery."""
    [found] = [
        span.span_id
        for span in collector.named("recovery")
        if (span.facts["runrecovery.epoch"], span.facts["runrecovery.cause"]) == (2, "STARTUP")
    ]
    return found


def test_a_stop_exports_turns_that_it_cuts_off_and_calls_with_their_codes(
    new_home: Callable[..., Home],
) -> None:
    with Collector() as collector:
        home = new_home(
            engines={"works": script("import time; print(flush=True); time.sleep(600)")},
            traces={"endpoint": collector.endpoint},
        )
        service, api = home.start()
        api.create("works", run_id="r")
        service.until_event("execution.launched")
        with pytest.raises(grpc.RpcError):
            api.get("missing")
        watched = api.runs.WatchRun(pb.WatchRunRequest(run_id="r"), timeout=30)
        next(watched)
        watched.cancel()
        # Otherwise the stop may end the stream before the service has seen the cancel.
        watch_span = "runrecovery.v1.RunService/WatchRun"
        until(lambda: collector.named(watch_span), "the canceled watch has ended")
        service.stop()

        [turn] = collector.named("turn")
        assert turn.has_failed
        assert facts(turn) == ("r", "works", 1, 1, "FAILED")
        assert turn.facts["error.type"] == "running_interrupted"
        [get] = collector.named("runrecovery.v1.RunService/GetRun")
        assert (get.facts["rpc.response.status_code"], get.has_failed) == ("NOT_FOUND", False)
        [watch] = collector.named(watch_span)
        assert (watch.facts["rpc.response.status_code"], watch.has_failed) == ("CANCELLED", False)


def test_a_caller_that_does_not_sample_gets_no_span_unless_the_ratio_decides(
    new_home: Callable[..., Home],
) -> None:
    names = []
    for by_caller in (True, False):
        with Collector() as collector:
            traces = {"endpoint": collector.endpoint, "sample_by_caller": by_caller}
            service, api = new_home(traces=traces).start()
            metadata = (("traceparent", f"00-{TRACE}-{CALLER}-00"),)
            api.runs.ListRuns(pb.ListRunsRequest(), metadata=metadata, timeout=30)
            service.stop()
            names.append([span.name for span in collector.spans if span.trace_id == TRACE])

    assert names == [[], ["runrecovery.v1.RunService/ListRuns"]]


def test_a_collector_that_hangs_neither_stops_calls_nor_the_stop(
    new_home: Callable[..., Home],
) -> None:
    with Collector(answers=False) as collector:
        service, api = new_home(traces={"endpoint": collector.endpoint}).start()
        until(collector.asked.is_set, "the collector hangs")
        api.runs.ListRuns(pb.ListRunsRequest(), timeout=30)
        service.popen.send_signal(signal.SIGTERM)

        assert service.popen.wait(60) == 0
        assert [event["seconds"] for event in service.events("traces.not_flushed")] == [3.0]
        assert not service.events("service.stop_step_failed")


def test_spans_that_no_collector_takes_are_counted_and_reported_by_the_service_alone(
    new_home: Callable[..., Home],
) -> None:
    with Collector() as collector:
        endpoint = collector.endpoint
    home = new_home(traces={"endpoint": endpoint}, metrics_listen="127.0.0.1:0")
    service, api = home.start()
    lost = service.until_event("traces.spans_lost")
    until(lambda: spans(service)["not_exported"] >= lost["spans"], "a scrape shows the loss")
    api.runs.ListRuns(pb.ListRunsRequest(), timeout=30)
    service.stop()

    assert lost["reason"] == "not_exported"
    assert [e["event"] for e in service.events() if "opentelemetry" in str(e)] == []


def spans(service: ServiceProcess) -> dict[str, float]:
    samples = scrape(service)
    outcomes = ("sent", "queue_full", "not_exported")
    return {it: samples["runrecovery_spans_total", frozenset({("outcome", it)})] for it in outcomes}


def test_a_start_without_traces_imports_nothing_of_them() -> None:
    code = (
        "import sys, runrecovery_service.app;"
        " print([name for name in sys.modules"
        " if name.startswith('opentelemetry') or '_service' in name"
        " and name.endswith(('traces', 'tracer', 'spans', 'cut_turns'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
