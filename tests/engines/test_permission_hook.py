"""The permission hook as Claude Code runs it: a process for each call, by a shell."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from engines.agent_cli_turns import ID, permission_answer, resumed, task
from runrecovery_service.domain.run import Interaction, JsonObject, JsonValue
from runrecovery_service.engines.claude import CLAUDE
from runrecovery_service.engines.permission_hook import (
    NOT_IN_SUBAGENTS,
    NOT_SHOWN,
    ONE_AT_A_TIME,
    USED,
)
from runrecovery_service.engines.permissions import Permissions

Json: TypeAlias = dict[str, Any]

DEFER = {"permissionDecision": "defer"}
LS: JsonObject = {"command": "ls"}


def deny(reason: str) -> Json:
    return {"permissionDecision": "deny", "permissionDecisionReason": reason}


class Hook:
    """The hook of one turn."""

    def __init__(
        self,
        folder: Path,
        patterns: Sequence[str] = (),
        reply: Interaction | None = None,
        deferred: Sequence[str] = (),
    ) -> None:
        folder.mkdir(exist_ok=True)
        run = task({}, turn=2, permissions=str(folder), deferred=deferred)
        session = None if reply is None else resumed(CLAUDE, reply)
        hook = Permissions(patterns=tuple(patterns)).prepare(run, session)
        assert hook is not None
        for path, content in hook.files.items():
            path.write_bytes(content)
        (option, settings) = hook.arguments
        assert option == "--settings"
        ((entry,),) = (each["hooks"] for each in json.loads(settings)["hooks"]["PreToolUse"])
        self.command: str = entry["command"]

    def start(
        self, key: str = "toolu_1", tool: str = "Bash", given: JsonValue = None, **more: Any
    ) -> subprocess.Popen[str]:
        """Start the hook for a call, with the call on its standard input."""
        call = {
            "session_id": ID,
            "hook_event_name": "PreToolUse",
            "tool_name": tool,
            "tool_input": LS if given is None else given,
            "tool_use_id": key,
            **more,
        }
        return self.run(json.dumps(call))

    def run(self, text: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            ["sh", "-c", self.command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # a hook that cannot run reads nothing
            process.stdin.write(text)
            process.stdin.flush()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdin = None
        return process

    def decide(self, *call: Any, **more: Any) -> Json | None:
        """Return the decision about a call."""
        return decision_of(self.start(*call, **more))


def decision_of(process: subprocess.Popen[str]) -> Json | None:
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    if not out:
        return None
    found: Json = json.loads(out)["hookSpecificOutput"]
    assert found.pop("hookEventName") == "PreToolUse"
    return found


def test_a_call_that_matches_is_deferred_and_every_other_call_is_left_to_the_cli(
    tmp_path: Path,
) -> None:
    hook = Hook(tmp_path / "hook", ["Bash(ls*)", "Write"])

    assert hook.decide("toolu_1", "Read", {"file_path": "/etc/passwd"}) is None
    assert hook.decide("toolu_2", "Bash", {"command": "pwd"}) is None
    assert hook.decide("toolu_3", "Bash", {"command": "ls -l"}) == DEFER
    assert hook.decide("toolu_3", "Bash", {"command": "ls -l"}) == DEFER
    assert hook.decide("toolu_4", "Write", {"file_path": "a"}) == deny(ONE_AT_A_TIME)


def test_of_parallel_calls_exactly_one_is_deferred(tmp_path: Path) -> None:
    hook = Hook(tmp_path / "hook", ["Bash"])

    started = [hook.start(f"toolu_{number}") for number in range(8)]
    decisions = [decision_of(process) for process in started]

    assert sorted(decisions, key=str) == [DEFER, *[deny(ONE_AT_A_TIME)] * 7]


@pytest.mark.parametrize(
    ("response", "decision"),
    [
        ("allow", {"permissionDecision": "allow"}),
        (
            {"decision": "allow", "input": {"command": "ls /"}},
            {"permissionDecision": "allow", "updatedInput": {"command": "ls /"}},
        ),
        ("deny", deny("The user refused this call.")),
        (
            {"decision": "deny", "reason": "Ask Ann first."},
            deny("The user refused this call: Ask Ann first."),
        ),
    ],
)
def test_the_answer_is_given_once_and_to_no_other_call(
    tmp_path: Path, response: JsonValue, decision: Json
) -> None:
    folder = tmp_path / "hook"
    hook = Hook(folder, ["Bash"], permission_answer(response, given=LS))
    used = folder / "1.used"

    assert hook.decide("toolu_2") == DEFER
    assert hook.decide("toolu_1", "Bash", {"command": "rm"}) == deny(ONE_AT_A_TIME)
    assert not used.exists()
    assert hook.decide("toolu_1") == decision
    assert used.read_text() == "toolu_1"
    assert hook.decide("toolu_1") == deny(USED)


def test_an_answer_that_was_used_in_an_earlier_turn_is_not_given_again(tmp_path: Path) -> None:
    folder = tmp_path / "hook"
    first = Hook(folder, ["Bash"], permission_answer("allow", given=LS))
    first.decide("toolu_1")

    again = Hook(folder, ["Bash"], permission_answer("allow", given=LS))

    assert again.decide("toolu_1") == deny(USED)


def test_parallel_hooks_give_the_answer_once(tmp_path: Path) -> None:
    hook = Hook(tmp_path / "hook", ["Bash"], permission_answer("allow", given=LS))

    started = [hook.start("toolu_1") for _ in range(6)]
    decisions = [decision_of(process) for process in started]

    assert sorted(decisions, key=str) == [{"permissionDecision": "allow"}, *[deny(USED)] * 5]


def test_a_call_that_others_followed_is_deferred_again_and_its_repetition_runs_once(
    tmp_path: Path,
) -> None:
    reply = permission_answer("allow", given=LS, is_last=False)
    hook = Hook(tmp_path / "hook", ["Bash"], reply, ["toolu_1"])

    assert hook.decide("toolu_1") == DEFER
    assert hook.decide("toolu_1") == DEFER
    assert hook.decide("toolu_2") == {"permissionDecision": "allow"}
    assert hook.decide("toolu_3") == deny(USED)
    assert hook.decide("toolu_4", "Bash", {"command": "pwd"}) == DEFER


def test_the_repetition_of_a_call_runs_with_the_input_that_the_user_allowed(
    tmp_path: Path,
) -> None:
    changed: JsonValue = {"decision": "allow", "input": {"command": "pwd"}}
    reply = permission_answer(changed, given=LS, is_last=False)
    hook = Hook(tmp_path / "hook", ["Bash"], reply, ["toolu_1"])

    assert hook.decide("toolu_2", "Bash", {"command": "pwd"}) == {"permissionDecision": "allow"}
    assert hook.decide("toolu_3") == DEFER


def test_the_refusal_of_a_call_that_others_followed_is_in_the_prompt_and_not_in_the_hook(
    tmp_path: Path,
) -> None:
    reply = permission_answer("deny", given=LS, is_last=False)
    hook = Hook(tmp_path / "hook", ["Bash"], reply, ["toolu_1"])

    assert hook.decide("toolu_1") == DEFER
    assert hook.decide("toolu_2") == DEFER


def test_a_question_that_nobody_answered_denies_the_call(tmp_path: Path) -> None:
    reply = permission_answer(None, given=LS, auto_decided=True)
    hook = Hook(tmp_path / "hook", ["Bash"], reply)

    decision = hook.decide("toolu_1")

    assert decision is not None
    assert decision["permissionDecision"] == "deny"
    assert "Nobody answered in time" in decision["permissionDecisionReason"]


def test_an_engine_that_asks_no_more_still_gives_an_answer(tmp_path: Path) -> None:
    hook = Hook(tmp_path / "hook", [], permission_answer("deny", given=LS))

    assert hook.decide("toolu_2") is None
    assert hook.decide("toolu_1") == deny("The user refused this call.")


@pytest.mark.parametrize(
    ("given", "more", "reason"),
    [
        (LS, {"agent_id": "sub"}, NOT_IN_SUBAGENTS),
        ({"content": "x" * 300_000}, {}, NOT_SHOWN),
        ({"content": f"resume {ID}"}, {}, NOT_SHOWN),
        ({"content": "\ud800"}, {}, NOT_SHOWN),
        (json.loads("[" * 40 + "]" * 40), {}, NOT_SHOWN),
    ],
    ids=["subagent", "long", "names the session", "no text", "deep"],
)
def test_a_call_that_cannot_be_asked_for_is_denied(
    tmp_path: Path, given: JsonValue, more: Json, reason: str
) -> None:
    hook = Hook(tmp_path / "hook", ["Bash"])

    assert hook.decide("toolu_1", "Bash", given, **more) == deny(reason)
    assert hook.decide("toolu_2") == DEFER


@pytest.mark.parametrize("text", ["", "not JSON", "[]", "{}", '{"tool_name": "Bash"}'])
def test_a_call_that_cannot_be_read_is_blocked(tmp_path: Path, text: str) -> None:
    process = Hook(tmp_path / "hook", ["Bash"]).run(text)

    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 2


def break_rules(folder: Path) -> None:
    (folder / "2.json").write_text("{")


def remove_rules(folder: Path) -> None:
    (folder / "2.json").unlink()


def forbid_marks(folder: Path) -> None:
    (folder / "2.asked").mkdir()  # so that root fails too


@pytest.mark.parametrize("damage", [break_rules, remove_rules, forbid_marks])
def test_a_hook_without_its_data_blocks_the_call(tmp_path: Path, damage: Any) -> None:
    folder = tmp_path / "hook"
    hook = Hook(folder, ["Bash"])
    damage(folder)

    process = hook.start()

    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 2


@pytest.mark.parametrize("how", ["program", "interpreter", "signal"])
def test_a_hook_that_cannot_run_blocks_the_call(tmp_path: Path, how: str) -> None:
    hook = Hook(tmp_path / "hook", ["Bash"])
    if how == "program":
        hook.command = hook.command.replace("permission_hook_main.py", "gone.py")
    elif how == "interpreter":
        hook.command = hook.command.replace(sys.executable, "/gone/python")
    else:
        kills_itself = f"{sys.executable} -c 'import os; os.kill(os.getpid(), 9)'"
        hook.command = hook.command.replace(f"{sys.executable} -I", kills_itself)

    process = hook.start()

    assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 2


def test_the_hook_needs_only_light_parts_of_the_standard_library(tmp_path: Path) -> None:
    # It runs before every call of a tool.
    hook = Hook(tmp_path / "hook", ["Bash"])
    hook.command = hook.command.replace(" -I ", " -I -X importtime ")

    _, errors = hook.start("toolu_1").communicate(timeout=60)

    imported = {line.rpartition("|")[2].strip() for line in errors.splitlines()}
    assert "runrecovery_service.engines.tool_patterns" in imported
    heavy = {"dataclasses", "pathlib", "typing", "asyncio", "subprocess", "logging"}
    assert imported & heavy == set()
