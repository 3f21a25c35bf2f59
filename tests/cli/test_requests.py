"""Each option of each command is in the request that the service gets."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import json_format
from google.protobuf.message import Message
from runrecovery.v1 import recovery_service_pb2 as recovery_pb
from runrecovery.v1 import run_service_pb2 as pb
from runrecovery_service.cli.exit_codes import ExitCode

from .conftest import FixedAnswers, Run, a_run

AT = "2026-11-24T10:00:00Z"
UNTIL = "2026-11-25T10:00:00Z"


@pytest.mark.parametrize(
    ("command", "request_type", "answer", "expected"),
    [
        (
            "runs create e --run-id r --label a=1",
            pb.CreateRunRequest,
            pb.CreateRunResponse(run=a_run()),
            {"runId": "r", "engine": "e", "labels": {"a": "1"}},
        ),
        (
            (
                "runs list --status queued --status waiting_user --engine e --label a=1"
                f" --created-after {AT} --created-before {UNTIL}"
            ),
            pb.ListRunsRequest,
            pb.ListRunsResponse(),
            {
                "filter": {
                    "statuses": ["RUN_STATUS_QUEUED", "RUN_STATUS_WAITING_USER"],
                    "engine": "e",
                    "labels": {"a": "1"},
                    "createdAfter": AT,
                    "createdBefore": UNTIL,
                },
                "view": "RUN_VIEW_BASIC",
            },
        ),
        (
            "runs reply r yes --interaction 4",
            pb.SubmitReplyRequest,
            pb.SubmitReplyResponse(run=a_run()),
            {"runId": "r", "interactionId": 4, "response": "yes"},
        ),
        ("runs cancel r", pb.CancelRunRequest, pb.CancelRunResponse(run=a_run()), {"runId": "r"}),
        (
            "runs reopen r",
            pb.ReopenRunRequest,
            pb.ReopenRunResponse(run=a_run()),
            {"runId": "r", "keepSession": True},
        ),
        (
            "runs interactions r",
            pb.ListInteractionsRequest,
            pb.ListInteractionsResponse(),
            {"runId": "r"},
        ),
        (
            "runs output r --attempt 2",
            pb.StreamOutputRequest,
            pb.StreamOutputResponse(attempt=2),
            {"runId": "r", "attempt": 2, "channel": "OUTPUT_CHANNEL_STDOUT"},
        ),
        (
            "runs output r --stderr --follow",
            pb.StreamOutputRequest,
            pb.StreamOutputResponse(attempt=1),
            {"runId": "r", "channel": "OUTPUT_CHANNEL_STDERR", "follow": True},
        ),
        (
            (
                "recovery list --state failed_reconciled --reason rule --engine e --label a=1"
                f" --report latest --after {AT} --before {UNTIL}"
            ),
            recovery_pb.ListRecoveredRequest,
            recovery_pb.ListRecoveredResponse(),
            {
                "filter": {
                    "recoveryStates": ["RECOVERY_STATE_FAILED_RECONCILED"],
                    "recoveryReason": "rule",
                    "engine": "e",
                    "labels": {"a": "1"},
                    "reconciliationId": "latest",
                    "recoveredAfter": AT,
                    "recoveredBefore": UNTIL,
                },
                "view": "RUN_VIEW_BASIC",
            },
        ),
        (
            "recovery explain r",
            recovery_pb.ExplainRecoveryRequest,
            recovery_pb.ExplainRecoveryResponse(),
            {"runId": "r"},
        ),
        (
            "recovery info r",
            recovery_pb.GetRecoveryInfoRequest,
            recovery_pb.GetRecoveryInfoResponse(),
            {"runId": "r"},
        ),
        (
            "prune --dry-run",
            recovery_pb.PruneRequest,
            recovery_pb.PruneResponse(done=True),
            {"dryRun": True},
        ),
        (
            "prune",
            recovery_pb.PruneRequest,
            recovery_pb.PruneResponse(done=True),
            {},
        ),
        (
            "webhooks list",
            recovery_pb.ListWebhooksRequest,
            recovery_pb.ListWebhooksResponse(),
            {},
        ),
        (
            "webhooks retry chat",
            recovery_pb.RetryWebhookRequest,
            recovery_pb.RetryWebhookResponse(),
            {"name": "chat"},
        ),
        (
            "instances",
            recovery_pb.GetInstancesRequest,
            recovery_pb.GetInstancesResponse(),
            {},
        ),
        (
            "recovery show a-report",
            recovery_pb.GetReconciliationRequest,
            recovery_pb.GetReconciliationResponse(),
            {"reconciliationId": "a-report"},
        ),
    ],
    ids=lambda value: value.split(" -")[0] if isinstance(value, str) else "",
)
def test_every_option_of_the_command_line_is_in_the_request(
    run: Run,
    server: FixedAnswers,
    command: str,
    request_type: type[Message],
    answer: Message,
    expected: dict[str, Any],
) -> None:
    method = request_type.DESCRIPTOR.name.removesuffix("Request")
    server.answers[method] = [answer]

    ended = run(*command.split(), "--server", server.address)

    assert ended.code == ExitCode.OK, ended.err
    ((_, sent),) = server.asked
    asked = json_format.MessageToDict(request_type.FromString(sent))
    of_the_client = {"requestId", "pageSize"}
    assert {key: value for key, value in asked.items() if key not in of_the_client} == expected
