"""The permission hook: decides about one tool call, in a process of its own.

Claude Code starts the hook before a tool call, and waits for its decision. If the call matches a
pattern of the engine, the hook defers it: Claude Code ends, and the service asks the user. In the
turn that resumes with the user's answer, Claude Code asks the hook about the same call again. The
hook then passes on the answer, once.

The hook reads files that the service wrote before the launch. It creates files of its own, each of
which only one process can create. If the hook cannot decide, it exits with `BLOCK`, and the call
does not run.

This module imports only light parts of the standard library.
"""

from __future__ import annotations

import json
import os
import sys

from runrecovery_service.engines.tool_patterns import first_match

TYPE_CHECKING = False  # importing `typing` for its constant takes some milliseconds
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    Json: TypeAlias = dict[str, Any]

BLOCK = 2
"""The exit code that makes Claude Code not run the call. Claude Code ignores other failures of a
hook."""
MAX_INPUT_CHARS = 250_000
"""The longest input of a call, as JSON, for which the user can be asked. Claude Code was tried with
this length; it searches for a deferred call only near the end of its session."""
MAX_DEPTH = 24
"""The deepest input of a call that a question can show."""

ONE_AT_A_TIME = (
    "This call was not run. It needs the user's permission, and the user is asked about one call at"
    " a time. Call the tool again, alone, once the other call has its answer."
)
USED = (
    "This call was not run again. The user allowed it once, and it may have run already. Look at"
    " what it changes before you call the tool again."
)
NOT_IN_SUBAGENTS = (
    "This call was not run. It needs the user's permission, which only the main agent can ask for."
    " End your task now and report which call is needed."
)
NOT_SHOWN = (
    "This call was not run. It needs the user's permission, and its input is too large or cannot be"
    " shown to the user. Divide it into smaller calls."
)


def main(arguments: list[str]) -> int:
    """Decide about the call on standard input; return the exit code."""
    try:
        folder, turn = arguments
        with open(f"{folder}/{turn}.json", encoding="utf-8") as file:  # noqa: PTH123
            rules: Json = json.load(file)
        call: Json = json.loads(sys.stdin.buffer.read())
        answer = decide(call, rules, folder, turn)
        if answer is not None:
            said = {"hookSpecificOutput": {"hookEventName": "PreToolUse", **answer}}
            sys.stdout.write(json.dumps(said))
            sys.stdout.flush()
    except BaseException as error:  # noqa: BLE001 - whatever it is, the call must not run
        sys.stderr.write(f"runrecovery cannot decide about this call: {error!r}"[:500])
        return BLOCK
    return 0


def decide(call: Json, rules: Json, folder: str, turn: str) -> Json | None:
    """Return the answer to Claude Code; None: Claude Code decides by its own rules.

    Args:
        call: the description of the call by Claude Code.
        rules: `patterns`; `deferred`, the ids of calls that were deferred in earlier turns; and
            `grant`, the answer of the user: `name` (of the file that marks the answer as used),
            `call_id` (None: the answer is for a repetition of the call), `tool`, `input`, `answer`.
        folder: the folder of the hook's files.
        turn: the number of the turn, which is part of the names of the turn's files.
    """
    key, tool, given = call["tool_use_id"], call["tool_name"], call["tool_input"]
    grant: Json | None = rules["grant"]
    is_old = key in rules["deferred"]
    if grant is not None and _is_granted(grant, key, tool, given, is_old=is_old):
        if _create(f"{folder}/{grant['name']}", key):
            answer: Json = grant["answer"]
            return answer
        return _deny(USED)
    if is_old:  # Claude Code returns to this call before it reads its prompt
        return {"permissionDecision": "defer"}
    if first_match(rules["patterns"], tool, given) is None:
        return None
    if call.get("agent_id"):
        return _deny(NOT_IN_SUBAGENTS)
    if not can_be_shown(given, call["session_id"]):
        return _deny(NOT_SHOWN)
    mark = f"{folder}/{turn}.asked"
    if _create(mark, key) or _content(mark) == key:
        return {"permissionDecision": "defer"}
    return _deny(ONE_AT_A_TIME)


def _is_granted(grant: Json, key: str, tool: str, given: object, *, is_old: bool) -> bool:
    same = (grant["tool"], grant["input"]) == (tool, given)
    return same and (not is_old if grant["call_id"] is None else grant["call_id"] == key)


def can_be_shown(given: object, session: str) -> bool:
    """Return whether a question can show the input of a call, which must lack the secret id."""
    try:
        text = json.dumps(given, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, RecursionError):  # also for a character that is not Unicode
        return False
    return len(text) <= MAX_INPUT_CHARS and _depth(given) <= MAX_DEPTH and session not in text


def _depth(value: object) -> int:
    if isinstance(value, dict):
        return 1 + max(map(_depth, value.values()), default=0)
    if isinstance(value, list):
        return 1 + max(map(_depth, value), default=0)
    return 0


def _deny(reason: str) -> Json:
    return {"permissionDecision": "deny", "permissionDecisionReason": reason}


def _create(path: str, content: str) -> bool:
    """Create a file durably; return False if it exists. Only one process can create it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return False
    try:
        os.write(descriptor, content.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    folder = os.open(os.path.dirname(path), os.O_RDONLY | os.O_CLOEXEC)  # noqa: PTH120
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return True


def _content(path: str) -> str:
    with open(path, encoding="utf-8") as file:  # noqa: PTH123
        return file.read()
