"""Converts the usage that agent CLIs report into `Usage`, whose numbers have one meaning.

docs/agents.md says what each CLI counts, and when its count begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import reduce
from typing import Final

from runrecovery_service.domain.run import JsonObject, JsonValue
from runrecovery_service.domain.usage import (
    InvalidUsage,
    SessionUsage,
    TurnUsage,
    Usage,
    usage_of,
)
from runrecovery_service.engines.cli_events import CallReported, UsageReported

MAX_CALLS: Final = 10_000
"""The most calls of one process whose reports are kept apart, so that a repeated report counts
once."""


class UsageCounter:
    """Computes the usage of a turn so far from the reports of its process.

    Args:
        before: the usage that earlier processes of the session have reported; None: nothing.
    """

    def __init__(self, before: SessionUsage | None) -> None:
        self._before = before or SessionUsage()
        self._reported = TurnUsage(turn=Usage())
        self._session = self._before
        self._calls: dict[str, Usage] = {}
        self._sum = Usage()

    def add(self, said: UsageReported | CallReported) -> TurnUsage:
        """Return the usage of the turn, including this report.

        Reports of calls are added to the latest report of the turn. The next report of the turn
        replaces them.
        """
        if isinstance(said, UsageReported):
            self._calls.clear()
            self._sum = Usage()
            self._reported = self._report(said)
            self._session = self._reported.session or self._session
            return self._reported
        if said.call in self._calls or len(self._calls) < MAX_CALLS:
            earlier = self._calls.get(said.call, Usage())
            self._calls[said.call] = said.usage
            self._sum = self._sum.minus(earlier).plus(said.usage)
        return TurnUsage(
            turn=self._reported.turn.plus(self._sum), session=self._session.plus_calls(self._sum)
        )

    def _report(self, said: UsageReported) -> TurnUsage:
        if not said.spans_session:
            return TurnUsage(turn=said.total)
        turn = said.total
        if not said.is_of_process:
            turn = self._before.since(said.total, at_least=said.of_process)
        return TurnUsage(turn=turn, session=SessionUsage(total=said.total))


def codex(event: JsonObject) -> UsageReported | None:
    """Return the usage in an event of Codex: the total of all processes of the session."""
    match event:
        case {"type": "turn.completed", "usage": dict(said)}:
            try:
                return UsageReported(codex_tokens(said), spans_session=True)
            except InvalidUsage:
                return None
    return None


def codex_tokens(said: JsonObject) -> Usage:
    """Return the tokens that Codex counts, in its events and in its session files.

    Raises:
        InvalidUsage: see `usage_of`.
    """
    return usage_of(
        input_tokens=said.get("input_tokens"),
        output_tokens=said.get("output_tokens"),
        cached=said.get("cached_input_tokens", 0),
        cache_write=said.get("cache_write_input_tokens", 0),
        reasoning=said.get("reasoning_output_tokens", 0),
    )


def gemini(event: JsonObject) -> UsageReported | None:
    """Return the usage in an event of Gemini CLI: the total of the process."""
    match event:
        case {"type": "result", "stats": dict(said)}:
            try:
                total = _gemini_tokens(
                    said,
                    read=said.get("input_tokens"),
                    written=said.get("output_tokens"),
                    total=said.get("total_tokens"),
                    model=_largest(said.get("models"), "total_tokens"),
                )
            except InvalidUsage:
                return None
            return UsageReported(total)
    return None


def gemini_call(message: JsonObject) -> Usage | None:
    """Return the tokens of a message in a session file of Gemini CLI; None: it has none.

    Raises:
        InvalidUsage: see `usage_of`.
    """
    match message:
        case {"type": "gemini", "tokens": dict(said)}:
            return _gemini_tokens(
                said,
                read=said.get("input"),
                written=said.get("output"),
                total=said.get("total"),
                model=message.get("model", ""),
            )
    return None


def _gemini_tokens(
    said: JsonObject, *, read: JsonValue, written: JsonValue, total: JsonValue, model: JsonValue
) -> Usage:
    # `written` has the answers alone. The rest of the total is reasoning.
    answers = _whole(written)
    reasoning = max(0, _whole(total) - _whole(read) - answers)
    return usage_of(
        input_tokens=read,
        output_tokens=answers + reasoning,
        cached=said.get("cached", 0),
        reasoning=reasoning,
        model=model,
    )


def claude(event: JsonObject) -> UsageReported | CallReported | None:
    """Return the usage in an event of Claude Code: that of one call, or that of an ended turn.

    `modelUsage` has the numbers of every model, which agree with the cost. Newer versions count
    them over the whole session, older versions over the process. `usage` has the numbers of the
    main model in this process. If `modelUsage` has the same numbers for a model, the report is
    about the process.
    """
    try:
        match event:
            case {"type": "assistant"}:
                return claude_call(event)
            case {"type": "result"}:
                return _claude_turn(event)
    except InvalidUsage:
        pass
    return None


def claude_call(line: JsonObject) -> CallReported | None:
    """Return the usage of a call of Claude Code's model; None: the line has none.

    The events and the session files of Claude Code have the same messages. A message that the CLI
    wrote itself is no call.

    Raises:
        InvalidUsage: see `usage_of`.
    """
    match line:
        case {"type": "assistant", "message": {"id": str(call), "usage": dict(said), **more}}:
            if more.get("model") == "<synthetic>":
                return None
            named = usage_of(input_tokens=0, output_tokens=0, model=more.get("model", ""))
            used = _claude_tokens(said).plus(named)
            return CallReported(call, used, calls_tool=_calls_tool(more.get("content")))
    return None


def _calls_tool(content: object) -> bool:
    blocks = content if isinstance(content, list) else []
    return any(isinstance(block, dict) and block.get("type") == "tool_use" for block in blocks)


def _claude_turn(event: JsonObject) -> UsageReported | None:
    by_model, said = event.get("modelUsage"), event.get("usage")
    process = _claude_tokens(said) if isinstance(said, dict) else None
    priced = usage_of(input_tokens=0, output_tokens=0, cost_usd=event.get("total_cost_usd"))
    if isinstance(by_model, dict) and by_model:
        models = list(_claude_models(by_model))
        total = reduce(Usage.plus, models, priced)
        named = Usage(model=_largest(by_model, "inputTokens"))
        return UsageReported(
            total.plus(named),
            spans_session=True,
            of_process=process,
            is_of_process=process != Usage()
            and process in [replace(one, reasoning_output_tokens=0) for one in models],
        )
    return None if process is None else UsageReported(process.plus(priced))


def _claude_tokens(said: JsonObject) -> Usage:
    written = _whole(said.get("cache_creation_input_tokens"))
    cached = _whole(said.get("cache_read_input_tokens"))
    return usage_of(  # Claude's input tokens do not include the cached ones
        input_tokens=_whole(said.get("input_tokens")) + written + cached,
        output_tokens=said.get("output_tokens"),
        cached=cached,
        cache_write=written,
    )


def _claude_models(by_model: dict[str, JsonValue]) -> Iterator[Usage]:
    for said in by_model.values():
        if isinstance(said, dict):
            written = _whole(said.get("cacheCreationInputTokens"))
            cached = _whole(said.get("cacheReadInputTokens"))
            yield usage_of(
                input_tokens=_whole(said.get("inputTokens")) + written + cached,
                output_tokens=said.get("outputTokens"),
                cached=cached,
                cache_write=written,
                reasoning=said.get("thinkingTokens", 0),
            )


def _whole(value: JsonValue) -> int:
    """Return a number of tokens; 0 for a missing one.

    Raises:
        InvalidUsage: see `usage_of`.
    """
    return usage_of(input_tokens=0 if value is None else value, output_tokens=0).input_tokens


def _largest(by_model: JsonValue, tokens: str) -> str:
    """Return the model with the most tokens; empty if there is no model."""
    if not isinstance(by_model, dict):
        return ""
    sizes: dict[str, int] = {
        name: _whole(said.get(tokens)) for name, said in by_model.items() if isinstance(said, dict)
    }
    return max(sizes, key=lambda name: sizes[name], default="")
