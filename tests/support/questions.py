"""Questions, as the store returns them."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

from runrecovery_service.domain.run import (
    Interaction,
    InteractionKind,
    InteractionState,
    JsonValue,
)

NOW: Final = datetime(2026, 11, 24, tzinfo=UTC)


def answered(number: int, response: JsonValue, *, auto_decided: bool = False) -> Interaction:
    """Return a question whose answer was accepted."""
    return Interaction(
        interaction_id=number,
        kind=InteractionKind.OPEN_TEXT,
        prompt="So?",
        options=(),
        state=InteractionState.ANSWERED,
        asked_at=NOW,
        replied_at=NOW,
        response=response,
        auto_decided=auto_decided,
    )
