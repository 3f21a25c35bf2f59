"""How the agent CLIs are called: arguments, and input."""

from __future__ import annotations

import uuid
from dataclasses import replace

import pytest
from engines.agent_cli_turns import DIALECTS, ID, resumed, task
from runrecovery_service.domain.run import Session
from runrecovery_service.engines.claude import CLAUDE
from runrecovery_service.engines.cli_dialect import CliDialect
from runrecovery_service.engines.codex import CODEX
from runrecovery_service.engines.dialect import HandleUnusable, Resumed
from runrecovery_service.engines.gemini import GEMINI
from support.questions import answered


def test_codex_is_called_for_one_turn_with_json_events() -> None:
    first = CODEX.open(task({"prompt": "x"}), None)
    again = CODEX.open(task({"prompt": "x"}), resumed(CODEX, answered(1, "y")))

    assert first.arguments == ("exec", "--json", "-")
    assert again.arguments == ("exec", "resume", ID, "--json", "-")
    assert first.handle is None


def test_a_codex_that_may_trust_is_called_without_the_check_for_a_git_repository() -> None:
    trusting = replace(CODEX, trusted=True)

    for known in (None, resumed(CODEX, answered(1, "y"))):
        assert trusting.open(task({}), known).arguments[-1] == "--skip-git-repo-check"


def test_gemini_is_called_for_one_turn_with_json_events() -> None:
    first = GEMINI.open(task({"prompt": "x"}), None)
    again = GEMINI.open(task({"prompt": "x"}), resumed(GEMINI, answered(1, "y")))

    assert first.arguments == ("--output-format", "stream-json")
    assert again.arguments == ("--resume", ID, "--output-format", "stream-json")


def test_claude_is_called_with_a_new_session_id_each_time() -> None:
    openings = [CLAUDE.open(task({"prompt": "x"}), None) for _ in range(2)]

    for opening in openings:
        assert opening.handle is not None
        assert uuid.UUID(opening.handle).version == 4
        assert opening.arguments[-2:] == ("--session-id", opening.handle)
    assert openings[0].handle != openings[1].handle


def test_claude_resumes_by_the_recorded_handle() -> None:
    again = CLAUDE.open(task({"prompt": "x"}), resumed(CLAUDE, answered(1, "y")))

    assert again.arguments[-2:] == ("--resume", ID)
    assert again.handle is None


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(
    "handle", ["--yolo", "-", "", "latest", "1", f"{ID}\n", ID.upper(), f"{ID}0"]
)
def test_a_handle_that_is_no_uuid_is_refused(dialect: CliDialect, handle: str) -> None:
    with pytest.raises(HandleUnusable):
        dialect.open(task({}), resumed(dialect, answered(1, "y"), handle))


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_session_of_another_engine_is_not_resumed(dialect: CliDialect) -> None:
    foreign = Resumed(session=Session(type="jsonl", handle=ID, turn=1), reply=answered(1, "y"))

    with pytest.raises(HandleUnusable):
        dialect.open(task({}), foreign)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_prompt_is_in_standard_input_and_in_no_argument(dialect: CliDialect) -> None:
    opening = dialect.open(task({"prompt": "hunter2 ß"}), None)

    assert "hunter2 ß" in opening.input.decode()
    assert not any("hunter2" in word for word in opening.arguments)


def test_the_repr_of_an_opening_contains_no_secret() -> None:
    texts = [
        repr(dialect.open(task({"prompt": "hunter2"}), known))
        for dialect in DIALECTS
        for known in (None, resumed(dialect, answered(1, "hunter2")))
    ]

    assert not any(ID in text or "hunter2" in text for text in texts)
    assert "session-id" not in "".join(texts)
