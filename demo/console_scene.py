"""The runs of `make console` and `make screenshots`: what agents ask, and what a kill leaves."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from runrecovery import RunRecoveryClient
from runrecovery.v1 import run_pb2 as pb

CONFIG: Final = """\
http_listen = "{http_listen}"
insecure_listen = true # without callers, everyone who can connect may answer; only this machine can
max_concurrent = 6
cancel_grace_s = 1.0
orphan_grace_s = 1.0

[engines.coder]
command = [{python}, "-m", "runrecovery_service.engines.demo_agent", "--profile", "resumable"]
profile = "resumable"
session_file = "{{workspace}}/session-{{value}}.json"

[engines.pair]
command = [{python}, "-m", "runrecovery_service.engines.demo_agent", "--profile", "sticky"]
profile = "sticky_process"
"""

_DEPLOY: Final = {
    "kind": "confirm",
    "prompt": "All 214 tests pass on the release branch.\nDeploy version 4.2.0 to production now?",
    "options": ["Deploy", "Not yet"],
}
_STRATEGY: Final = {
    "kind": "choose_one",
    "prompt": "The table `orders` has 41 million rows, and the migration adds a column that must"
    " not be null. How should I fill it?",
    "options": [
        {
            "label": "In the background, in batches of 10,000 rows (some 3 hours, no lock)",
            "value": "batches",
        },
        {
            "label": "At once, in a maintenance window (some 12 minutes, with a lock)",
            "value": "window",
        },
        {"label": "Leave it null for old rows, and check it in the application", "value": "null"},
    ],
}
_RELEASE: Final = {
    "kind": "fill_fields",
    "prompt": "I have what I need for the release notes but for these two things:",
    "options": [
        {"label": "Name of the release", "value": "name"},
        {"label": "Who should be thanked", "value": "thanks"},
    ],
}
_RISK: Final = {
    "kind": "risk_ack",
    "prompt": "The next step rewrites the history of the shared branch `main` and pushes it with"
    " force. Everybody with a clone has to fetch again, and open pull requests will be closed.",
}
_OPEN: Final = {
    "kind": "open_text",
    "prompt": "The customer writes that the export “sometimes misses the last row”. I can make it"
    " happen only with files that do not end with a newline. Is that the case they mean, or should"
    " I look further?",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneRun:
    """A run of the scene.

    Attributes:
        until: the status that the run has before the next one is created.
    """

    run_id: str
    engine: str = "coder"
    agent_input: Mapping[str, object] = field(default_factory=dict)
    labels: Mapping[str, str] = field(default_factory=dict)
    policy: pb.RestartPolicy.ValueType = pb.RESTART_POLICY_UNSPECIFIED
    until: pb.RunStatus.ValueType = pb.RUN_STATUS_WAITING_USER


BEFORE: Final = (
    SceneRun(
        run_id="deploy-4-2-0",
        labels={"team": "shop", "ticket": "SHOP-1180"},
        agent_input={"work_s": 1.2, "questions": [_DEPLOY], "result": {"deployed": True}},
    ),
    SceneRun(
        run_id="nightly-report",
        labels={"team": "data"},
        agent_input={"work_s": 0.3, "result": {"summary": "18 reports written, none failed"}},
        until=pb.RUN_STATUS_SUCCEEDED,
    ),
    SceneRun(
        run_id="export-bug",
        labels={"team": "support", "customer": "Ærø Havn"},
        agent_input={"work_s": 0.6, "questions": [_OPEN]},
    ),
    SceneRun(
        run_id="pair-session",
        engine="pair",
        labels={"team": "shop"},
        agent_input={"questions": [_STRATEGY]},
    ),
    SceneRun(
        run_id="refactor-checkout",
        labels={"team": "shop"},
        agent_input={"hold": True, "children": 2},
        until=pb.RUN_STATUS_RUNNING,
    ),
    SceneRun(
        run_id="reindex",
        labels={"team": "data"},
        agent_input={"work_s": 4.0, "result": {"rows": 41_207_334}},
        policy=pb.RESTART_POLICY_REQUEUE,
        until=pb.RUN_STATUS_RUNNING,
    ),
)
"""Runs that live through the kill, in the order of their creation."""

AFTER: Final = (
    SceneRun(
        run_id="orders-migration",
        labels={"team": "shop", "ticket": "SHOP-1207"},
        agent_input={"questions": [_STRATEGY]},
    ),
    SceneRun(
        run_id="release-notes", labels={"team": "shop"}, agent_input={"questions": [_RELEASE]}
    ),
    SceneRun(
        run_id="clean-history", labels={"team": "platform"}, agent_input={"questions": [_RISK]}
    ),
    SceneRun(
        run_id="load-test",
        labels={"team": "platform"},
        agent_input={"hold": True},
        until=pb.RUN_STATUS_RUNNING,
    ),
)
"""Runs that are created after the service has come back."""

TIMEOUT_S: Final = 20.0


def create(client: RunRecoveryClient, run: SceneRun) -> None:
    """Create a run, and wait until it has the status that the scene needs.

    Raises:
        TimeoutError: it does not have that status in time.
    """
    client.runs.create(
        engine=run.engine,
        run_id=run.run_id,
        input=dict(run.agent_input),  # type: ignore[arg-type] # JSON by construction
        labels=dict(run.labels),
        restart_policy=run.policy,
    )
    wait_for(client, run.run_id, run.until)


def wait_for(client: RunRecoveryClient, run_id: str, status: pb.RunStatus.ValueType) -> None:
    """Wait until a run has a status.

    Raises:
        TimeoutError: it does not have that status in time.
    """
    deadline = time.monotonic() + TIMEOUT_S
    while client.runs.get(run_id).status != status:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{run_id} is not {pb.RunStatus.Name(status)}")
        time.sleep(0.02)
