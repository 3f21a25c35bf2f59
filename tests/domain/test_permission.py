"""What a reply to a permission question may be."""

from __future__ import annotations

import pytest
from runrecovery_service.domain.permission import Allow, Answer, Deny, parse_answer
from runrecovery_service.domain.run import JsonValue


@pytest.mark.parametrize(
    ("response", "meaning"),
    [
        ("allow", Allow()),
        ({"decision": "allow"}, Allow()),
        ({"decision": "allow", "input": {"command": "ls"}}, Allow({"command": "ls"})),
        ({"decision": "allow", "input": {}}, Allow({})),
        ("deny", Deny()),
        ({"decision": "deny"}, Deny()),
        ({"decision": "deny", "reason": " not today "}, Deny("not today")),
        ({"decision": "deny", "reason": " "}, Deny()),
    ],
)
def test_an_answer_allows_or_denies(response: JsonValue, meaning: Answer) -> None:
    assert parse_answer(response) == meaning


@pytest.mark.parametrize(
    "response",
    [
        None,
        True,
        1,
        "",
        "yes",
        "Allow",
        "allow ",
        ["allow"],
        {},
        {"decision": "ask"},
        {"decision": None},
        {"allow": True},
        {"decision": "allow", "input": None},
        {"decision": "allow", "input": "ls"},
        {"decision": "allow", "reason": "fine"},
        {"decision": "allow", "inputs": {}},
        {"decision": "deny", "input": {}},
        {"decision": "deny", "reason": 1},
    ],
)
def test_anything_else_is_no_answer(response: JsonValue) -> None:
    assert parse_answer(response) is None
