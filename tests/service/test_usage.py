"""The usage of agents is shown, adds up over kills, and is limited by budgets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import run_pb2
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refused, status_word
from support.engines import GOOD_ENGINES, EngineSpec, script
from support.scraping import scrape
from support.service import Home, ServiceProcess
from support.waiting import until

NewHome = Callable[..., Home]

COUNTS = """
import json, sys, time
def say(**fields):
    print(json.dumps(fields), flush=True)
message = json.loads(sys.stdin.readline())
say(type="session", value="s")
for used in message["input"].get("reports", []) if message["type"] == "start" else []:
    say(type="usage", input_tokens=used, output_tokens=1, cost_usd=used / 100)
if message["input"].get("works") and "interrupted" not in message:
    time.sleep(600)
if message["input"].get("asks") and "reply" not in message:
    say(type="ask", kind="open_text", prompt="Go on?")
else:
    say(type="result", output={})
say(type="usage", input_tokens=message["input"].get("at_end", 0), output_tokens=1)
"""
"""An agent that reports `reports` in its first process, and then asks, or works until it is
interrupted. After its question or result it reports `at_end`."""


def engines(**keys: int) -> dict[str, EngineSpec]:
    counting = script(COUNTS, resumes_interrupted=True, restart_policy="resume")
    counting = replace(counting, more={**counting.more, **keys})
    return {**GOOD_ENGINES, "counting": counting}


def used(run: run_pb2.Run) -> tuple[int, int, float]:
    return run.usage.input_tokens, run.usage.output_tokens, run.usage.cost_usd


def test_a_killed_turn_counts_as_far_as_it_was_reported(new_home: NewHome) -> None:
    home = new_home(engines=engines(), metrics_listen="127.0.0.1:0")
    service, api = home.start()
    run_id = api.create("counting", {"reports": [70], "works": True, "at_end": 30}).run_id
    until(lambda: used(api.get(run_id)) == (70, 1, 0.7), "the first report is on record")
    etag = api.get(run_id).etag
    service.kill()
    service, api = home.start()

    run = api.until_ended(run_id)

    assert status_word(run) == "SUCCEEDED"
    assert used(run) == (100, 2, 0.7)
    assert run.etag != etag
    (engine,) = api.status().engine_usage
    assert (engine.engine, engine.turns) == ("counting", 2)
    assert MessageToDict(engine.usage) == {
        "inputTokens": "100", "outputTokens": "2", "costUsd": 0.7
    }  # fmt: skip
    request = pb.WatchRunRequest(run_id=run_id, after_sequence=0)
    events = [update.event for update in api.runs.WatchRun(request, timeout=20)]
    ends = [event for event in events if event.HasField("usage")]
    assert [(event.kind, event.usage.input_tokens) for event in ends] == [
        (run_pb2.RUN_EVENT_KIND_SUCCEEDED, 30)
    ]
    service.kill()
    service, api = home.start()
    assert used(api.get(run_id)) == (100, 2, 0.7)
    until(lambda: shown(service), "the store is read for metrics")
    assert shown(service) == {
        ("runrecovery_usage_turns_total", ""): 2,
        ("runrecovery_usage_tokens_total", "input"): 100,
        ("runrecovery_usage_tokens_total", "output"): 2,
        ("runrecovery_usage_part_tokens_total", "cached_input"): 0,
        ("runrecovery_usage_part_tokens_total", "cache_write_input"): 0,
        ("runrecovery_usage_part_tokens_total", "reasoning_output"): 0,
        ("runrecovery_usage_cost_usd_total", ""): 0.7,
    }


def shown(service: ServiceProcess) -> dict[tuple[str, str], float]:
    """Return the metrics of usage, by name and kind."""
    found = {}
    for (name, labels), number in scrape(service).items():
        if name.startswith("runrecovery_usage_"):
            kinds = dict(labels)
            assert (kinds.pop("engine"), kinds.pop("model")) == ("counting", "")
            found[name, "".join(kinds.values())] = number
    return found


def failed_over_budget(api: Api, run_id: str) -> str:
    run = api.until_ended(run_id)
    assert (status_word(run), run.error.code) == ("FAILED", "BUDGET_EXCEEDED"), run
    assert not run.HasField("pending_interaction")
    return run.error.message


def test_a_budget_ends_a_run_in_its_turn_or_before_the_next_one_and_keeps_a_result(
    new_home: NewHome,
) -> None:
    home = new_home(engines=engines(max_tokens=100))
    _, api = home.start()

    at_once = api.create("counting", {"reports": [40, 99], "works": True}).run_id
    before_next = api.create("counting", {"asks": True, "at_end": 99}).run_id
    narrowed = api.create("counting", {"reports": [40], "works": True}, max_cost_usd=0.4).run_id
    kept = api.create("counting", {"reports": [40], "at_end": 500}).run_id

    assert failed_over_budget(api, at_once) == "The run has used 100 of its 100 tokens."
    assert failed_over_budget(api, before_next) == "The run has used 100 of its 100 tokens."
    assert failed_over_budget(api, narrowed) == (
        "The run has cost 0.400000 of its 0.400000 US dollars."
    )
    succeeded = api.until_ended(kept)
    assert (status_word(succeeded), used(succeeded)[:2]) == ("SUCCEEDED", (500, 1))
    assert (succeeded.max_tokens, succeeded.HasField("max_cost_usd")) == (100, False)
    assert home.agents() == []


@pytest.mark.parametrize("wider", [{"max_tokens": 101}, {"max_tokens": 0}])
def test_a_caller_may_only_narrow_a_budget(new_home: NewHome, wider: dict[str, int]) -> None:
    _, api = new_home(engines=engines(max_tokens=100)).start()

    refusal = refused(lambda: api.create("counting", {}, **wider))

    assert (refusal.reason, refusal.fields) == ("INVALID_FIELD", ("max_tokens",))
