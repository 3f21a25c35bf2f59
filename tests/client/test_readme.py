"""The lines of the client's README work."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from runrecovery.v1 import recovery_service_pb2, run_pb2, run_service_pb2
from support.scripted_server import ScriptedServer, Stream

README = Path(__file__).parents[2] / "client" / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
EVENTS = [
    (run_pb2.RUN_EVENT_KIND_CREATED, run_pb2.RUN_STATUS_QUEUED),
    (run_pb2.RUN_EVENT_KIND_ASKED, run_pb2.RUN_STATUS_WAITING_USER),
    (run_pb2.RUN_EVENT_KIND_SUCCEEDED, run_pb2.RUN_STATUS_SUCCEEDED),
]
WATCHED = [
    f"{number} {run_pb2.RunEventKind.Name(kind)} {run_pb2.RunStatus.Name(status)}"
    for number, (kind, status) in enumerate(EVENTS, start=1)
]
PRINTED = [
    "Go on?\nRUN_STATUS_SUCCEEDED \nbye",
    "r sticky_process_lost GONE",
    "\n".join(WATCHED),
    "bookmark",
    "SERVING",
]


def _script(
    server: ScriptedServer,
) -> None:
    question = run_pb2.PendingInteraction(interaction_id=1, prompt="Go on?")
    waiting = run_pb2.Run(
        run_id="r", status=run_pb2.RUN_STATUS_WAITING_USER, pending_interaction=question
    )
    ended = run_pb2.Run(run_id="r", status=run_pb2.RUN_STATUS_SUCCEEDED)
    lost = run_pb2.Run(
        run_id="r",
        recovery=run_pb2.RecoveryInfo(recovery_reason="sticky_process_lost"),
        error=run_pb2.RunError(code="GONE"),
    )
    server.on("CreateRun", run_service_pb2.CreateRunResponse(run=waiting))
    server.on(
        "GetRun",
        run_service_pb2.GetRunResponse(run=waiting),
        run_service_pb2.GetRunResponse(run=ended),
    )
    server.on("SubmitReply", run_service_pb2.SubmitReplyResponse(run=waiting))
    server.on("StreamOutput", Stream([run_service_pb2.StreamOutputResponse(data=b"bye")]))
    events = [run_pb2.RunEvent(kind=kind, status=status) for kind, status in EVENTS]
    server.on(
        "WatchRun",
        Stream(
            [
                run_service_pb2.WatchRunResponse(sequence=number, event=event)
                for number, event in enumerate(events, start=1)
            ]
        ),
    )
    bookmark = recovery_service_pb2.WatchRecoveredResponse(
        cursor="c", bookmark=run_pb2.WatchBookmark()
    )
    server.on("WatchRecovered", Stream([bookmark], hold=True))
    server.on("ListRecovered", recovery_service_pb2.ListRecoveredResponse(runs=[lost]))


@pytest.mark.parametrize(("block", "printed"), list(zip(BLOCKS, PRINTED, strict=True)))
def test_example_of_the_readme_works(
    block: str,
    printed: str,
    server: ScriptedServer,
) -> None:
    _script(server)
    code = block.replace("127.0.0.1:50051", server.start())

    done = subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True
    )

    assert done.stdout.strip() == printed
