"""The nine runs of the demo, and what the crash and the restart should do to each of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from runrecovery.v1 import run_pb2 as pb

from runrecovery_service.lazy_dataclass import dataclass

MAX_CONCURRENT: Final = 4
CONFIG: Final = """\
max_concurrent = {max_concurrent}
cancel_grace_s = 1.0
orphan_grace_s = 1.0

[engines.resumable]
command = [{python}, "-m", "runrecovery_service.engines.demo_agent", "--profile", "resumable"]
profile = "resumable"
session_file = "{{workspace}}/session-{{value}}.json"

[engines.sticky]
command = [{python}, "-m", "runrecovery_service.engines.demo_agent", "--profile", "sticky"]
profile = "sticky_process"
"""
QUESTION: Final = {"kind": "confirm", "prompt": "Deploy to production?", "options": ["yes", "no"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoRun:
    """One run of the demo.

    Attributes:
        agent_input: the input, which says what the demo agent does.
        at_crash: the status that the run has when the service is killed.
        after_restart: the status that the restart should give it.
        rule: the rule that should decide; empty for a run that needs no decision.
    """

    name: str
    engine: str
    agent_input: Mapping[str, object]
    at_crash: pb.RunStatus.ValueType
    after_restart: pb.RunStatus.ValueType
    rule: str
    restart_policy: pb.RestartPolicy.ValueType = pb.RESTART_POLICY_UNSPECIFIED


# The order matters: the first four runs free their slots again, the next four keep them.
RUNS: Final = (
    DemoRun(
        name="finished",
        engine="resumable",
        agent_input={"result": {"summary": "all tests pass"}},
        at_crash=pb.RUN_STATUS_SUCCEEDED,
        after_restart=pb.RUN_STATUS_SUCCEEDED,
        rule="",
    ),
    DemoRun(
        name="waiting",
        engine="resumable",
        agent_input={"questions": [QUESTION], "result": {"deployed": True}},
        at_crash=pb.RUN_STATUS_WAITING_USER,
        after_restart=pb.RUN_STATUS_WAITING_USER,
        rule="resumable_waiting_preserved",
    ),
    DemoRun(
        name="waiting-longer",
        engine="resumable",
        agent_input={"questions": [QUESTION]},
        at_crash=pb.RUN_STATUS_WAITING_USER,
        after_restart=pb.RUN_STATUS_WAITING_USER,
        rule="resumable_waiting_preserved",
    ),
    DemoRun(
        name="session-lost",
        engine="resumable",
        agent_input={"questions": [QUESTION]},
        at_crash=pb.RUN_STATUS_WAITING_USER,
        after_restart=pb.RUN_STATUS_FAILED,
        rule="session_handle_lost",
    ),
    DemoRun(
        name="sticky",
        engine="sticky",
        agent_input={"questions": [QUESTION]},
        at_crash=pb.RUN_STATUS_WAITING_USER,
        after_restart=pb.RUN_STATUS_FAILED,
        rule="sticky_process_lost",
    ),
    DemoRun(
        name="process-tree",
        engine="resumable",
        agent_input={"hold": True, "children": 3},
        at_crash=pb.RUN_STATUS_RUNNING,
        after_restart=pb.RUN_STATUS_FAILED,
        rule="running_interrupted",
    ),
    DemoRun(
        name="stubborn",
        engine="resumable",
        agent_input={"hold": True, "ignore_sigterm": True},
        at_crash=pb.RUN_STATUS_RUNNING,
        after_restart=pb.RUN_STATUS_FAILED,
        rule="running_interrupted",
    ),
    DemoRun(
        name="again",
        engine="resumable",
        agent_input={"work_s": 6.0, "result": {"tried": "again"}},
        at_crash=pb.RUN_STATUS_RUNNING,
        after_restart=pb.RUN_STATUS_QUEUED,
        rule="requeued",
        restart_policy=pb.RESTART_POLICY_REQUEUE,
    ),
    DemoRun(
        name="queued",
        engine="resumable",
        agent_input={},
        at_crash=pb.RUN_STATUS_QUEUED,
        after_restart=pb.RUN_STATUS_FAILED,
        rule="queued_interrupted",
    ),
)
SESSION_LOST: Final = "session-lost"
"""The run whose session file is deleted while it waits."""
SHIM_KILLED: Final = ("process-tree", "stubborn")
"""Runs whose shims are killed with the service, so that their processes survive as orphans."""
ORPHANS: Final = 1 + 3 + 1
"""Processes of the runs in `SHIM_KILLED`: an agent with three children, and one agent."""


class DemoFailed(Exception):
    """The demo cannot continue because something that it relies on is not true."""
