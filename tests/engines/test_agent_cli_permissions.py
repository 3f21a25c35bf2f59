"""Permission questions of Claude Code: its arguments, and the question of a deferred call."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from engines.agent_cli_turns import ID, messages_of, permission_answer, resumed, task
from runrecovery_service.domain.interruption import Interruption, InterruptionCause
from runrecovery_service.domain.run import (
    ErrorCode,
    InteractionKind,
    JsonObject,
    JsonValue,
    Option,
    Question,
    Session,
    ToolCall,
)
from runrecovery_service.engines.claude import CLAUDE
from runrecovery_service.engines.cli_dialect import CliListener
from runrecovery_service.engines.dialect import (
    AskMessage,
    Message,
    Opening,
    ResultMessage,
    Resumed,
)
from runrecovery_service.engines.permissions import LEAST_VERSION, Permissions
from support.questions import NOW

ASKS = replace(CLAUDE, permissions=Permissions(patterns=("Bash(rm *)",)))
RM: JsonObject = {"command": "rm -r build", "description": "ü"}


def deferred(key: str = "toolu_1", tool: str = "Bash", given: JsonValue = None) -> JsonObject:
    """Return the last event of a turn that a hook ended."""
    return {
        "type": "result",
        "subtype": "success",
        "is_error": False,
        "result": "",
        "stop_reason": "tool_deferred",
        "session_id": ID,
        "deferred_tool_use": {"id": key, "name": tool, "input": RM if given is None else given},
    }


def called(key: str) -> JsonObject:
    """Return the event of a call of a tool."""
    block: JsonObject = {"type": "tool_use", "id": key, "name": "Bash", "input": {}}
    return {"type": "assistant", "message": {"content": [block]}, "parent_tool_use_id": None}


def listener_of(opening: Opening) -> CliListener:
    assert isinstance(opening.listener, CliListener)
    return opening.listener


def asked(*events: JsonObject) -> list[Message]:
    """Return the messages of a first turn with these events."""
    return messages_of(listener_of(ASKS.open(task({"prompt": "x"}), None)), events)


def test_a_first_turn_gets_the_hook_and_its_rules() -> None:
    opening = ASKS.open(task({"prompt": "x"}, turn=3), None)

    *others, option, settings = opening.arguments
    (path,) = opening.files
    assert others[-2:] == ["--session-id", opening.handle]
    assert option == "--settings"
    assert json.loads(settings)["disableAllHooks"] is False
    assert path == Path("/p/3.json")
    rules = json.loads(opening.files[path])
    assert rules == {"patterns": ["Bash(rm *)"], "deferred": [], "grant": None}
    assert opening.least_version == LEAST_VERSION
    assert opening.input.endswith(b"Your task:\n\nx\n")


def test_an_engine_that_does_not_ask_gets_no_hook() -> None:
    opening = CLAUDE.open(task({"prompt": "x"}), None)

    assert "--settings" not in opening.arguments
    assert (opening.files, opening.least_version) == ({}, None)


def test_a_deferred_call_is_a_question_with_the_call() -> None:
    messages = asked(called("toolu_0"), called("toolu_1"), deferred())

    assert messages == [
        AskMessage(
            question=Question(
                kind=InteractionKind.RISK_ACK,
                prompt="The agent asks for permission to call Bash, because the call matches"
                ' Bash(rm *) of ask_for.\n\n{\n  "command": "rm -r build",\n  "description": "ü"\n}'
                "\n\nIt works in /w.",
                options=(Option(label="Allow", value="allow"), Option(label="Deny", value="deny")),
                tool_call=ToolCall(
                    id="toolu_1", tool="Bash", input=RM, workspace="/w", pattern="Bash(rm *)"
                ),
            )
        )
    ]


def test_a_call_that_others_followed_is_marked() -> None:
    (message,) = asked(called("toolu_1"), called("toolu_2"), deferred())

    assert isinstance(message, AskMessage)
    assert message.question.tool_call is not None
    assert not message.question.tool_call.is_last


@pytest.mark.parametrize(
    "event",
    [
        deferred(tool="Write"),
        deferred(given={"command": "ls"}),
        deferred(given={"command": f"rm {ID}"}),
        deferred(given={"command": "rm " + "x" * 300_000}),
        deferred(given={"command": "rm \ud800"}),
        deferred("toolu_old"),
        deferred("toolu_\ud800"),
    ],
    ids=[
        "another tool",
        "another command",
        "names the session",
        "long",
        "no text",
        "earlier",
        "no text as its id",
    ],
)
def test_a_call_that_our_hook_cannot_have_deferred_fails_the_turn(event: JsonObject) -> None:
    reply = resumed(ASKS, permission_answer("allow", given=RM))
    listener = listener_of(ASKS.open(task({}, deferred=["toolu_old"]), reply))

    assert messages_of(listener, [event]) == []
    error = listener.failure(0, "")
    assert error is not None
    assert error.code == ErrorCode.ENGINE_FAILED
    assert "A hook deferred its call of the tool" in error.message


def test_a_prompt_is_read_after_the_cli_has_returned_to_an_earlier_call() -> None:
    reply = resumed(ASKS, permission_answer("allow", given=RM, is_last=False))
    opening = ASKS.open(task({}, deferred=["toolu_1"]), reply)
    listener = listener_of(opening)
    done: JsonObject = {
        "type": "result", "subtype": "success", "is_error": False, "result": "Done."
    }  # fmt: skip

    assert messages_of(listener, [deferred()]) == []
    assert listener.failure(0, "") is None
    assert messages_of(listener, [done]) == [ResultMessage(output={"text": "Done."})]
    assert opening.input.decode() == (
        "The user allowed your call of Bash. It has not run, because you made it together with"
        " other calls. Call Bash now, alone, with exactly this input:\n\n"
        '{\n  "command": "rm -r build",\n  "description": "ü"\n}\n'
    )


def test_an_answer_resumes_without_a_prompt_and_with_the_call_in_the_rules() -> None:
    reply = permission_answer({"decision": "deny", "reason": "Ask Ann."}, given=RM)

    for dialect, patterns in ((ASKS, ["Bash(rm *)"]), (CLAUDE, [])):
        run = task({"prompt": "x"}, turn=2, deferred=["toolu_1"])
        opening = dialect.open(run, resumed(dialect, reply))

        assert opening.input == b""
        assert opening.arguments[-4:-1] == ("--resume", ID, "--settings")
        assert json.loads(opening.files[Path("/p/2.json")]) == {
            "patterns": patterns,
            "deferred": ["toolu_1"],
            "grant": {
                "name": "1.used",
                "call_id": "toolu_1",
                "tool": "Bash",
                "input": RM,
                "answer": {
                    "permissionDecision": "deny",
                    "permissionDecisionReason": "The user refused this call: Ask Ann.",
                },
            },
        }
        assert opening.least_version == LEAST_VERSION


@pytest.mark.parametrize(
    ("response", "told"),
    [
        ("allow", "The user allowed your call of Bash with this input:\n\n{}\n"),
        (
            {"decision": "allow", "input": {"a": 1}},
            (
                "The user allowed your call of Bash with this input:\n\n{}\n\n"
                'but with this input:\n\n{\n  "a": 1\n}\n'
            ),
        ),
        ("deny", "The user refused your call of Bash with this input:\n\n{}\n"),
        (
            {"decision": "deny", "reason": "no"},
            "The user refused your call of Bash with this input:\n\n{}\n\nfor this reason: no\n",
        ),
    ],
)
def test_a_notice_names_the_answer_that_the_interrupted_process_had(
    response: JsonValue, told: str
) -> None:
    interruption = Interruption(
        at=NOW,
        cause=InterruptionCause.RESTART,
        times=1,
        reply=permission_answer(response, given={}),
    )
    session = Session(type="claude", handle=ID, turn=1)
    run = task({}, turn=3, deferred=["toolu_1"])

    opening = ASKS.open(run, Resumed(session=session, interruption=interruption))

    assert opening.input.decode().endswith(f"in case it is missing above:\n\n{told}")
    rules = json.loads(opening.files[Path("/p/3.json")])
    assert (rules["deferred"], rules["grant"]) == (["toolu_1"], None)


def test_a_session_that_has_lost_its_call_is_a_lost_session() -> None:
    reply = resumed(ASKS, permission_answer("allow", given=RM))
    listener = listener_of(ASKS.open(task({}), reply))

    error = listener.failure(1, "Error: No deferred tool marker found in the resumed session.")

    assert error is not None
    assert error.code == ErrorCode.SESSION_RESUME_FAILED
