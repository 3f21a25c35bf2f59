"""The agent CLIs as engines: how they are called, and what their events come to.

The lines are of codex-cli 0.171.0, gemini-cli 0.61.0 and claude-code 2.1.197, shortened.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.domain.run import ErrorCode, Interaction, JsonObject, Session
from runrecovery_service.engines import cli_dialect, final_message, prompts
from runrecovery_service.engines.claude import CLAUDE
from runrecovery_service.engines.cli_dialect import CliDialect, CliListener
from runrecovery_service.engines.codex import CODEX
from runrecovery_service.engines.dialect import (
    AskMessage,
    HandleUnusable,
    Heard,
    Message,
    ProtocolError,
    ResultMessage,
    Resumed,
    RunContext,
    SessionMessage,
)
from runrecovery_service.engines.gemini import GEMINI
from support.questions import answered

ID = "01a2224f-ff16-7cb2-8eb4-59969e2c0c53"
ASK = '{"ask_user": {"prompt": "Deploy to which place?"}}'
ALL = [CODEX, GEMINI, CLAUDE]

CODEX_TURN: list[JsonObject] = [
    {"type": "thread.started", "thread_id": ID},
    {"type": "item.completed", "item": {"id": "0", "type": "error", "message": "a warning"}},
    {"type": "turn.started"},
    {"type": "item.completed", "item": {"id": "1", "type": "agent_message", "text": "I look."}},
    {"type": "item.completed", "item": {"id": "2", "type": "command_execution", "exit_code": 0}},
    {"type": "item.completed", "item": {"id": "3", "type": "agent_message", "text": ASK}},
    {"type": "turn.completed", "usage": {"input_tokens": 10}},
]
GEMINI_TURN: list[JsonObject] = [
    {"type": "init", "session_id": ID, "model": "m"},
    {"type": "message", "role": "user", "content": '{"result": {}}'},
    {"type": "message", "role": "assistant", "content": "I look.", "delta": True},
    {"type": "tool_use", "tool_name": "read_file"},
    {"type": "tool_result", "status": "success"},
    {"type": "message", "role": "assistant", "content": ASK[:10], "delta": True},
    {"type": "message", "role": "assistant", "content": ASK[10:], "delta": True},
    {"type": "result", "status": "success", "stats": {}},
]
CLAUDE_TURN: list[JsonObject] = [
    {"type": "system", "subtype": "init", "session_id": ID, "cwd": "/w"},
    {"type": "assistant", "message": {"content": [{"type": "text", "text": "I look."}]}},
    {"type": "result", "subtype": "success", "is_error": False, "result": ASK, "session_id": ID},
]
LAST_WORDS: dict[str, Callable[[str], list[JsonObject]]] = {
    "codex": lambda text: [
        {"type": "item.completed", "item": {"type": "agent_message", "text": text}},
        {"type": "turn.completed"},
    ],
    "gemini": lambda text: [
        {"type": "message", "role": "assistant", "content": text},
        {"type": "result", "status": "success"},
    ],
    "claude": lambda text: [
        {"type": "result", "subtype": "success", "is_error": False, "result": text}
    ],
}
TURNS = [(CODEX, CODEX_TURN), (GEMINI, GEMINI_TURN), (CLAUDE, CLAUDE_TURN)]


def task(given: JsonObject) -> RunContext:
    return RunContext(run_id="r", attempt=1, input=given, workspace="/w")


def resumed(dialect: CliDialect, reply: Interaction, handle: str = ID) -> Resumed:
    return Resumed(session=Session(type=dialect.session_type, handle=handle, turn=1), reply=reply)


def heard(listener: CliListener, events: Iterable[JsonObject]) -> list[Message]:
    return [
        message
        for event in events
        for message in listener.hear(json.dumps(event).encode()).messages
    ]


# -- calling -----------------------------------------------------------------------------------


def test_codex_is_called_for_one_turn_with_events() -> None:
    first = CODEX.open(task({"prompt": "x"}), None)
    again = CODEX.open(task({"prompt": "x"}), resumed(CODEX, answered(1, "y")))

    assert first.arguments == ("exec", "--json", "-")
    assert again.arguments == ("exec", "resume", ID, "--json", "-")
    assert first.handle is None


def test_codex_is_told_to_work_outside_of_git_where_it_may_trust() -> None:
    trusting = replace(CODEX, trusted=True)

    for known in (None, resumed(CODEX, answered(1, "y"))):
        assert trusting.open(task({}), known).arguments[-1] == "--skip-git-repo-check"


def test_gemini_is_called_for_one_turn_with_events() -> None:
    first = GEMINI.open(task({"prompt": "x"}), None)
    again = GEMINI.open(task({"prompt": "x"}), resumed(GEMINI, answered(1, "y")))

    assert first.arguments == ("--output-format", "stream-json")
    assert again.arguments == ("--resume", ID, "--output-format", "stream-json")


def test_claude_gets_a_session_id_of_ours_and_a_new_one_each_time() -> None:
    openings = [CLAUDE.open(task({"prompt": "x"}), None) for _ in range(2)]

    for opening in openings:
        assert opening.handle is not None
        assert uuid.UUID(opening.handle).version == 4
        assert opening.arguments[-2:] == ("--session-id", opening.handle)
    assert openings[0].handle != openings[1].handle


def test_claude_resumes_by_the_handle_on_record() -> None:
    again = CLAUDE.open(task({"prompt": "x"}), resumed(CLAUDE, answered(1, "y")))

    assert again.arguments[-2:] == ("--resume", ID)
    assert again.handle is None


@pytest.mark.parametrize("dialect", ALL)
@pytest.mark.parametrize(
    "handle", ["--yolo", "-", "", "latest", "1", f"{ID}\n", ID.upper(), f"{ID}0"]
)
def test_a_handle_that_is_no_uuid_becomes_no_argument(dialect: CliDialect, handle: str) -> None:
    with pytest.raises(HandleUnusable):
        dialect.open(task({}), resumed(dialect, answered(1, "y"), handle))


@pytest.mark.parametrize("dialect", ALL)
def test_a_session_of_another_engine_is_not_resumed(dialect: CliDialect) -> None:
    foreign = Resumed(session=Session(type="jsonl", handle=ID, turn=1), reply=answered(1, "y"))

    with pytest.raises(HandleUnusable):
        dialect.open(task({}), foreign)


@pytest.mark.parametrize("dialect", ALL)
def test_the_prompt_goes_to_standard_input_alone(dialect: CliDialect) -> None:
    opening = dialect.open(task({"prompt": "hunter2 ß"}), None)

    assert "hunter2 ß" in opening.input.decode()
    assert not any("hunter2" in word for word in opening.arguments)


# -- prompts -----------------------------------------------------------------------------------


def test_the_first_prompt_says_how_to_end_and_what_the_task_is() -> None:
    text = prompts.first_prompt({"prompt": "/etc/hosts: what is it?"})

    assert text == f"{prompts.HOW_TO_END}\n\nYour task:\n\n/etc/hosts: what is it?\n"


def test_what_an_input_has_beside_its_prompt_is_told_too() -> None:
    text = prompts.first_prompt({"prompt": "Mend it.", "ticket": {"id": 7}})

    assert json.loads(text.partition("Mend it.\n\n")[2]) == {"ticket": {"id": 7}}


@pytest.mark.parametrize("given_input", [{}, {"goal": "ß"}, {"prompt": 7}, {"prompt": None}])
def test_an_input_without_a_prompt_is_told_as_a_whole(given_input: JsonObject) -> None:
    assert (
        json.loads(prompts.first_prompt(given_input).partition("Your task:\n\n")[2]) == given_input
    )


@pytest.mark.parametrize(
    ("response", "words"),
    [("/quit", "/quit"), ("", ""), (True, "true"), ({"city": "Köln"}, '{\n  "city": "Köln"\n}')],
)
def test_an_answer_is_told_behind_words_of_ours(response: object, words: str) -> None:
    assert prompts.reply_prompt(answered(1, response)) == f"The user answers:\n\n{words}\n"  # type: ignore[arg-type] # any JSON


def test_an_automatic_decision_is_told_as_one() -> None:
    assert (
        prompts.reply_prompt(answered(1, None, auto_decided=True)) == f"{prompts.NOBODY_ANSWERED}\n"
    )


def test_the_protocol_that_is_asked_for_is_the_one_that_is_understood() -> None:
    shown = [line for line in prompts.HOW_TO_END.splitlines() if line.startswith("{")]

    assert [type(final_message.parse(line)) for line in shown] == [AskMessage, ResultMessage]


# -- listening ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("dialect", "turn"), TURNS)
def test_a_turn_names_its_session_and_ends_with_its_last_words(
    dialect: CliDialect, turn: list[JsonObject]
) -> None:
    listener = CliListener(dialect, None, resumed=False)

    first, last = (m for event in turn for m in listener.hear(json.dumps(event).encode()).messages)

    assert first == SessionMessage(value=ID)
    assert isinstance(last, AskMessage)
    assert last.question.prompt == "Deploy to which place?"
    assert listener.failure(0, "") is None


@pytest.mark.parametrize(("dialect", "turn"), TURNS)
def test_a_session_that_is_on_record_is_not_named_again(
    dialect: CliDialect, turn: list[JsonObject]
) -> None:
    listener = CliListener(dialect, ID, resumed=True)

    assert [type(message) for message in heard(listener, turn)] == [AskMessage]


@pytest.mark.parametrize(("dialect", "turn"), TURNS)
def test_a_turn_that_goes_on_in_another_session_has_failed(
    dialect: CliDialect, turn: list[JsonObject]
) -> None:
    listener = CliListener(dialect, str(uuid.uuid4()), resumed=True)

    messages = heard(listener, turn)
    error = listener.failure(0, "")

    assert not any(isinstance(message, SessionMessage) for message in messages)
    assert error is not None
    assert error.code == ErrorCode.SESSION_RESUME_FAILED


@pytest.mark.parametrize("dialect", ALL)
def test_a_handle_that_the_agent_quotes_is_in_no_message(dialect: CliDialect) -> None:
    for quoted in (f"I am {ID}.", json.dumps({"ask_user": {"prompt": f"Is {ID} me?"}})):
        listener = CliListener(dialect, ID, resumed=True)
        said = heard(listener, LAST_WORDS[dialect.session_type](quoted))

        assert ID not in repr(said)
        assert "[secret]" in repr(said)


def test_what_may_be_the_handle_is_not_shown_before_it_is_known() -> None:
    listener = CliListener(CODEX, None, resumed=False)

    early = listener.redact(f"session {ID} begins\n".encode())

    assert early == b"session [secret] begins\n"


def test_an_opening_does_not_tell_its_secrets() -> None:
    told = [
        repr(dialect.open(task({"prompt": "hunter2"}), known))
        for dialect in ALL
        for known in (None, resumed(dialect, answered(1, "hunter2")))
    ]

    assert not any(ID in text or "hunter2" in text for text in told)
    assert "session-id" not in "".join(told)


@pytest.mark.parametrize(("dialect", "turn"), TURNS)
def test_the_handle_is_shown_nowhere(dialect: CliDialect, turn: list[JsonObject]) -> None:
    listener = CliListener(dialect, None, resumed=False)

    shown = [listener.hear(json.dumps(event).encode()).redacted for event in turn]

    assert ID.encode() not in b"".join(shown)
    assert cli_dialect.SECRET in shown[0]
    assert listener.redact(f"resumes {ID}".encode()) == b"resumes [secret]"


@pytest.mark.parametrize(("dialect", "turn"), TURNS)
@pytest.mark.parametrize(
    "noise", [b"", b"Loaded cached credentials.", b"[1]", b'"x"', b"{", b"\xff\xfe", b"[" * 99999]
)
def test_a_line_that_is_no_event_is_kept_and_means_nothing(
    dialect: CliDialect, turn: list[JsonObject], noise: bytes
) -> None:
    listener = CliListener(dialect, None, resumed=False)

    assert listener.hear(noise) == Heard(noise)
    assert len(heard(listener, turn)) == 2


@pytest.mark.parametrize("dialect", ALL)
def test_a_handle_that_no_command_may_hold_breaks_the_protocol(dialect: CliDialect) -> None:
    named: dict[str, JsonObject] = {
        "codex": {"type": "thread.started", "thread_id": "--yolo"},
        "gemini": {"type": "init", "session_id": "--yolo"},
        "claude": {"type": "system", "subtype": "init", "session_id": "--yolo"},
    }

    with pytest.raises(ProtocolError) as caught:
        CliListener(dialect, None, resumed=False).hear(
            json.dumps(named[dialect.session_type]).encode()
        )

    assert "yolo" not in str(caught.value)


@pytest.mark.parametrize(("dialect", "turn"), TURNS)
def test_a_turn_that_says_nothing_at_its_end_has_an_empty_result(
    dialect: CliDialect, turn: list[JsonObject]
) -> None:
    silent = [{**turn[-1], "result": ""} if "result" in turn[-1] else turn[-1]]

    assert heard(CliListener(dialect, ID, resumed=True), silent) == [
        ResultMessage(output={"text": ""})
    ]


EVENTS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "item",
                    "text",
                    "error",
                    "message",
                    "result",
                    "errors",
                    "status",
                    "thread_id",
                    "session_id",
                    "subtype",
                    "severity",
                    "role",
                    "content",
                    "delta",
                ]
            ),
            inner
            | st.sampled_from(
                ["result", "turn.failed", "item.completed", "agent_message", "message"]
            ),
            max_size=5,
        )
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("dialect", ALL)
@given(event=EVENTS)
def test_no_event_makes_the_reading_fail(dialect: CliDialect, event: object) -> None:
    listener = CliListener(dialect, ID, resumed=True)

    listener.hear(json.dumps(event).encode())
    listener.failure(1, "")


# -- failing -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "exit_code", "events", "stderr"),
    [
        (CODEX, 1, [], f"Error: thread/resume failed: no rollout found for thread id {ID} (code)"),
        (GEMINI, 42, [], "Error resuming session: No previous sessions found for this project."),
        (
            CLAUDE,
            1,
            [
                {
                    "type": "result",
                    "subtype": "error_during_execution",
                    "is_error": True,
                    "session_id": ID,
                    "errors": [f"No conversation found with session ID: {ID}"],
                }
            ],
            "",
        ),
    ],
)
def test_a_lost_session_has_its_own_code_and_does_not_show_the_handle(
    dialect: CliDialect, exit_code: int, events: list[JsonObject], stderr: str
) -> None:
    listener = CliListener(dialect, ID, resumed=True)
    assert heard(listener, events) == []

    error = listener.failure(exit_code, stderr)

    assert error is not None
    assert error.code == ErrorCode.SESSION_RESUME_FAILED
    assert ID not in error.message


@pytest.mark.parametrize(
    ("dialect", "event", "told"),
    [
        (CODEX, {"type": "turn.failed", "error": {"message": "401 Unauthorized"}}, "401"),
        (CODEX, {"type": "turn.failed"}, "noise on stderr"),
        (GEMINI, {"type": "result", "status": "error", "error": {"message": "quota"}}, "quota"),
        (GEMINI, {"type": "result", "status": "error"}, "noise on stderr"),
        (GEMINI, {"type": "error", "severity": "error", "message": "turn limit"}, "turn limit"),
        (GEMINI, {"type": "error", "severity": "warning", "message": "Loop detected"}, "Loop"),
        (
            GEMINI,
            {"type": "error", "severity": "warning", "message": "Agent execution stopped: hook"},
            "stopped: hook",
        ),
        (
            GEMINI,
            {"type": "error", "severity": "warning", "message": "Agent execution blocked: rule"},
            "blocked: rule",
        ),
        (
            CLAUDE,
            {"type": "result", "subtype": "success", "is_error": True, "result": "API"},
            "API",
        ),
        (CLAUDE, {"type": "result", "subtype": "error_max_turns"}, "error_max_turns"),
        (CLAUDE, {"type": "result"}, "noise on stderr"),
    ],
)
def test_a_failed_turn_is_a_failure_whatever_the_exit_code(
    dialect: CliDialect, event: JsonObject, told: str
) -> None:
    for exit_code in (0, 1, None, -9):
        listener = CliListener(dialect, None, resumed=False)
        assert heard(listener, [event]) == []
        error = listener.failure(exit_code, "noise on stderr")
        assert error is not None
        assert error.code == ErrorCode.ENGINE_FAILED
        assert told in error.message


@pytest.mark.parametrize("dialect", ALL)
def test_an_exit_code_without_a_meaning_is_left_to_be_told_as_any(dialect: CliDialect) -> None:
    assert CliListener(dialect, None, resumed=False).failure(55, "not a trusted directory") is None


def test_a_failure_without_words_of_its_own_is_told_by_the_last_warning() -> None:
    listener = CliListener(GEMINI, None, resumed=False)
    warning: JsonObject = {"type": "error", "severity": "warning", "message": "invalid stream"}

    heard(listener, [warning, {"type": "result", "status": "error"}])
    error = listener.failure(1, "noise")

    assert error is not None
    assert "invalid stream" in error.message


def test_a_warning_alone_is_no_failure() -> None:
    listener = CliListener(GEMINI, None, resumed=False)
    warning: JsonObject = {"type": "error", "severity": "warning", "message": "slow"}

    assert [type(each) for each in heard(listener, [warning, *GEMINI_TURN[-1:]])] == [ResultMessage]
    assert listener.failure(0, "") is None


def test_a_first_turn_can_have_lost_no_session() -> None:
    listener = CliListener(GEMINI, None, resumed=False)
    words = "Error resuming session: No previous sessions found for this project."

    assert listener.failure(42, words) is None


@pytest.mark.parametrize(
    ("dialect", "exit_code", "told"),
    [
        (GEMINI, 1, "Error resuming session: No previous sessions found for this project."),
        (CLAUDE, 1, f"Read notes.md: No conversation found with session ID: {ID}"),
        (CODEX, 1, "thread not found"),
    ],
)
def test_words_that_only_resemble_those_of_a_lost_session_lose_none(
    dialect: CliDialect, exit_code: int, told: str
) -> None:
    assert CliListener(dialect, ID, resumed=True).failure(exit_code, told) is None


@pytest.mark.parametrize(
    "reported",
    [
        {"type": "result", "status": "success"},
        {"type": "result", "status": "error", "error": {"message": "what followed"}},
        {"type": "error", "severity": "error", "message": "what followed"},
    ],
)
def test_what_doomed_a_turn_of_gemini_is_told_whatever_is_reported_after_it(
    reported: JsonObject,
) -> None:
    listener = CliListener(GEMINI, ID, resumed=True)
    doomed: JsonObject = {"type": "error", "severity": "error", "message": "turn limit"}

    heard(listener, [doomed, reported])
    error = listener.failure(0, "noise")

    assert error is not None
    assert error.code == ErrorCode.ENGINE_FAILED
    assert error.message == "The agent failed (exit code 0): turn limit"


def test_other_bad_input_of_gemini_is_no_lost_session() -> None:
    assert CliListener(GEMINI, ID, resumed=True).failure(42, "No input provided via stdin.") is None


def test_pieces_come_together_and_begin_anew_after_an_act() -> None:
    listener = CliListener(GEMINI, ID, resumed=True)
    (last,) = heard(listener, GEMINI_TURN[2:])

    assert isinstance(last, AskMessage)
    assert listener.buffered_bytes == len(ASK)


def test_of_an_endless_text_the_end_is_remembered() -> None:
    listener = CliListener(GEMINI, ID, resumed=True)
    piece: JsonObject = {
        "type": "message", "role": "assistant", "content": "x" * 100_000, "delta": True
    }  # fmt: skip
    ask: JsonObject = {"type": "message", "role": "assistant", "content": ASK, "delta": True}

    heard(listener, [piece] * 100)
    assert listener.buffered_bytes < cli_dialect.MAX_TEXT_CHARS
    (last,) = heard(listener, [ask, GEMINI_TURN[-1]])

    assert isinstance(last, AskMessage)


# -- at work -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("event", "is_at_work"),
    [
        ({"type": "assistant", "message": {}}, True),
        ({"type": "assistant", "message": {}, "parent_tool_use_id": None}, True),
        ({"type": "assistant", "message": {}, "parent_tool_use_id": "toolu_1"}, False),
        ({"type": "user", "message": {}, "parent_tool_use_id": "toolu_1"}, False),
        ({"type": "system", "subtype": "task_started", "task_id": "a"}, True),
        (
            {
                "type": "system",
                "subtype": "task_started",
                "task_id": "a",
                "is_backgrounded": False,
            },
            False,
        ),
        (
            {
                "type": "system",
                "subtype": "task_notification",
                "task_id": "a",
                "status": "completed",
            },
            True,
        ),
        (
            {"type": "system", "subtype": "task_notification", "task_id": "a", "status": "failed"},
            True,
        ),
        (
            {"type": "system", "subtype": "task_notification", "task_id": "a", "status": "stopped"},
            False,
        ),
        (
            {"type": "system", "subtype": "background_tasks_changed", "tasks": [{"task_id": "a"}]},
            True,
        ),
        (
            {
                "type": "system",
                "subtype": "background_tasks_changed",
                "tasks": [{"task_id": "a", "ambient": True}],
            },
            False,
        ),
    ],
)
def test_after_its_result_claude_is_at_work_when_its_model_goes_on_or_will(
    event: JsonObject,
    is_at_work: bool,  # noqa: FBT001 - given by parametrize
) -> None:
    listener = CliListener(CLAUDE, ID, resumed=False)
    heard(listener, CLAUDE_TURN)

    assert listener.hear(json.dumps(event).encode()).at_work is is_at_work


def test_the_handle_that_claude_names_is_hidden_though_another_was_chosen_for_it() -> None:
    other = "11a2224f-ff16-7cb2-8eb4-59969e2c0c53"
    listener = CliListener(CLAUDE, ID, resumed=False)

    named = heard(listener, [{"type": "system", "subtype": "init", "session_id": other}])

    assert named == [SessionMessage(value=other)]
    assert listener.redact(f"resume {other}".encode()) == b"resume [secret]"
