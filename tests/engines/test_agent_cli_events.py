"""The messages that the events of the agent CLIs become, and the redaction of handles."""

from __future__ import annotations

import json
import uuid

import pytest
from engines.agent_cli_turns import (
    ASK,
    CLAUDE_TURN,
    DIALECTS,
    FINAL_MESSAGES,
    GEMINI_TURN,
    ID,
    TURNS,
    messages_of,
)
from hypothesis import given
from hypothesis import strategies as st
from runrecovery_service.domain.run import ErrorCode, JsonObject
from runrecovery_service.engines import cli_dialect
from runrecovery_service.engines.claude import CLAUDE
from runrecovery_service.engines.cli_dialect import CliDialect, CliListener
from runrecovery_service.engines.codex import CODEX
from runrecovery_service.engines.dialect import (
    AskMessage,
    Heard,
    ProtocolError,
    ResultMessage,
    SessionMessage,
)
from runrecovery_service.engines.gemini import GEMINI


@pytest.mark.parametrize(("dialect", "turn"), TURNS)
def test_a_turn_reports_its_session_and_then_its_final_message(
    dialect: CliDialect, turn: list[JsonObject]
) -> None:
    listener = CliListener(dialect, None, resumed=False)

    first, last = (m for event in turn for m in listener.hear(json.dumps(event).encode()).messages)

    assert first == SessionMessage(value=ID)
    assert isinstance(last, AskMessage)
    assert last.question.prompt == "Deploy to which place?"
    assert listener.failure(0, "") is None


@pytest.mark.parametrize(("dialect", "turn"), TURNS)
def test_a_recorded_session_is_not_reported_again(
    dialect: CliDialect, turn: list[JsonObject]
) -> None:
    listener = CliListener(dialect, ID, resumed=True)

    assert [type(message) for message in messages_of(listener, turn)] == [AskMessage]


@pytest.mark.parametrize(("dialect", "turn"), TURNS)
def test_a_resumed_turn_in_another_session_has_failed(
    dialect: CliDialect, turn: list[JsonObject]
) -> None:
    listener = CliListener(dialect, str(uuid.uuid4()), resumed=True)

    messages = messages_of(listener, turn)
    error = listener.failure(0, "")

    assert not any(isinstance(message, SessionMessage) for message in messages)
    assert error is not None
    assert error.code == ErrorCode.SESSION_RESUME_FAILED


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_handle_that_the_agent_quotes_is_redacted_from_its_messages(dialect: CliDialect) -> None:
    for quoted in (f"I am {ID}.", json.dumps({"ask_user": {"prompt": f"Is {ID} me?"}})):
        listener = CliListener(dialect, ID, resumed=True)
        messages = messages_of(listener, FINAL_MESSAGES[dialect.session_type](quoted))

        assert ID not in repr(messages)
        assert "[secret]" in repr(messages)


def test_any_session_id_is_redacted_before_the_handle_is_known() -> None:
    listener = CliListener(CODEX, None, resumed=False)

    early = listener.redact(f"session {ID} begins\n".encode())

    assert early == b"session [secret] begins\n"


@pytest.mark.parametrize(("dialect", "turn"), TURNS)
def test_the_handle_is_redacted_from_the_output(
    dialect: CliDialect, turn: list[JsonObject]
) -> None:
    listener = CliListener(dialect, None, resumed=False)

    shown = [listener.hear(json.dumps(event).encode()).redacted for event in turn]

    assert ID.encode() not in b"".join(shown)
    assert cli_dialect.SECRET in shown[0]
    assert listener.redact(f"resumes {ID}".encode()) == b"resumes [secret]"


@pytest.mark.parametrize(("dialect", "turn"), TURNS)
@pytest.mark.parametrize(
    "noise", [b"", b"Loaded cached credentials.", b"[1]", b'"x"', b"{", b"\xff\xfe", b"[" * 99999]
)
def test_a_line_that_is_no_event_is_kept_and_has_no_effect(
    dialect: CliDialect, turn: list[JsonObject], noise: bytes
) -> None:
    listener = CliListener(dialect, None, resumed=False)

    assert listener.hear(noise) == Heard(noise)
    assert len(messages_of(listener, turn)) == 2


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_handle_that_no_command_may_contain_is_a_protocol_error_that_hides_it(
    dialect: CliDialect,
) -> None:
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
def test_a_turn_without_a_final_message_has_an_empty_result(
    dialect: CliDialect, turn: list[JsonObject]
) -> None:
    silent = [{**turn[-1], "result": ""} if "result" in turn[-1] else turn[-1]]

    assert messages_of(CliListener(dialect, ID, resumed=True), silent) == [
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


@pytest.mark.parametrize("dialect", DIALECTS)
@given(event=EVENTS)
def test_no_event_makes_the_listener_raise(dialect: CliDialect, event: object) -> None:
    listener = CliListener(dialect, ID, resumed=True)

    listener.hear(json.dumps(event).encode())
    listener.failure(1, "")


def test_pieces_of_a_gemini_message_are_joined_and_start_anew_after_a_tool_call() -> None:
    listener = CliListener(GEMINI, ID, resumed=True)
    (last,) = messages_of(listener, GEMINI_TURN[2:])

    assert isinstance(last, AskMessage)
    assert listener.buffered_bytes == len(ASK)


def test_of_an_endless_message_only_the_end_is_buffered() -> None:
    listener = CliListener(GEMINI, ID, resumed=True)
    piece: JsonObject = {
        "type": "message", "role": "assistant", "content": "x" * 100_000, "delta": True
    }  # fmt: skip
    ask: JsonObject = {"type": "message", "role": "assistant", "content": ASK, "delta": True}

    messages_of(listener, [piece] * 100)
    assert listener.buffered_bytes < cli_dialect.MAX_TEXT_CHARS
    (last,) = messages_of(listener, [ask, GEMINI_TURN[-1]])

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
def test_after_its_result_claude_is_at_work_if_its_model_continues_or_will(
    event: JsonObject,
    is_at_work: bool,  # noqa: FBT001 - given by parametrize
) -> None:
    listener = CliListener(CLAUDE, ID, resumed=False)
    messages_of(listener, CLAUDE_TURN)

    assert listener.hear(json.dumps(event).encode()).at_work is is_at_work


def test_a_handle_that_claude_chose_itself_is_reported_and_redacted() -> None:
    other = "11a2224f-ff16-7cb2-8eb4-59969e2c0c53"
    listener = CliListener(CLAUDE, ID, resumed=False)

    named = messages_of(listener, [{"type": "system", "subtype": "init", "session_id": other}])

    assert named == [SessionMessage(value=other)]
    assert listener.redact(f"resume {other}".encode()) == b"resume [secret]"
