"""What three vendors demand of the tool calls in a conversation, by their published rules.

A vendor answers a conversation that breaks its rule with status 400, and a CLI cannot repair its
history. So a resumed session whose history breaks a rule is a lost run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

Json: TypeAlias = dict[str, Any]


def openai_violations(items: Sequence[Json]) -> list[str]:
    """Return what breaks the rule of the Responses API: one output for each call, after it."""
    found = []
    calls: Counter[str] = Counter()
    outputs: Counter[str] = Counter()
    for item in items:
        kind, call_id = str(item.get("type")), str(item.get("call_id"))
        if kind.endswith("_call") and "call_id" in item:
            calls[call_id] += 1
        elif kind.endswith("_call_output"):
            outputs[call_id] += 1
            if call_id not in calls:
                found.append(f"no tool call found for the output of {call_id}")
    found += [f"no tool output found for {call_id}" for call_id in calls - outputs]
    found += [f"{call_id} is called twice" for call_id, times in calls.items() if times > 1]
    return found + [f"{call_id} has two outputs" for call_id, n in outputs.items() if n > 1]


def gemini_violations(contents: Sequence[Json]) -> list[str]:
    """Return what breaks the rule of the Gemini API: as many responses as calls, in the next turn.

    Consecutive contents of one role are one turn.
    """
    found = []
    called = 0
    for role, parts in _turns(contents, "parts"):
        responses = sum("functionResponse" in part for part in parts)
        if responses != called:
            found.append(f"{called} functionCall parts are followed by {responses} responses")
        called = sum("functionCall" in part for part in parts) if role == "model" else 0
    return found + [f"{called} functionCall parts have no response"] * (called > 0)


def anthropic_violations(messages: Sequence[Json]) -> list[str]:
    """Return what breaks the rule of the Messages API.

    The message after a `tool_use` begins with one `tool_result` for each of them.
    """
    found = []
    called: list[str] = []
    seen: set[str] = set()
    for role, blocks in _turns(messages, "content"):
        answered = [str(block["tool_use_id"]) for block in blocks if _is(block, "tool_result")]
        if sorted(answered) != sorted(called):
            found.append(f"tool_use {called} is followed by tool_result for {answered}")
        called = [str(block["id"]) for block in blocks if _is(block, "tool_use")]
        if role != "assistant" and called:
            found.append("tool_use in a message of the user")
        found += [f"tool_use {each} exists twice" for each in called if each in seen]
        seen.update(called)
    return found + [f"tool_use {called} has no tool_result"] * bool(called)


def _is(block: Json, kind: str) -> bool:
    return block.get("type") == kind


def _turns(messages: Iterable[Json], key: str) -> list[tuple[str, list[Json]]]:
    """Return the role and the parts of each turn. A content that is a text has no parts."""
    turns: list[tuple[str, list[Json]]] = []
    for message in messages:
        content = message.get(key)
        parts = content if isinstance(content, list) else []
        role = str(message.get("role") or "user").replace("function", "user")
        if turns and turns[-1][0] == role:
            turns[-1][1].extend(parts)
        else:
            turns.append((role, list(parts)))
    return turns
