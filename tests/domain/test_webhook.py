"""Which events of runs a webhook gets, and as what."""

from __future__ import annotations

from itertools import product

import pytest
from runrecovery_service.domain.run import RunEventKind, RunStatus
from runrecovery_service.domain.webhook import WebhookEvent, WebhookFilter

ASKS = {
    (RunEventKind.ASKED, RunStatus.WAITING_USER),
    (RunEventKind.REOPENED, RunStatus.WAITING_USER),
}
OVER = {RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.CANCELED}


@pytest.mark.parametrize(("kind", "status"), list(product(RunEventKind, RunStatus)))
def test_every_event_is_a_question_an_end_or_nothing(kind: RunEventKind, status: RunStatus) -> None:
    every = WebhookFilter(name="chat", events=frozenset(WebhookEvent))

    found = every.select(kind, status, "demo")

    expected = WebhookEvent.WAITING_USER if (kind, status) in ASKS else None
    assert found == (WebhookEvent.ENDED if status in OVER else expected)
