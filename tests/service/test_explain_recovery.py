"""ExplainRecovery of runs that no restart has decided on."""

from __future__ import annotations

from runrecovery.v1 import recovery_service_pb2 as pb
from support.api import Api


def test_a_run_that_no_restart_has_touched_has_nothing_to_explain(api: Api) -> None:
    run = api.create("resumable", {})
    request = pb.ExplainRecoveryRequest(run_id=run.run_id)

    explained = api.recovery.ExplainRecovery(request, timeout=10.0)

    assert list(explained.explanations) == []
