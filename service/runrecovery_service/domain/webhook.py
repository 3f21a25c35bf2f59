"""The events of runs that webhooks can receive, and the filter of each webhook."""

from __future__ import annotations

from enum import StrEnum

from runrecovery_service.domain.run import RunEventKind, RunStatus
from runrecovery_service.lazy_dataclass import dataclass


class WebhookEvent(StrEnum):
    """The kind of event that a delivery reports."""

    WAITING_USER = "WAITING_USER"
    """The run has a new question, or waits again after it was reopened."""
    ENDED = "ENDED"
    RECOVERED = "RECOVERED"
    """A recovery has decided on the run, with any outcome."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WebhookFilter:
    """The events that one webhook gets.

    Attributes:
        name: the name of the webhook.
        engines: the engines whose runs count; None: all.
    """

    name: str
    events: frozenset[WebhookEvent]
    engines: frozenset[str] | None = None

    def select(self, kind: RunEventKind, status: RunStatus, engine: str) -> WebhookEvent | None:
        """Return the type under which the webhook gets an event, or None if it does not get it.

        The decisions of a recovery are selected in bulk, by `storage/webhook_outbox.py`.

        Args:
            status: the status of the run after the event.
        """
        if self.engines is not None and engine not in self.engines:
            return None
        event = _event_of(kind, status)
        return event if event in self.events else None


def _event_of(kind: RunEventKind, status: RunStatus) -> WebhookEvent | None:
    if status.is_terminal:
        return WebhookEvent.ENDED
    # If a waiting sticky run is canceled, its event has the status WAITING_USER but asks nothing.
    asks = kind in {RunEventKind.ASKED, RunEventKind.REOPENED}
    return WebhookEvent.WAITING_USER if asks and status is RunStatus.WAITING_USER else None
