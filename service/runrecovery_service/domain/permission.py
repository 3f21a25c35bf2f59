"""The answers to a permission question. Pure."""

from __future__ import annotations

from typing import Final, TypeAlias

from runrecovery_service.domain.run import JsonObject, JsonValue
from runrecovery_service.lazy_dataclass import dataclass

ALLOW: Final = "allow"
DENY: Final = "deny"
FORMS: Final = (
    'must be "allow", "deny", {"decision": "allow", "input": {…}} or'
    ' {"decision": "deny", "reason": "…"}: the question asks for permission to call a tool'
)
"""The accepted forms of an answer, for the message about an answer in another form."""


@dataclass(frozen=True, slots=True)
class Allow:
    """The call is allowed once. `input` replaces its arguments; None: they stay as they are."""

    input: JsonObject | None = None


@dataclass(frozen=True, slots=True)
class Deny:
    """The call must not run. `reason` is for the agent; None: the user gave none."""

    reason: str | None = None


Answer: TypeAlias = Allow | Deny


def parse_answer(response: JsonValue) -> Answer | None:
    """Return the meaning of a response; None if it is not an answer to a permission question."""
    match response:
        case "allow" | {"decision": "allow"} if _has_only(response, set()):
            return Allow()
        case {"decision": "allow", "input": dict(changed)} if _has_only(response, {"input"}):
            return Allow(changed)
        case "deny" | {"decision": "deny"} if _has_only(response, set()):
            return Deny()
        case {"decision": "deny", "reason": str(reason)} if _has_only(response, {"reason"}):
            return Deny(reason.strip() or None)
    return None


def _has_only(response: JsonValue, more: set[str]) -> bool:
    return not isinstance(response, dict) or response.keys() == {"decision", *more}
