"""Confidential values stay out of the log, and session handles out of every answer."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from typing import Final

from google.protobuf.message import Message
from runrecovery.v1 import recovery_service_pb2 as recovery_rpc
from runrecovery.v1 import run_service_pb2 as pb
from support.api import Api, refused, status_word, value
from support.engines import GOOD_ENGINES, script
from support.service import Home

NewHome = Callable[..., Home]

TIMEOUT_S: Final = 10.0
ASKS: Final = """
import json, sys
message = json.loads(sys.stdin.readline())
given = message["input"]
print(json.dumps({"type": "session", "value": given["handle"]}))
if message["type"] == "start":
    print(json.dumps({"type": "ask", "kind": "open_text", "prompt": given["prompt"],
                      "options": [given["option"]]}), flush=True)
else:
    print(json.dumps({"type": "result", "output": {}}), flush=True)
"""
BREAKS: Final = """
import json, sys
given = json.loads(sys.stdin.readline())["input"]
print(given["how"].replace("CANARY", given["canary"]), flush=True)
"""
BROKEN_LINES: Final = (
    "CANARY",
    '{"type": "CANARY',
    '{"type": "session", "value": ["CANARY"]}',
    '{"type": "session", "value": ""}',
    '{"type": "ask", "kind": "CANARY", "prompt": "x"}',
    '{"type": "ask", "kind": "open_text", "prompt": {"CANARY": 1}}',
    '{"type": "result", "output": "CANARY"}',
    '{"type": "result", "output": {"CANARY": 1, "CANARY": 2}}',
    '{"type": "progress", "message": ["CANARY"]}',
)


def answers(api: Api) -> Iterable[Message]:
    """Return everything that the API can read."""
    listed = api.runs.ListRuns(pb.ListRunsRequest(page_size=1000), timeout=TIMEOUT_S)
    yield listed
    for run in listed.runs:
        yield run
        yield api.recovery_info(run.run_id)
        yield from api.interactions(run.run_id)
    yield api.recovery.ListRecovered(recovery_rpc.ListRecoveredRequest(), timeout=TIMEOUT_S)
    yield api.status()
    reports = recovery_rpc.ListReconciliationsRequest()
    yield api.recovery.ListReconciliations(reports, timeout=TIMEOUT_S)


def test_no_confidential_value_is_in_any_log(new_home: NewHome) -> None:
    engines = {**GOOD_ENGINES, "asks": script(ASKS), "breaks": script(BREAKS)}
    home = new_home(engines=engines, log_level="debug")
    canaries = {
        word: f"canary-{word}-{secrets.token_hex(8)}"
        for word in ("handle", "prompt", "option", "reply", "other", "broken", "label", "error")
    }
    service, api = home.start()
    words = {name: canaries[name] for name in ("handle", "prompt", "option")}
    kept = api.create("asks", words, labels={"l": canaries["label"]})
    answered = api.create("asks", words)
    for run in (kept, answered):
        api.until_status(run.run_id, "WAITING_USER")
    api.reply(answered.run_id, 1, canaries["reply"])
    api.until_ended(answered.run_id)
    refused(lambda: api.reply(answered.run_id, 1, canaries["other"]))
    for line in BROKEN_LINES:
        run = api.create("breaks", {"how": line, "canary": canaries["broken"]})
        assert status_word(api.until_ended(run.run_id)) == "FAILED"
    refused(lambda: api.create(canaries["error"], {}))
    refused(lambda: api.create("asks", {}, labels={"X": canaries["error"]}))
    refused(lambda: api.get(canaries["error"].upper()))
    fails = api.create("resumable", {"questions": [{"prompt": canaries["prompt"]}]})
    api.until_status(fails.run_id, "WAITING_USER")
    service.kill()
    service, api = home.start()
    api.reply(kept.run_id, 1, {"deep": [canaries["reply"]]})
    api.until_ended(kept.run_id)
    assert service.stop() == 0

    logs = home.logs()
    assert {word for word, canary in canaries.items() if canary in logs} == set()
    assert "execution.turn_ended" in logs
    assert "Traceback" not in logs


def test_a_session_handle_is_in_no_answer(new_home: NewHome) -> None:
    home = new_home(engines={"asks": script(ASKS)})
    service, api = home.start()
    handle = f"canary-{secrets.token_hex(8)}"
    # The handle is put together by the agent, so that the input does not hold it.
    words = {"handle": handle[:10], "prompt": "p", "option": "o"}
    home.engines["asks"] = script(ASKS.replace('given["handle"]', f"'{handle}'"))
    home.write_config()
    assert service.stop() == 0
    service, api = home.start()
    kept, ended, lost = (api.create("asks", words) for _ in range(3))
    for run in (kept, ended, lost):
        api.until_status(run.run_id, "WAITING_USER")
    api.reply(ended.run_id, 1, "yes")
    api.until_ended(ended.run_id)
    (stored,) = home.rows("SELECT session_value FROM run WHERE run_id = ?", kept.run_id)
    assert stored == (handle,)
    service.kill()
    with home.store(writable=True) as store:
        store.execute("DELETE FROM interaction WHERE run = ?", (3,))
    service, api = home.start()

    assert api.get(kept.run_id).session.has_handle
    assert api.get(kept.run_id).session.type
    assert not api.get(ended.run_id).session.has_handle
    assert not any(handle in str(answer) for answer in answers(api))
    assert handle not in home.logs()
    api.reply(kept.run_id, 1, "yes")
    assert value("yes") == api.interactions(kept.run_id)[0].response
