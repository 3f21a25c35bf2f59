"""The kept output gives an end of a turn only if a living process would have ended the same way."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from runrecovery_service.agents.output import OutputChannel, OutputFiles
from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.domain.found_end import FoundEnd
from runrecovery_service.domain.run import (
    InteractionKind,
    JsonObject,
    Profile,
    Question,
    Run,
    RunStatus,
    Session,
    ToolCall,
)
from runrecovery_service.domain.turn import Asked, Succeeded
from runrecovery_service.domain.usage import Budget, Usage
from runrecovery_service.engines.catalog import Catalog, Engine
from runrecovery_service.engines.claude import CLAUDE
from runrecovery_service.engines.codex import CODEX
from runrecovery_service.engines.dialect import Dialect
from runrecovery_service.engines.gemini import GEMINI
from runrecovery_service.engines.jsonl import JSON_LINES
from runrecovery_service.engines.permissions import Permissions
from runrecovery_service.execution import found_ends
from runrecovery_service.execution.found_ends import EndFinder
from runrecovery_service.process.shim_journal import record_kept
from runrecovery_service.storage.found_ends import OpenTurn

from .conftest import Execution, NewExecution

HANDLE: Final = "01a2224f-ff16-7cb2-8eb4-59969e2c0c53"
ANOTHER: Final = "01a2224f-ff16-7cb2-8eb4-000000000000"
HIDDEN: Final = "[secret]"
SHIM: Final = (70, 900)

RESULT: Final[JsonObject] = {"type": "result", "output": {"a": 1}}
QUESTION: Final[JsonObject] = {"type": "ask", "kind": "confirm", "prompt": "Ship?"}
SESSION: Final[JsonObject] = {"type": "session", "value": HIDDEN}
SUCCEEDED: Final = Succeeded({"a": 1})
ASKED: Final = Asked(Question(kind=InteractionKind.CONFIRM, prompt="Ship?", options=()))

CODEX_SESSION: Final[JsonObject] = {"type": "thread.started", "thread_id": HIDDEN}
GEMINI_SESSION: Final[JsonObject] = {"type": "init", "session_id": HIDDEN}


def codex(text: str) -> list[JsonObject]:
    item: JsonObject = {"type": "agent_message", "text": text}
    return [{"type": "item.completed", "item": item}, {"type": "turn.completed"}]


def gemini(text: str) -> list[JsonObject]:
    said: JsonObject = {"type": "message", "role": "assistant", "content": text, "delta": True}
    return [said, {"type": "result", "status": "success"}]


def claude(text: str) -> list[JsonObject]:
    return [
        {"type": "system", "subtype": "init", "session_id": HIDDEN},
        {"type": "result", "subtype": "success", "is_error": False, "result": text},
    ]


class Attempt:
    """The files of one attempt, as a service and its shim leave them."""

    def __init__(self, place: Path) -> None:
        self.workspaces = Workspaces(place / "runs")
        self.workspaces.prepare(1, 1, fresh=True)
        self.output = OutputFiles(self.workspaces, max_bytes=1 << 20)
        self.journal = self.workspaces.shim_journal(1, 1, 1)
        self.size = 0

    def keep(self, *events: JsonObject | str, end: str = "\n") -> None:
        lines = [each if isinstance(each, str) else json.dumps(each) for each in events]
        data = ("\n".join(lines) + end).encode()
        self.output.append(1, 1, OutputChannel.STDOUT, data)
        self.size += len(data)

    def exit(self, code: int = 0) -> None:
        pid, ticks = SHIM
        with self.journal.open("a") as journal:
            entry = {"event": "agent.exited", "code": code, "by": pid, "by_start_ticks": ticks}
            journal.write(json.dumps(entry) + "\n")

    def close_output(self, *, begin: int = 0) -> None:
        with self.journal.open("a"):
            pass
        record_kept(self.journal, SHIM, begin=begin, end=self.size)

    def find(self, dialect: Dialect = JSON_LINES, **changes: Any) -> FoundEnd | None:
        engine = Engine(
            name="agent",
            command=("agent",),
            profile=Profile.RESUMABLE,
            dialect=dialect,
            env_allow=(),
            max_concurrent=None,
            session_file=None,
            session_timeout_s=600.0,
        )
        finder = EndFinder(
            catalog=Catalog([engine]),
            workspaces=self.workspaces,
            output=self.output,
            boot_id="boot",
        )
        return finder.find(replace(turn_of(dialect), **changes))


def turn_of(dialect: Dialect) -> OpenTurn:
    return OpenTurn(
        run_key=1,
        run_id="run",
        engine="agent",
        profile=Profile.RESUMABLE,
        attempt=1,
        turn=1,
        session=Session(type=dialect.session_type, handle=HANDLE, turn=1),
        boot_id="boot",
        shim=SHIM,
        session_timeout_s=None,
        require_user_reply=True,
    )


@pytest.fixture
def attempt(tmp_path: Path) -> Attempt:
    return Attempt(tmp_path)


def found(
    attempt: Attempt, events: Sequence[JsonObject | str], dialect: Dialect, **turn: Any
) -> Any:
    """Return the end that is found for a process that printed these events and exited with 0."""
    attempt.keep(*events)
    attempt.close_output()
    attempt.exit()
    end = attempt.find(dialect, **turn)
    return None if end is None else end.end


# -- outputs with an end
# ---------------------------------------------------------------------------------

DONE: Final = '{"result": {"a": 1}}'
ASK: Final = '{"ask_user": {"prompt": "Ship?", "kind": "confirm"}}'


@pytest.mark.parametrize(
    ("dialect", "events", "expected"),
    [
        (JSON_LINES, [SESSION, RESULT], SUCCEEDED),
        (JSON_LINES, [RESULT, {"type": "progress", "message": "m"}, RESULT], SUCCEEDED),
        (JSON_LINES, [SESSION, QUESTION], ASKED),
        (CODEX, [CODEX_SESSION, *codex(DONE)], SUCCEEDED),
        (CODEX, [CODEX_SESSION, *codex(DONE), *codex(ASK)], ASKED),
        (CODEX, ["a warning", CODEX_SESSION, *codex(ASK), *codex(DONE)], SUCCEEDED),
        (GEMINI, [GEMINI_SESSION, *gemini(DONE)], SUCCEEDED),
        (GEMINI, [GEMINI_SESSION, *gemini(ASK)], ASKED),
        (CLAUDE, [*claude("I have begun."), *claude(DONE)], SUCCEEDED),
        (CLAUDE, claude(ASK), ASKED),
    ],
)
def test_the_last_result_or_question_counts(
    attempt: Attempt, dialect: Dialect, events: list[JsonObject | str], expected: object
) -> None:
    assert found(attempt, events, dialect) == expected


@pytest.mark.parametrize(
    ("dialect", "events"),
    [
        (CODEX, [CODEX_SESSION, *codex(DONE)]),
        (GEMINI, [GEMINI_SESSION, *gemini(DONE)]),
        (CLAUDE, claude(DONE)),
    ],
)
def test_a_resumed_session_that_is_named_again_is_the_same(
    attempt: Attempt, dialect: Dialect, events: list[JsonObject | str]
) -> None:
    attempt.journal = attempt.workspaces.shim_journal(1, 1, 2)

    assert found(attempt, events, dialect, turn=2) == SUCCEEDED


def test_a_result_that_quotes_the_handle_hides_it_as_in_a_living_turn(
    attempt: Attempt,
) -> None:
    events = [CODEX_SESSION, *codex(json.dumps({"result": {"id": HIDDEN}}))]

    assert found(attempt, events, CODEX) == Succeeded({"id": HIDDEN})


def test_a_session_that_is_not_on_record_does_not_matter_to_a_result(attempt: Attempt) -> None:
    assert found(attempt, [CODEX_SESSION, *codex(DONE)], CODEX, session=None) == SUCCEEDED


def test_a_last_line_without_a_newline_counts(attempt: Attempt) -> None:
    attempt.keep(RESULT, end="")
    attempt.close_output()
    attempt.exit()

    assert attempt.find() == FoundEnd(end=SUCCEEDED)


def test_only_the_part_of_the_turn_is_read(attempt: Attempt) -> None:
    attempt.keep({"type": "result", "output": {"of": "an earlier turn"}})
    begin = attempt.size
    attempt.keep(RESULT)
    attempt.close_output(begin=begin)
    attempt.keep({"type": "result", "output": {"of": "somebody else"}})
    attempt.exit()

    assert attempt.find() == FoundEnd(end=SUCCEEDED)


@pytest.mark.parametrize(
    ("changes", "wait_s"),
    [
        ({}, None),
        ({"require_user_reply": False}, 600.0),
        ({"require_user_reply": False, "session_timeout_s": 5.0}, 5.0),
    ],
)
def test_a_question_that_need_not_be_answered_has_its_wait(
    attempt: Attempt, changes: dict[str, Any], wait_s: float | None
) -> None:
    attempt.keep(SESSION, QUESTION)
    attempt.close_output()
    attempt.exit()

    assert attempt.find(**changes) == FoundEnd(end=ASKED, wait_s=wait_s)


BASH: Final[JsonObject] = {"command": "make ship"}
ASKING: Final = replace(CLAUDE, permissions=Permissions(patterns=("Bash",)))
"""Claude Code that asks before it calls Bash."""


def deferral(call: str, tool: str = "Bash", given: JsonObject = BASH) -> list[JsonObject]:
    held: JsonObject = {"id": call, "name": tool, "input": given}
    return [
        {"type": "system", "subtype": "init", "session_id": HIDDEN},
        {"type": "assistant", "message": {"content": [{"type": "tool_use", **held}]}},
        {"type": "result", "stop_reason": "tool_deferred", "deferred_tool_use": held},
    ]


def defer_before(attempt: Attempt, *, turn: int, call: str) -> None:
    """Create the file in which the hook of a turn notes the call that it has deferred."""
    folder = attempt.workspaces.permissions(1, 1)
    folder.mkdir(exist_ok=True)
    (folder / f"{turn}.asked").write_text(call)


def test_a_question_for_permission_is_found_with_its_call(attempt: Attempt) -> None:
    defer_before(attempt, turn=1, call="c1")

    end = found(attempt, deferral("c1"), ASKING)

    assert isinstance(end, Asked)
    assert end.question.kind is InteractionKind.RISK_ACK
    assert end.question.tool_call == ToolCall(
        id="c1",
        tool="Bash",
        input=BASH,
        workspace=str(attempt.workspaces.workspace(1, 1)),
        pattern="Bash",
        is_last=True,
    )


def test_a_result_after_a_call_that_was_deferred_in_an_earlier_turn_is_found(
    attempt: Attempt,
) -> None:
    attempt.journal = attempt.workspaces.shim_journal(1, 1, 2)
    defer_before(attempt, turn=1, call="c1")

    assert found(attempt, [*deferral("c1"), *claude(DONE)], ASKING, turn=2) == SUCCEEDED


@pytest.mark.parametrize(
    ("most", "is_last"),
    [(Budget(), False), (Budget(max_tokens=10), True), (Budget(max_tokens=11), False)],
)
def test_a_question_of_a_run_that_has_reached_its_budget_is_its_last(
    attempt: Attempt, *, most: Budget, is_last: bool
) -> None:
    used: JsonObject = {"type": "usage", "input_tokens": 3, "output_tokens": 1}
    attempt.keep(SESSION, used, QUESTION)
    attempt.close_output()
    attempt.exit()

    end = attempt.find(budget=most, used_before=Usage(input_tokens=5, output_tokens=1))

    assert end is not None
    assert (end.end, end.is_last) == (ASKED, is_last)


# -- outputs without an end
# -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "events"),
    [
        (JSON_LINES, [SESSION]),
        (JSON_LINES, [RESULT, {"type": "result", "output": {"a": True}}]),
        (JSON_LINES, [RESULT, SESSION, QUESTION]),
        (JSON_LINES, [RESULT, "no JSON"]),
        (JSON_LINES, [SESSION, SESSION, QUESTION]),
        (CODEX, [CODEX_SESSION, *codex(DONE), {"type": "turn.started"}]),
        (CODEX, [CODEX_SESSION, *codex(DONE), {"type": "turn.failed", "error": {"message": "x"}}]),
        (GEMINI, [GEMINI_SESSION, {"type": "result", "status": "error", "error": {}}]),
        (CLAUDE, [*claude(DONE), {"type": "result", "subtype": "error_during_execution"}]),
    ],
)
def test_an_output_with_which_a_living_process_would_fail_has_no_end(
    attempt: Attempt, dialect: Dialect, events: list[JsonObject | str]
) -> None:
    assert found(attempt, events, dialect) is None


@pytest.mark.parametrize(
    ("dialect", "events"),
    [
        (CLAUDE, deferral("c1")),
        (ASKING, deferral("c1", "Read")),
        (ASKING, deferral("c1", given={"command": f"cat {HIDDEN}"})),
    ],
    ids=["does not ask", "asks for another tool", "shows the session"],
)
def test_a_deferred_call_that_the_service_would_not_ask_about_has_no_end(
    attempt: Attempt, dialect: Dialect, events: list[JsonObject | str]
) -> None:
    assert found(attempt, events, dialect) is None


@pytest.mark.parametrize("turn", [1, 2])
def test_a_call_is_asked_for_once(attempt: Attempt, turn: int) -> None:
    attempt.journal = attempt.workspaces.shim_journal(1, 1, turn)
    defer_before(attempt, turn=1, call="c1")

    end = found(attempt, deferral("c1"), ASKING, turn=turn)

    assert isinstance(end, Asked) is (turn == 1)


def test_a_turn_that_resumed_another_session_has_failed(attempt: Attempt) -> None:
    attempt.journal = attempt.workspaces.shim_journal(1, 1, 2)
    another: JsonObject = {"type": "thread.started", "thread_id": ANOTHER}

    assert found(attempt, [another, *codex(DONE)], CODEX, turn=2) is None


def test_a_question_in_a_session_that_was_not_recorded_cannot_be_asked(attempt: Attempt) -> None:
    attempt.journal = attempt.workspaces.shim_journal(1, 1, 2)

    assert found(attempt, [SESSION, QUESTION], JSON_LINES, turn=2) is None


def test_a_session_of_another_type_is_not_used(attempt: Attempt) -> None:
    session = Session(type="codex", handle=HANDLE, turn=1)

    assert found(attempt, claude(ASK), CLAUDE, session=session) is None


def test_a_sticky_process_that_has_asked_has_no_end(attempt: Attempt) -> None:
    """The output does not show whether the reply came between the question and the result."""
    turn = {"profile": Profile.STICKY_PROCESS}

    assert found(attempt, [QUESTION, RESULT], JSON_LINES, **turn) is None


def test_an_id_that_was_hidden_before_the_session_was_known_cannot_be_restored(
    attempt: Attempt,
) -> None:
    events = codex(json.dumps({"result": {"id": HIDDEN}}))

    assert found(attempt, events, CODEX, session=None) is None


def test_nothing_is_found_without_every_proof(attempt: Attempt) -> None:
    attempt.keep(RESULT)
    assert attempt.find() is None
    attempt.exit()
    assert attempt.find() is None
    attempt.close_output()
    assert attempt.find() == FoundEnd(end=SUCCEEDED)

    assert attempt.find(boot_id="an earlier boot") is None
    assert attempt.find(shim=(70, 901)) is None
    assert attempt.find(engine="removed") is None
    assert attempt.find(turn=2) is None


def test_a_bad_exit_code_has_no_end(attempt: Attempt) -> None:
    attempt.keep(RESULT)
    attempt.close_output()
    attempt.exit(3)

    assert attempt.find() is None


def test_an_output_that_was_cut_has_no_end(attempt: Attempt) -> None:
    attempt.keep(RESULT)
    attempt.size += 1
    attempt.close_output()
    attempt.exit()

    assert attempt.find() is None


@pytest.mark.parametrize("bound", ["REREAD_BYTES", "REREAD_LINES"])
def test_an_output_that_is_too_long_is_not_read(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    attempt.keep(SESSION, RESULT)
    attempt.close_output()
    attempt.exit()
    most = {"REREAD_BYTES": attempt.size, "REREAD_LINES": 2}[bound]

    monkeypatch.setattr(found_ends, bound, most)
    assert attempt.find() == FoundEnd(end=SUCCEEDED)
    monkeypatch.setattr(found_ends, bound, most - 1)
    assert attempt.find() is None


def test_a_defect_of_a_parser_does_not_prevent_a_start(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(found_ends, "end_of_output", broken)

    assert found(attempt, [RESULT], JSON_LINES) is None


# -- real processes ------------------------------------------------------------------------------


def say(*events: JsonObject) -> str:
    return "\n".join(f"printf '%s\\n' '{json.dumps(event)}'" for event in events)


NAMED: Final[JsonObject] = {"type": "session", "value": "s1"}
LONG_LINE: Final = (
    'printf \'{"type":"p","m":"\'; head -c 70000 /dev/zero | tr \'\\0\' x; printf \'"}\\n\''
)
LIVE: Final[dict[str, tuple[str, bool]]] = {
    "result": (say(RESULT), True),
    "question": (say(NAMED, QUESTION), True),
    "bad exit": (say(RESULT) + "\nexit 3", False),
    "silent": ("true", False),
    "two ends": (say(RESULT, {"type": "result", "output": {}}), False),
    "held open": ("sleep 600 &\n" + say(RESULT), False),
    "cut off": ("i=0; while [ $i -lt 30 ]; do " + say({"type": "p", "m": "x" * 50_000})
                + "; i=$((i+1)); done\n" + say(RESULT), False),
}  # fmt: skip


@pytest.mark.parametrize("case", LIVE)
async def test_the_output_of_a_real_turn_gives_the_end_that_was_recorded(
    new_execution: NewExecution, case: str
) -> None:
    script, is_found = LIVE[case]
    execution = await new_execution(more=[shell(script)])
    run_id = await execution.create("agent")
    run = await execution.until_status(
        run_id, RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.WAITING_USER
    )

    end = await find(execution, run)

    if not is_found:
        assert end is None
    elif run.status is RunStatus.SUCCEEDED:
        assert end == FoundEnd(end=Succeeded(run.output or {}))
    else:
        assert end == FoundEnd(end=ASKED)


@pytest.mark.parametrize("lost", [0, 1])
async def test_nothing_is_found_if_a_part_of_the_output_could_not_be_kept(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch, lost: int
) -> None:
    append, appended = OutputFiles.append, list[int]()

    def failing(self: OutputFiles, *args: Any) -> int | None:
        appended.append(1)
        if len(appended) == lost + 1:
            raise OSError(errno.ENOSPC, "the disk is full for a moment")
        return append(self, *args)

    monkeypatch.setattr(OutputFiles, "append", failing)
    execution = await new_execution(more=[shell(f"{LONG_LINE}\n" * 5 + say(RESULT))])
    run_id = await execution.create("agent")
    run = await execution.until_status(run_id, RunStatus.SUCCEEDED, RunStatus.FAILED)

    assert run.status is RunStatus.SUCCEEDED
    assert len(appended) > lost + 1
    assert await find(execution, run) is None


def shell(script: str) -> Engine:
    return Engine(
        name="agent",
        command=("/bin/sh", "-c", script),
        profile=Profile.RESUMABLE,
        env_allow=("PATH",),
        max_concurrent=None,
        session_file=None,
        session_timeout_s=600.0,
    )


async def find(execution: Execution, run: Run) -> FoundEnd | None:
    launch = await execution.launch(run.run_id)
    finder = EndFinder(
        catalog=execution.catalog,
        workspaces=execution.launcher.workspaces,
        output=execution.output,
        boot_id="boot",
    )
    turn = replace(
        turn_of(JSON_LINES),
        run_key=run.key,
        session=Session(type="jsonl", handle="s1", turn=1),
        shim=(launch.shim.pid, launch.shim.start_ticks),
    )
    return finder.find(turn)
