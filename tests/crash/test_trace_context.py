"""Agents join the trace of the call that created their run, in every turn, also after a kill."""

from __future__ import annotations

from collections.abc import Callable

from google.protobuf.json_format import MessageToDict
from runrecovery.v1 import run_service_pb2 as pb
from support.api import struct
from support.engines import script
from support.service import Home

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TELLS = """
import json, os, sys
message = json.loads(sys.stdin.readline())
found = os.environ.get("TRACEPARENT")
if message["type"] == "resume":
    print(json.dumps({"type": "result", "output": {"found": found}}), flush=True)
else:
    print(json.dumps({"type": "session", "value": "s"}), flush=True)
    print(json.dumps({"type": "ask", "kind": "open_text", "prompt": str(found)}), flush=True)
"""


def test_every_turn_gets_the_trace_of_the_caller_and_runs_without_one_get_none(
    new_home: Callable[..., Home],
) -> None:
    home = new_home(engines={"tells": script(TELLS)}, env={"TRACEPARENT": "of-the-service"})
    service, api = home.start()
    for run_id, metadata in (
        ("traced", (("traceparent", TRACE),)),
        ("plain", ()),
        ("damaged", (("traceparent", "00-nonsense"),)),
    ):
        request = pb.CreateRunRequest(engine="tells", run_id=run_id, input=struct({}))
        api.runs.CreateRun(request, metadata=metadata, timeout=30)
    asked = {
        run_id: api.until_status(run_id, "WAITING_USER").pending_interaction.prompt
        for run_id in ("traced", "plain", "damaged")
    }
    service.kill()
    _, api = home.start()
    api.reply("traced", 1, "yes")
    ended = api.until_ended("traced")

    assert asked == {"traced": TRACE, "plain": "None", "damaged": "None"}
    assert MessageToDict(ended.output) == {"found": TRACE}
