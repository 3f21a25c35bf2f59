"""A model that calls Bash as a test wants, and then reports the results that it was shown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from cli_agents.model_endpoint import ModelRequest, Reply

AGAIN: Final = "with exactly this input:\n\n"
ERRAND: Final = "Run your command."
NOT_RUN: Final = "This call was not run."


@dataclass(slots=True)
class CallingModel:
    """Calls commands, one message for each of `steps`.

    It repeats a call that it is told to repeat, and a call that was not run because it was one of
    several.
    """

    steps: Sequence[Sequence[str]]

    def __call__(self, request: ModelRequest) -> Reply:
        """Return the next call, or the results."""
        if not request.offers_tools:
            return Reply("A title")
        blocks = [
            {"type": "text", "text": block} if isinstance(block, str) else block
            for message in json.loads(request.raw)
            for block in _content(message)
        ]
        commands = self._next(blocks)
        if commands:
            return Reply(command=commands[0], more=tuple(commands[1:]))
        results = [each for _, each in _results(blocks)]
        return Reply(json.dumps({"result": {"results": results}}))

    def _next(self, blocks: list[dict[str, Any]]) -> Sequence[str]:
        told = [at for at, block in enumerate(blocks) if AGAIN in block.get("text", "")]
        if told and not _calls(blocks[told[-1] :]):
            given: dict[str, str] = json.loads(blocks[told[-1]]["text"].partition(AGAIN)[2])
            return [given["command"]]
        called = [command for _, command in _calls(blocks)]
        for commands in self.steps:
            if not set(commands) <= set(called):
                return commands
        shown = dict(_results(blocks))
        ran = {command for key, command in _calls(blocks) if NOT_RUN not in shown.get(key, "")}
        repeated = [command for command in dict.fromkeys(called) if command not in ran]
        return repeated[:1]


@dataclass(frozen=True, slots=True)
class DelegatingModel:
    """Has a subagent call a command, and reports what the subagent reports."""

    command: str

    def __call__(self, request: ModelRequest) -> Reply:
        """Return the errand, the call of the subagent, or the report of either."""
        if not request.offers_tools:
            return Reply("A title")
        messages = json.loads(request.raw)
        blocks = [each for message in messages for each in _content(message)]
        results = [each for _, each in _results([b for b in blocks if isinstance(b, dict)])]
        is_subagent = request.contains(ERRAND)
        if not results:
            return Reply(command=self.command) if is_subagent else Reply(errand=ERRAND)
        return Reply(results[-1] if is_subagent else json.dumps({"result": {"results": results}}))


def _content(message: dict[str, Any]) -> list[Any]:
    content = message["content"]
    return content if isinstance(content, list) else [content]


def _calls(blocks: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return id and command of every call."""
    return [
        (block["id"], block["input"]["command"])
        for block in blocks
        if block.get("type") == "tool_use"
    ]


def _results(blocks: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return the call's id and the text of every result."""
    return [
        (block["tool_use_id"], str(block["content"]))
        for block in blocks
        if block.get("type") == "tool_result"
    ]
