"""How a failed turn of an agent CLI is recognised, and the code and message of its error."""

from __future__ import annotations

import pytest
from engines.agent_cli_turns import DIALECTS, GEMINI_TURN, ID, messages_of
from runrecovery_service.domain.run import ErrorCode, JsonObject
from runrecovery_service.engines.claude import CLAUDE
from runrecovery_service.engines.cli_dialect import CliDialect, CliListener
from runrecovery_service.engines.codex import CODEX
from runrecovery_service.engines.dialect import ResultMessage, RetryMessage
from runrecovery_service.engines.gemini import GEMINI


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
def test_a_lost_session_has_its_own_error_code_and_its_message_hides_the_handle(
    dialect: CliDialect, exit_code: int, events: list[JsonObject], stderr: str
) -> None:
    listener = CliListener(dialect, ID, resumed=True)
    assert messages_of(listener, events) == []

    error = listener.failure(exit_code, stderr)

    assert error is not None
    assert error.code == ErrorCode.SESSION_RESUME_FAILED
    assert ID not in error.message


@pytest.mark.parametrize(
    ("dialect", "event", "message"),
    [
        (CODEX, {"type": "turn.failed", "error": {"message": "400 Bad Request"}}, "400"),
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
        (
            CLAUDE,
            {
                "type": "result",
                "subtype": "success",
                "is_error": False,
                "result": "",
                "stop_reason": "tool_deferred",
                "deferred_tool_use": {"id": "t", "name": "Bash", "input": {}},
            },
            "A hook deferred its call of the tool Bash",
        ),
        (
            GEMINI,
            {
                "type": "tool_result",
                "status": "error",
                "error": {"type": "stop_execution", "message": "enough for today"},
            },
            "enough for today",
        ),
    ],
)
def test_a_failed_turn_is_an_engine_failure_with_every_exit_code(
    dialect: CliDialect, event: JsonObject, message: str
) -> None:
    for exit_code in (0, 1, None, -9):
        listener = CliListener(dialect, None, resumed=False)
        assert messages_of(listener, [event]) == []
        error = listener.failure(exit_code, "noise on stderr")
        assert error is not None
        assert error.code == ErrorCode.ENGINE_FAILED
        assert message in error.message


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_dialect_reports_no_error_for_an_exit_code_that_it_does_not_know(
    dialect: CliDialect,
) -> None:
    assert CliListener(dialect, None, resumed=False).failure(55, "not a trusted directory") is None


def test_a_failure_without_a_message_gets_that_of_the_last_warning() -> None:
    listener = CliListener(GEMINI, None, resumed=False)
    warning: JsonObject = {"type": "error", "severity": "warning", "message": "invalid stream"}

    messages_of(listener, [warning, {"type": "result", "status": "error"}])
    error = listener.failure(1, "noise")

    assert error is not None
    assert "invalid stream" in error.message


def test_a_warning_alone_is_no_failure() -> None:
    listener = CliListener(GEMINI, None, resumed=False)
    warning: JsonObject = {"type": "error", "severity": "warning", "message": "slow"}

    assert [type(each) for each in messages_of(listener, [warning, *GEMINI_TURN[-1:]])] == [
        ResultMessage
    ]
    assert listener.failure(0, "") is None


def test_a_first_turn_cannot_lose_a_session() -> None:
    listener = CliListener(GEMINI, None, resumed=False)
    stderr = "Error resuming session: No previous sessions found for this project."

    assert listener.failure(42, stderr) is None


@pytest.mark.parametrize(
    ("dialect", "exit_code", "message"),
    [
        (GEMINI, 1, "Error resuming session: No previous sessions found for this project."),
        (CLAUDE, 1, f"Read notes.md: No conversation found with session ID: {ID}"),
        (CODEX, 1, "thread not found"),
    ],
)
def test_an_error_text_that_only_resembles_a_lost_session_is_no_lost_session(
    dialect: CliDialect, exit_code: int, message: str
) -> None:
    assert CliListener(dialect, ID, resumed=True).failure(exit_code, message) is None


@pytest.mark.parametrize(
    "reported",
    [
        {"type": "result", "status": "success"},
        {"type": "result", "status": "error", "error": {"message": "what followed"}},
        {"type": "error", "severity": "error", "message": "what followed"},
    ],
)
def test_the_first_error_of_a_gemini_turn_is_reported_whatever_follows_it(
    reported: JsonObject,
) -> None:
    listener = CliListener(GEMINI, ID, resumed=True)
    first_error: JsonObject = {"type": "error", "severity": "error", "message": "turn limit"}

    messages_of(listener, [first_error, reported])
    error = listener.failure(0, "noise")

    assert error is not None
    assert error.code == ErrorCode.ENGINE_FAILED
    assert error.message == "The agent failed (exit code 0): turn limit"


def test_bad_input_of_gemini_with_the_same_exit_code_is_no_lost_session() -> None:
    assert CliListener(GEMINI, ID, resumed=True).failure(42, "No input provided via stdin.") is None


CLAUDE_RETRY: JsonObject = {
    "type": "system",
    "subtype": "api_retry",
    "attempt": 8,
    "error_status": 401,
    "error": "authentication_failed",
}


@pytest.mark.parametrize(
    ("dialect", "events", "stderr", "retry"),
    [
        (
            CLAUDE,
            [CLAUDE_RETRY],
            "",
            "attempt 8 to call the model failed with status 401 (authentication_failed)",
        ),
        (
            CLAUDE,
            [{"type": "system", "subtype": "api_retry"}],
            "",
            "an attempt to call the model failed",
        ),
        (
            CODEX,
            [{"type": "error", "message": "Reconnecting... 2/5 (stream closed)"}],
            "",
            "Reconnecting... 2/5 (stream closed)",
        ),
        (
            GEMINI,
            [{"type": "init", "session_id": ID, "model": "m"}],
            "Attempt 4 failed with status 429.\nAttempt 5 failed with status 429. Retrying",
            "Attempt 5 failed with status 429",
        ),
        (CODEX, [{"type": "error", "message": "some warning"}], "Attempt 1 failed", None),
        (GEMINI, [], "", None),
    ],
)
def test_the_latest_retry_of_a_cli_is_known(
    dialect: CliDialect, events: list[JsonObject], stderr: str, retry: str | None
) -> None:
    listener = CliListener(dialect, ID, resumed=False)
    listener.hear_stderr(stderr)  # may be read before the first event
    messages_of(listener, events)

    assert listener.retry() == retry


def claude_retry(status: int, attempt: int = 1) -> JsonObject:
    return {"type": "system", "subtype": "api_retry", "attempt": attempt, "error_status": status}


WORK: JsonObject = {"type": "assistant", "message": {"content": []}}


@pytest.mark.parametrize(
    ("dialect", "events", "hopeless"),
    [
        (CLAUDE, [claude_retry(401), claude_retry(401)], [False, True]),
        (CLAUDE, [claude_retry(403), claude_retry(401)], [False, True]),
        (
            CLAUDE,
            [claude_retry(529), claude_retry(529, attempt=2), claude_retry(401, attempt=3)],
            [False] * 3,
        ),
        (CLAUDE, [claude_retry(429), claude_retry(429, attempt=2)], [False, False]),
        (CLAUDE, [claude_retry(401), claude_retry(529), claude_retry(401)], [False] * 3),
        (CLAUDE, [claude_retry(401), WORK, claude_retry(401)], [False, False]),
        (CLAUDE, [claude_retry(401) | {"attempt": [], "error_status": {}}] * 2, [False, False]),
        (
            CODEX,
            [
                {"type": "error", "message": "Reconnecting... 1/5 (401 Unauthorized)"},
                {"type": "error", "message": "Reconnecting... 2/5 (401 Unauthorized)"},
            ],
            [False, True],
        ),
        (CODEX, [{"type": "error", "message": "Reconnecting... 2/5 (4011)"}] * 2, [False, False]),
    ],
)
def test_credentials_that_are_refused_twice_in_a_row_are_hopeless(
    dialect: CliDialect, events: list[JsonObject], hopeless: list[bool]
) -> None:
    listener = CliListener(dialect, ID, resumed=False)

    found = [m for m in messages_of(listener, events) if isinstance(m, RetryMessage)]

    assert [message.is_hopeless for message in found] == hopeless


def test_retries_on_standard_error_are_reported_once_and_whole() -> None:
    listener = CliListener(GEMINI, ID, resumed=False)
    pieces = [
        "Attempt 1 failed with status 4",
        "29. Retrying",
        "\nmore",
        "\nAttempt 1 failed with status 429. Retrying",  # of the next call
        f"\nAttempt 2 failed with status 401. {'error ' * 1000}Attempt 3 failed",
        " with status 401",
    ]

    found = [listener.hear_stderr(piece) for piece in pieces]

    assert found == [
        (),
        (RetryMessage(message="Attempt 1 failed with status 429"),),
        (),
        (RetryMessage(message="Attempt 1 failed with status 429"),),
        (RetryMessage(message="Attempt 2 failed with status 401"),),
        (RetryMessage(message="Attempt 3 failed with status 401", is_hopeless=True),),
    ]
    assert CliListener(CODEX, ID, resumed=False).hear_stderr(pieces[3]) == ()


def test_every_wording_of_a_retry_of_gemini_is_known() -> None:
    listener = CliListener(GEMINI, ID, resumed=False)
    text = """
Attempt 1 failed. Retrying with backoff... Error: fetch failed
Attempt 2 failed with 429 error (no Retry-After header). Retrying with backoff...
Attempt 3 failed with 5xx error. Retrying with backoff...
Attempt 4 failed: You have exhausted your capacity. Retrying after 5512ms...
Attempt 401 failed with status 503. Retrying with backoff...
"""

    assert listener.hear_stderr(text) == (
        RetryMessage(message="Attempt 1 failed"),
        RetryMessage(message="Attempt 2 failed with 429"),
        RetryMessage(message="Attempt 3 failed with 5xx"),
        RetryMessage(message="Attempt 4 failed"),
        RetryMessage(message="Attempt 401 failed with status 503"),
    )


def test_a_report_that_cannot_be_stored_is_stored_with_another_character() -> None:
    listener = CliListener(CLAUDE, ID, resumed=False)
    failed: JsonObject = {"type": "result", "is_error": True, "result": "no \0 \udfff"}

    (retry,) = messages_of(listener, [CLAUDE_RETRY | {"error": "bad \ud800"}])
    messages_of(listener, [failed])
    error = listener.failure(1, "")

    known = "attempt 8 to call the model failed with status 401"
    assert retry == RetryMessage(message=f"{known} (bad \N{REPLACEMENT CHARACTER})")
    assert listener.retry() == f"{known} (bad \N{REPLACEMENT CHARACTER})"
    assert error is not None
    assert error.message == (
        "The agent failed (exit code 1): no \N{REPLACEMENT CHARACTER} \N{REPLACEMENT CHARACTER}"
    )


def test_a_cli_that_gives_up_after_refusals_was_refused() -> None:
    listener = CliListener(CODEX, ID, resumed=False)
    messages_of(
        listener,
        [
            {"type": "error", "message": "Reconnecting... 1/5 (401 Unauthorized)"},
            {"type": "turn.failed", "error": {"message": "no more"}},
        ],
    )

    error = listener.failure(1, "")

    assert error is not None
    assert error.code == ErrorCode.ENGINE_UNAUTHENTICATED


@pytest.mark.parametrize(
    ("dialect", "exit_code", "event"),
    [
        (CODEX, 1, {"type": "turn.failed", "error": {"message": "status 403 Forbidden: no"}}),
        (GEMINI, 145, {"type": "result", "status": "error", "error": {"message": "no"}}),
        (GEMINI, 147, {"type": "result", "status": "error", "error": {"message": "no"}}),
        (
            CLAUDE,
            1,
            {
                "type": "result",
                "is_error": True,
                "result": "Failed to authenticate. API Error: 403 no",
            },
        ),
    ],
)
def test_a_cli_that_gives_up_at_the_first_refusal_was_refused(
    dialect: CliDialect, exit_code: int, event: JsonObject
) -> None:
    listener = CliListener(dialect, ID, resumed=False)
    messages_of(listener, [event])

    error = listener.failure(exit_code, "")

    assert error is not None
    assert error.code == ErrorCode.ENGINE_UNAUTHENTICATED


def test_work_after_a_retry_shows_that_it_has_succeeded() -> None:
    listener = CliListener(CLAUDE, ID, resumed=False)

    messages_of(listener, [CLAUDE_RETRY, {"type": "assistant", "message": {"content": []}}])

    assert listener.retry() is None
