"""Permission questions of Claude Code: the hook of a launch, and the question about a call. Pure.

`permission_hook.py` is the hook itself. docs/permissions.md says how both work together.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from runrecovery_service.domain.permission import Allow, Deny, parse_answer
from runrecovery_service.domain.run import (
    Interaction,
    InteractionKind,
    JsonObject,
    Option,
    Question,
    ToolCall,
)
from runrecovery_service.domain.storable_text import is_storable
from runrecovery_service.engines.dialect import Resumed, RunContext
from runrecovery_service.engines.permission_hook import BLOCK, can_be_shown
from runrecovery_service.engines.tool_patterns import first_match
from runrecovery_service.lazy_dataclass import dataclass

if TYPE_CHECKING:
    from runrecovery_service.engines.cli_events import TurnDeferred

LEAST_VERSION: Final = (2, 1, 89)
"""The first version of Claude Code that can defer a call. Version 2.1.88 ignores the answer and
runs the tool."""
HOOK_TIMEOUT_S: Final = 86_400
"""How long Claude Code waits for the hook before it continues without an answer. The hook takes
milliseconds."""
SHOWN_CHARS: Final = 4000
REFUSED: Final = "The user refused this call"
NOBODY_ANSWERED: Final = (
    "Nobody answered in time whether this call may run, and nobody will, so it must not. Go on"
    " without it."
)

_PROGRAM: Final = Path(__file__).with_name("permission_hook_main.py")
_OPTIONS: Final = (Option(label="Allow", value="allow"), Option(label="Deny", value="deny"))


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedHook:
    """The files and arguments of a launch that install the hook.

    Attributes:
        arguments: further arguments of the CLI.
        files: the contents of files that must exist before the CLI starts.
    """

    arguments: tuple[str, ...]
    files: Mapping[Path, bytes] = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """The tool calls that need the user's permission. Empty `patterns`: no call needs it."""

    patterns: tuple[str, ...] = ()

    def prepare(self, run: RunContext, resumed: Resumed | None) -> PreparedHook | None:
        """Return the hook of a process, or None if the process needs no hook.

        If the user has answered about a call, the hook decides about this call even if the engine
        does not ask for permission any more.
        """
        grant = _grant(resumed)
        if not self.patterns and grant is None and not run.deferred:
            return None
        rules: JsonObject = {
            "patterns": [*self.patterns],
            "deferred": [*sorted(run.deferred)],
            "grant": grant,
        }
        folder = Path(run.permissions)
        hook = [sys.executable, "-I", "-S", str(_PROGRAM), str(folder), str(run.turn)]
        # A shell runs the command. Every failure must end with the exit code that blocks the call.
        command = f"{shlex.join(hook)} || exit {BLOCK}"
        entry = {"type": "command", "command": command, "timeout": HOOK_TIMEOUT_S}
        settings = {
            "disableAllHooks": False,
            "hooks": {"PreToolUse": [{"matcher": "*", "hooks": [entry]}]},
        }
        return PreparedHook(
            arguments=("--settings", json.dumps(settings)),
            files={folder / f"{run.turn}.json": json.dumps(rules).encode()},
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeferredCalls:
    """Makes questions of the calls that the hook of one process has deferred.

    Attributes:
        workspace, deferred: see `RunContext`.
        has_prompt: whether the process gets a prompt. A resumed process first returns to a call
            that is still deferred, and the hook defers this call again. Only then does the process
            read its prompt. When stored output is parsed again, the value makes no difference.
    """

    permissions: Permissions
    workspace: str
    deferred: frozenset[str]
    has_prompt: bool

    def is_repeated(self, event: TurnDeferred) -> bool:
        """Return whether the call is of an earlier turn, so that the CLI reads its prompt next."""
        return self.has_prompt and event.call_id in self.deferred

    def question(self, event: TurnDeferred, *, session: str, is_last: bool) -> Question | None:
        """Return the question, or None for a call that this hook would not have deferred now.

        Args:
            session: the session's handle, a secret.
            is_last: whether no other call followed the call in its message.
        """
        if event.call_id in self.deferred or not can_be_shown(event.input, session):
            return None
        if not is_storable(event.call_id + event.tool):
            return None
        pattern = first_match(self.permissions.patterns, event.tool, event.input)
        if pattern is None:
            return None
        call = ToolCall(
            id=event.call_id,
            tool=event.tool,
            input=event.input,
            workspace=self.workspace,
            pattern=pattern,
            is_last=is_last,
        )
        return Question(
            kind=InteractionKind.RISK_ACK, prompt=_prompt(call), options=_OPTIONS, tool_call=call
        )


def returns_to_call(reply: Interaction | None) -> bool:
    """Return whether Claude Code returns to the deferred call by itself when it is resumed.

    If other calls followed the call in its message, Claude Code (2.1.197) would not show the result
    of the call to the model. The prompt then asks the model to repeat the call instead.
    """
    return reply is not None and reply.tool_call is not None and reply.tool_call.is_last


def used_mark(folder: Path, reply: Interaction) -> Path:
    """Return the file that the hook creates when it gives the answer to a permission question."""
    return folder / _mark_name(reply)


def deferred_calls(folder: Path, turn: int) -> frozenset[str]:
    """Return the ids of the calls that the hook deferred in the turns before this one. Blocking."""
    marks = (path for path in folder.glob("*.asked") if path.stem != str(turn))
    return frozenset(path.read_text("utf-8", "replace") for path in marks)


def _mark_name(reply: Interaction) -> str:
    return f"{reply.interaction_id}.used"


def _grant(resumed: Resumed | None) -> JsonObject | None:
    """Return the answer for the hook to give, and the call that it is for; None: no answer."""
    reply, interruption = (resumed.reply, resumed.interruption) if resumed else (None, None)
    if reply is not None and reply.tool_call is not None and reply.tool_call.is_last:
        call = reply.tool_call
        return _granted(reply, call, call_id=call.id, answer=_hook_answer(reply))
    if interruption is not None:
        reply = interruption.reply
    if reply is None or reply.tool_call is None or reply.tool_call.is_last:
        return None
    match parse_answer(reply.response):
        case Allow(input=changed):
            call = reply.tool_call if changed is None else replace(reply.tool_call, input=changed)
            return _granted(reply, call, call_id=None, answer={"permissionDecision": "allow"})
    return None


def _granted(
    reply: Interaction, call: ToolCall, *, call_id: str | None, answer: JsonObject
) -> JsonObject:
    return {
        "name": _mark_name(reply),
        "call_id": call_id,
        "tool": call.tool,
        "input": call.input,
        "answer": answer,
    }


def _hook_answer(reply: Interaction) -> JsonObject:
    """Return the answer in Claude Code's form. A response that is no answer denies the call."""
    match parse_answer(reply.response):
        case Allow(input=None):
            return {"permissionDecision": "allow"}
        case Allow(input=changed):
            return {"permissionDecision": "allow", "updatedInput": changed}
        case Deny(reason=str(reason)):
            text = f"{REFUSED}: {reason}"
        case _:
            text = NOBODY_ANSWERED if reply.auto_decided else f"{REFUSED}."
    return {"permissionDecision": "deny", "permissionDecisionReason": text}


def _prompt(call: ToolCall) -> str:
    given = json.dumps(call.input, ensure_ascii=False, indent=2)
    if len(given) > SHOWN_CHARS:
        given = f"{given[:SHOWN_CHARS]}…"
    return (
        f"The agent asks for permission to call {call.tool}, because the call matches"
        f" {call.pattern} of ask_for.\n\n{given}\n\nIt works in {call.workspace}."
    )
