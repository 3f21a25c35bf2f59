"""The parts of a question that all dialects share. Pure."""

from __future__ import annotations

import json
from typing import Final

from runrecovery_service.domain.run import InteractionKind, JsonValue, Option

KINDS: Final = {kind.value: kind for kind in InteractionKind}
"""The kinds of questions, by the words that engines use."""


def parse_option(value: JsonValue) -> Option | None:
    """Return the option that a text, a number or {label, value} means; None for any other value."""
    match value:
        case bool():
            return None
        case str() if value.strip():
            return Option(label=value, value=value)
        case int() | float():
            return Option(label=json.dumps(value), value=value)
        case {"label": str(label), "value": inner} if label.strip():
            return Option(label=label, value=inner)
    return None
