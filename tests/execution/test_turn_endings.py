"""The last question or result before the process ends is the end of its turn, in every dialect."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any, Final

import pytest
from runrecovery_service.domain.run import JsonObject, Profile, Run, RunStatus
from runrecovery_service.engines import cli_dialect
from runrecovery_service.engines.catalog import Engine
from runrecovery_service.engines.claude import CLAUDE
from runrecovery_service.engines.cli_dialect import CliDialect
from runrecovery_service.engines.codex import CODEX
from runrecovery_service.engines.dialect import Dialect
from runrecovery_service.engines.gemini import GEMINI
from runrecovery_service.engines.jsonl import JSON_LINES
from runrecovery_service.execution import agent_io, turn_state
from runrecovery_service.storage import interactions

from .conftest import NewExecution, until

HANDLE: Final = "01a2224f-ff16-7cb2-8eb4-59969e2c0c53"
ASK: Final = '{"ask_user": {"prompt": "Deploy?"}}'
DONE: Final = '{"result": {"done": true}}'
INTERIM: Final = "I have started 2 background agents."


def engine(script: str, dialect: Dialect = JSON_LINES, **changes: Any) -> Engine:
    """Return an engine whose process is a shell script."""
    facts: dict[str, Any] = {
        "name": "agent",
        "command": ("/bin/sh", "-c", script, "agent"),
        "profile": Profile.RESUMABLE,
        "dialect": dialect,
        "env_allow": ("PATH",),
        "max_concurrent": None,
        "session_file": None,
        "session_timeout_s": 600.0,
    }
    return Engine(**facts | changes)


def say(*events: JsonObject) -> str:
    """Return a command that prints events, one per line."""
    return "\n".join(f"printf '%s\\n' '{json.dumps(event)}'" for event in events)


async def end_of(new_execution: NewExecution, agent: Engine) -> Run:
    execution = await new_execution(more=[agent])
    run_id = await execution.create("agent")
    return await execution.until_status(
        run_id, RunStatus.SUCCEEDED, RunStatus.FAILED, RunStatus.WAITING_USER
    )


def code_of(run: Run) -> str | None:
    return None if run.error is None else run.error.code


def codex_turn(text: str) -> list[JsonObject]:
    return [
        {"type": "turn.started"},
        {"type": "item.completed", "item": {"type": "agent_message", "text": text}},
        {"type": "turn.completed"},
    ]


def gemini_turn(text: str) -> list[JsonObject]:
    pieces: list[JsonObject] = [
        {"type": "message", "role": "assistant", "content": piece, "delta": True}
        for piece in (text[:7], text[7:])
    ]
    return [*pieces, {"type": "result", "status": "success"}]


def claude_turn(text: str) -> list[JsonObject]:
    return [
        {"type": "system", "subtype": "init", "session_id": HANDLE},
        {"type": "assistant", "message": {"content": []}},
        {"type": "result", "subtype": "success", "is_error": False, "result": text},
    ]


CLIS: Final[list[tuple[CliDialect, JsonObject, Callable[[str], list[JsonObject]]]]] = [
    (CODEX, {"type": "thread.started", "thread_id": HANDLE}, codex_turn),
    (GEMINI, {"type": "init", "session_id": HANDLE}, gemini_turn),
    (CLAUDE, {"type": "system", "subtype": "init", "session_id": HANDLE}, claude_turn),
]
FAILURES: Final[dict[str, JsonObject]] = {
    "codex": {"type": "turn.failed", "error": {"message": "no credit"}},
    "gemini": {"type": "result", "status": "error", "error": {"message": "no credit"}},
    "claude": {"type": "result", "subtype": "error_during_execution", "errors": ["no credit"]},
}
EVERY_CLI: Final = pytest.mark.parametrize(
    ("cli", "named", "turn"), CLIS, ids=["codex", "gemini", "claude"]
)
Turn = Callable[[str], list[JsonObject]]


# -- agent CLIs --------------------------------------------------------------------------------


USES: Final[JsonObject] = {"type": "usage", "input_tokens": 1, "output_tokens": 1}


@pytest.mark.parametrize("ends", [False, True])
async def test_the_latest_usage_of_a_turn_that_prints_no_more_is_recorded(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch, *, ends: bool
) -> None:
    if not ends:
        monkeypatch.setattr(turn_state, "USAGE_RECORDED_EVERY_S", 0.2)
    between: list[JsonObject] = [{"type": "result", "output": {}}] if ends else []
    script = say(USES, *between, USES | {"input_tokens": 7})
    execution = await new_execution(more=[engine(f"{script}\nexec sleep 600")])
    run_id = await execution.create("agent")

    async def is_recorded() -> bool:
        usage = (await execution.get(run_id)).usage
        return usage is not None and usage.input_tokens == 7

    await until(is_recorded)

    assert (await execution.get(run_id)).status is RunStatus.RUNNING
    await execution.cancel(run_id)
    await execution.until_ended(run_id)


BAD_RETRY: Final[JsonObject] = {"type": "system", "subtype": "api_retry", "error": "bad \ud800"}


@pytest.mark.parametrize("is_mended", [True, False])
async def test_a_text_that_cannot_be_stored_does_not_keep_a_run_alive(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch, *, is_mended: bool
) -> None:
    if not is_mended:  # the store then refuses the text
        monkeypatch.setattr(cli_dialect, "storable", lambda text: text)
    script = say(BAD_RETRY, *claude_turn(DONE))

    run = await end_of(new_execution, engine(script, CLAUDE))

    assert code_of(run) == (None if is_mended else "INTERNAL_ERROR")


@EVERY_CLI
async def test_the_last_result_of_a_cli_counts(
    new_execution: NewExecution, cli: CliDialect, named: JsonObject, turn: Turn
) -> None:
    run = await end_of(new_execution, engine(say(named, *turn(INTERIM), *turn(DONE)), cli))

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"done": True})


@EVERY_CLI
async def test_a_question_after_an_interim_result_is_asked(
    new_execution: NewExecution, cli: CliDialect, named: JsonObject, turn: Turn
) -> None:
    run = await end_of(new_execution, engine(say(named, *turn(INTERIM), *turn(ASK)), cli))

    assert run.status is RunStatus.WAITING_USER
    assert run.pending is not None
    assert run.pending.prompt == "Deploy?"


async def test_a_session_id_that_the_service_has_chosen_needs_no_event(
    new_execution: NewExecution,
) -> None:
    """Claude Code gets the id of its session by its command line."""
    (*_, asks) = claude_turn(ASK)

    run = await end_of(new_execution, engine(say(asks), CLAUDE))

    assert (run.status, run.error) == (RunStatus.WAITING_USER, None)


@EVERY_CLI
async def test_a_result_after_a_question_ends_the_run(
    new_execution: NewExecution, cli: CliDialect, named: JsonObject, turn: Turn
) -> None:
    run = await end_of(new_execution, engine(say(named, *turn(ASK), *turn(DONE)), cli))

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"done": True})


@EVERY_CLI
async def test_an_interim_result_counts_when_the_cli_exits_in_its_next_turn(
    new_execution: NewExecution, cli: CliDialect, named: JsonObject, turn: Turn
) -> None:
    begun = turn(DONE)[:-1]  # a further turn that never ends

    run = await end_of(new_execution, engine(say(named, *turn(INTERIM), *begun), cli))

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"text": INTERIM})


@EVERY_CLI
async def test_a_failure_after_a_result_fails_the_run(
    new_execution: NewExecution, cli: CliDialect, named: JsonObject, turn: Turn
) -> None:
    failure = FAILURES[cli.session_type]

    run = await end_of(new_execution, engine(say(named, *turn(INTERIM), failure), cli))

    assert (run.status, code_of(run)) == (RunStatus.FAILED, "ENGINE_FAILED")
    assert run.error is not None
    assert "no credit" in run.error.message


@EVERY_CLI
async def test_a_result_after_a_failure_succeeds(
    new_execution: NewExecution, cli: CliDialect, named: JsonObject, turn: Turn
) -> None:
    failure = FAILURES[cli.session_type]

    run = await end_of(new_execution, engine(say(named, failure, *turn(DONE)), cli))

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"done": True})


@EVERY_CLI
async def test_a_cli_in_its_next_turn_is_not_killed_after_the_exit_grace(
    new_execution: NewExecution,
    monkeypatch: pytest.MonkeyPatch,
    cli: CliDialect,
    named: JsonObject,
    turn: Turn,
) -> None:
    """The CLI is silent in its second turn for longer than `exit_grace_s`, which is 1 s."""
    first, *rest = turn(DONE)
    script = say(named, *turn(INTERIM), first) + "\nsleep 2.5\n" + say(*rest)

    run = await end_of(new_execution, engine(script, cli))

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"done": True})


TASKS: Final[dict[str, tuple[JsonObject, JsonObject]]] = {
    "level": (
        {"type": "system", "subtype": "background_tasks_changed", "tasks": [{"task_id": "a"}]},
        {"type": "system", "subtype": "background_tasks_changed", "tasks": []},
    ),
    "edges": (
        {"type": "system", "subtype": "task_started", "task_id": "a", "is_backgrounded": True},
        {"type": "system", "subtype": "task_notification", "task_id": "a", "status": "completed"},
    ),
}


@pytest.mark.parametrize("reports", ["level", "edges"])
async def test_claude_is_not_killed_while_its_background_tasks_run(
    new_execution: NewExecution, reports: str
) -> None:
    began, ceased = TASKS[reports]
    turn: list[JsonObject] = [{"type": "system", "subtype": "init", "session_id": HANDLE}, began]
    script = (
        say(*turn, *claude_turn(INTERIM)[1:]) + "\nsleep 2.5\n" + say(ceased, *claude_turn(ASK))
    )

    run = await end_of(new_execution, engine(script, CLAUDE))

    assert run.status is RunStatus.WAITING_USER


async def test_claude_is_killed_after_its_last_result_when_no_background_task_is_left(
    new_execution: NewExecution,
) -> None:
    began, ceased = TASKS["level"]
    script = say(began, ceased, *claude_turn(DONE)) + "\nexec sleep 600"

    run = await end_of(new_execution, engine(script, CLAUDE))

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"done": True})


@EVERY_CLI
async def test_a_cli_that_does_not_exit_after_a_failed_turn_is_killed(
    new_execution: NewExecution, cli: CliDialect, named: JsonObject, turn: Turn
) -> None:
    script = say(named, FAILURES[cli.session_type]) + "\nexec sleep 600"

    run = await end_of(new_execution, engine(script, cli))

    assert code_of(run) == "ENGINE_FAILED"


async def test_an_interim_result_does_not_count_when_the_run_is_out_of_time(
    new_execution: NewExecution,
) -> None:
    script = say(*claude_turn(INTERIM), *claude_turn(DONE)[:-1]) + "\nexec sleep 600"
    execution = await new_execution(more=[engine(script, CLAUDE)])

    run = await execution.until_ended(await execution.create("agent", max_run_s=3.0))

    assert code_of(run) == "RUN_TIMEOUT"


# -- JSON lines --------------------------------------------------------------------------------

RESULT: Final[JsonObject] = {"type": "result", "output": {"a": 1, "b": True}}
QUESTION: Final[JsonObject] = {"type": "ask", "kind": "confirm", "prompt": "Ship?"}
SESSION: Final[JsonObject] = {"type": "session", "value": "1"}
TWO_ENDS: Final = "The agent gave a second, different result or question."


@pytest.mark.parametrize(
    "after",
    [
        RESULT,
        {"type": "result", "output": {"b": True, "a": 1}},
        {"type": "thought"},
        SESSION,
        {"type": "progress", "message": "tidying up"},
    ],
    ids=["the same", "the same in another order", "unknown", "session", "progress"],
)
async def test_a_message_without_effect_may_follow_a_result(
    new_execution: NewExecution, after: JsonObject
) -> None:
    run = await end_of(new_execution, engine(say(RESULT, after)))

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"a": 1, "b": True})


@pytest.mark.parametrize("after", [{"type": "thought"}, QUESTION], ids=["unknown", "the same"])
async def test_a_message_without_effect_may_follow_a_question(
    new_execution: NewExecution, after: JsonObject
) -> None:
    run = await end_of(new_execution, engine(say(SESSION, QUESTION, after)))

    assert run.status is RunStatus.WAITING_USER


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (RESULT, {"type": "result", "output": {"a": 1}}),
        (RESULT, {"type": "result", "output": {"a": 1, "b": 1}}),
        (RESULT, QUESTION),
        (QUESTION, RESULT),
        (QUESTION, {"type": "ask", "kind": "confirm", "prompt": "Ship it?"}),
    ],
)
async def test_a_second_different_result_or_question_breaks_the_protocol(
    new_execution: NewExecution, first: JsonObject, second: JsonObject
) -> None:
    run = await end_of(new_execution, engine(say(SESSION, first, second)))

    assert run.error is not None
    assert (run.error.code, run.error.message) == ("ENGINE_PROTOCOL_ERROR", TWO_ENDS)


async def test_a_bad_exit_after_a_result_fails_however_long_lines_delay_it(
    new_execution: NewExecution,
) -> None:
    """The agent exits after three times `exit_grace_s`, and is never silent for `exit_grace_s`."""
    script = (
        say(RESULT) + "\nfor i in 1 2 3 4 5 6 7 8 9 10 11 12; do sleep 0.25;\n"
        f"{say(RESULT)}\ndone; exit 3"
    )

    run = await end_of(new_execution, engine(script))

    assert code_of(run) == "ENGINE_FAILED"


async def test_a_sticky_agent_that_returns_a_result_while_its_question_is_open_breaks_the_protocol(
    new_execution: NewExecution,
) -> None:
    script = say(QUESTION, RESULT) + "\nexec sleep 600"
    execution = await new_execution(more=[engine(script, profile=Profile.STICKY_PROCESS)])

    run = await execution.until_ended(await execution.create("agent"))

    assert code_of(run) == "ENGINE_PROTOCOL_ERROR"


async def test_a_sticky_agent_that_asks_after_its_result_breaks_the_protocol(
    new_execution: NewExecution,
) -> None:
    script = say(RESULT, QUESTION) + "\nexec sleep 600"
    execution = await new_execution(more=[engine(script, profile=Profile.STICKY_PROCESS)])

    run = await execution.until_ended(await execution.create("agent"))

    assert run.error is not None
    assert (run.error.code, run.error.message) == ("ENGINE_PROTOCOL_ERROR", TWO_ENDS)


async def test_a_sticky_agent_that_closes_its_output_while_it_waits_breaks_the_protocol(
    new_execution: NewExecution,
) -> None:
    script = f"exec 3>&1; {{\n{say(QUESTION)}\n}} >&3; exec >&- 3>&-; exec sleep 600"
    execution = await new_execution(more=[engine(script, profile=Profile.STICKY_PROCESS)])

    run = await execution.until_ended(await execution.create("agent"))

    assert run.error is not None
    assert (run.error.code, run.error.message) == (
        "ENGINE_PROTOCOL_ERROR",
        "The process closed its output while it waited for the reply, but did not exit.",
    )


# -- replies that cannot be delivered -----------------------------------------------------------


CLOSES_UNREAD: Final = (
    "import os, select, time; select.select([0], [], []); os.close(0); time.sleep(600)"
)


@pytest.mark.parametrize(
    "rest",
    ["exec <&-; exec sleep 600", f"exec {sys.executable} -I -S -c '{CLOSES_UNREAD}'"],
    ids=["before the reply", "with the reply in it"],
)
async def test_a_reply_that_a_sticky_process_cannot_read_fails_its_run(
    new_execution: NewExecution, rest: str
) -> None:
    script = f"read -r task; {say(QUESTION)}\n{rest}"
    execution = await new_execution(more=[engine(script, profile=Profile.STICKY_PROCESS)])
    run_id = await execution.create("agent")
    await execution.until_status(run_id, RunStatus.WAITING_USER)
    launch = await execution.launch(run_id)

    await execution.reply(run_id, answer=True)
    run = await execution.until_ended(run_id)

    assert code_of(run) == "REPLY_NOT_DELIVERED"
    assert launch.tree() == []
    asked = await execution.storage.read_row(interactions.find, run.key, 1)
    assert asked is not None
    assert asked.state == "CLOSED"  # answered, and never delivered
    await execution.until_free(execution.dispatcher.capacity)


@pytest.mark.parametrize(
    ("rest", "end"),
    [
        ("exit 0", "REPLY_NOT_DELIVERED"),
        ("exit 3", "ENGINE_FAILED"),
        (say(RESULT), None),
    ],
    ids=["good exit", "bad exit", "result"],
)
async def test_the_way_in_which_a_process_ends_counts_though_it_read_no_reply(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch, rest: str, end: str | None
) -> None:
    monkeypatch.setattr(turn_state, "LAST_OUTPUT_S", 60.0)  # long enough on any machine
    script = (
        f"read -r task; {say(QUESTION)}\nexec <&-\nuntil [ -s go ]; do sleep 0.05; done; {rest}"
    )
    execution = await new_execution(more=[engine(script, profile=Profile.STICKY_PROCESS)])
    run_id = await execution.create("agent")
    run = await execution.until_status(run_id, RunStatus.WAITING_USER)

    async def is_refused() -> bool:
        return any(one.state.is_reply_lost for one in execution.turns.supervisors)

    await execution.reply(run_id, answer=True)
    await until(is_refused)
    (execution.launcher.workspaces.workspace(run.key, run.attempt) / "go").write_text("go")
    run = await execution.until_ended(run_id)

    assert code_of(run) == end


async def test_a_resumed_process_that_does_not_read_its_reply_fails_its_run(
    new_execution: NewExecution,
) -> None:
    first = say(SESSION, QUESTION)
    script = f"if mkdir first; then\n{first}\nelse exec <&-; exec sleep 600; fi"
    execution = await new_execution(more=[engine(script)])
    run_id = await execution.create("agent")
    await execution.until_status(run_id, RunStatus.WAITING_USER)

    await execution.reply(run_id, answer=True)
    run = await execution.until_ended(run_id)

    assert code_of(run) == "REPLY_NOT_DELIVERED"


# -- after the exit ----------------------------------------------------------------------------

HOLDS_OUTPUT: Final = "sleep 600 & "
"""A child that keeps the agent's output open after its exit."""


@pytest.mark.parametrize("child", ["", HOLDS_OUTPUT])
async def test_the_last_line_needs_no_newline(new_execution: NewExecution, child: str) -> None:
    script = f"{child}printf %s '{json.dumps(RESULT)}'"
    execution = await new_execution(more=[engine(script)])

    run = await execution.until_ended(await execution.create("agent"))

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"a": 1, "b": True})
    workspace = execution.launcher.workspaces.workspace(run.key, run.attempt)
    assert workspace.with_name("stdout.log").read_text() == json.dumps(RESULT)


async def test_half_a_line_of_a_child_does_not_break_a_result(new_execution: NewExecution) -> None:
    script = f"{say(RESULT)}; {HOLDS_OUTPUT}printf '{{half'"

    run = await end_of(new_execution, engine(script))

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"a": 1, "b": True})


async def test_a_child_that_writes_for_ever_does_not_keep_a_run_alive(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_io, "bytes_held", lambda _: 1)  # it is never found empty
    monkeypatch.setattr(agent_io, "OVERTIME_BYTES", 1 << 18)
    monkeypatch.setattr(turn_state, "LAST_OUTPUT_S", 0.02)
    flood = json.dumps({"type": "progress", "message": "x" * 8000})

    run = await end_of(new_execution, engine(f"{say(RESULT)}; yes '{flood}' &"))

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"a": 1, "b": True})


async def test_the_error_of_a_failed_agent_has_its_stderr_though_a_child_keeps_stderr_open(
    new_execution: NewExecution,
) -> None:
    """Text that may be the beginning of a secret is held back until more text comes."""
    script = f"{HOLDS_OUTPUT}printf 'the model is away' >&2; exit 3"

    run = await end_of(new_execution, engine(script, CODEX))

    assert run.error is not None
    assert run.error.message.endswith("the model is away")


async def test_a_tree_deadline_after_a_good_exit_interrupts_no_run(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turn_state, "LAST_OUTPUT_S", 600.0)
    execution = await new_execution(more=[engine(f"{say(RESULT)}; {HOLDS_OUTPUT}exit 0")])
    run_id = await execution.create("agent")

    async def has_exited() -> bool:
        return any(one.state.exited is not None for one in execution.turns.supervisors)

    await until(has_exited)
    execution.heartbeat(-1.0)  # the tree deadline has passed: the shim ends what is left
    run = await execution.until_ended(run_id)

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"a": 1, "b": True})


async def test_a_shortened_stderr_begins_with_a_whole_character(
    new_execution: NewExecution,
) -> None:
    run = await end_of(
        new_execution,
        engine("i=0; while [ $i -lt 1000 ]; do printf €; i=$((i+1)); done >&2; exit 3"),
    )

    assert run.error is not None
    assert run.error.message.endswith("result: " + "€" * 666)
