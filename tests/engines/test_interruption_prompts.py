"""The prompt of a new process that completes an interrupted turn."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Final

import pytest
from runrecovery_service.domain.interruption import Interruption, InterruptionCause
from runrecovery_service.domain.run import Session
from runrecovery_service.engines import jsonl, prompts
from runrecovery_service.engines.claude import CLAUDE
from runrecovery_service.engines.codex import CODEX
from runrecovery_service.engines.dialect import Resumed, RunContext
from runrecovery_service.engines.gemini import GEMINI
from support.questions import answered

HANDLE: Final = "01234567-89ab-cdef-0123-456789abcdef"
TASK: Final = RunContext(run_id="r", attempt=1, input={"prompt": "Build it."}, workspace="/w")
ONCE: Final = Interruption(
    at=datetime(2026, 11, 29, 12, tzinfo=UTC), cause=InterruptionCause.RESTART, times=1
)
GO_ON: Final = (
    " Commands that you had started may have run completely, partly or not at all, although you see"
    " no result of them here. Before you continue, look at your workspace and at everything else"
    " that your commands change. Do not repeat what has already taken effect. Then complete your"
    " turn."
)
FOUND: Final = (
    " At 2026-11-29 12:00:00 UTC your process was found to have been ended in the middle of your"
    " turn."
)


def prompt_of(interruption: Interruption, task: RunContext = TASK) -> str:
    resumed = Resumed(
        session=Session(type="claude", handle=HANDLE, turn=1), interruption=interruption
    )
    return CLAUDE.open(task, resumed).input.decode()


@pytest.mark.parametrize(
    ("cause", "begins"),
    [
        (InterruptionCause.RESTART, "The service that runs you was restarted."),
        (InterruptionCause.SUSPENSION, "The machine that you run on stood still for a while."),
        (InterruptionCause.SHIM_LOST, "The process that supervised you was lost."),
    ],
)
def test_the_notice_names_the_cause_and_what_to_check(
    cause: InterruptionCause, begins: str
) -> None:
    assert prompts.interruption_notice(replace(ONCE, cause=cause)) == begins + FOUND + GO_ON


def test_a_repeated_interruption_is_counted_in_the_notice() -> None:
    notice = prompts.interruption_notice(replace(ONCE, times=2))

    assert f"{FOUND} This is interruption 2 of this turn.{GO_ON}" in notice


def test_the_task_follows_the_notice_because_the_session_may_lack_it() -> None:
    prompt = prompt_of(ONCE)

    assert prompt.startswith("The service that runs you was restarted.")
    _, _, repeated = prompt.partition("The message that began this turn, in case it is missing")
    assert repeated == f" above:\n\n{prompts.first_prompt({'prompt': 'Build it.'})}"


def test_the_reply_of_the_interrupted_turn_follows_the_notice() -> None:
    prompt = prompt_of(replace(ONCE, reply=answered(2, "blue")))

    assert prompt.endswith("in case it is missing above:\n\nThe user answers:\n\nblue\n")
    assert "Build it." not in prompt


def test_a_long_task_is_not_repeated() -> None:
    long = replace(TASK, input={"prompt": "x" * 16_384})

    assert prompt_of(ONCE, long) == (f"The service that runs you was restarted.{FOUND}{GO_ON}\n")


@pytest.mark.parametrize("cli", [CODEX, GEMINI, CLAUDE], ids=["codex", "gemini", "claude"])
def test_every_cli_resumes_its_session_with_the_notice(cli: object) -> None:
    assert isinstance(cli, type(CLAUDE))
    session = Session(type=cli.session_type, handle=HANDLE, turn=1)

    opening = cli.open(TASK, Resumed(session=session, interruption=ONCE))

    assert HANDLE in opening.arguments
    assert any("resume" in word for word in opening.arguments)
    assert opening.input.startswith(b"The service that runs you was restarted. At 2026-11-29")
    assert opening.handle is None


def test_a_json_lines_engine_gets_the_interruption_in_place_of_a_reply() -> None:
    session = Session(type="jsonl", handle="h", turn=1)

    line = jsonl.resume_message(TASK, Resumed(session=session, interruption=ONCE))

    assert json.loads(line) == {
        "type": "resume",
        "run_id": "r",
        "attempt": 1,
        "input": {"prompt": "Build it."},
        "workspace": "/w",
        "session": {"type": "jsonl", "value": "h"},
        "interrupted": {
            "at": "2026-11-29T12:00:00+00:00",
            "cause": "restart",
            "times": 1,
            "notice": f"The service that runs you was restarted.{FOUND}{GO_ON}",
        },
    }


def test_the_reply_that_a_json_lines_engine_had_is_part_of_the_interruption() -> None:
    session = Session(type="jsonl", handle="h", turn=1)
    interruption = replace(ONCE, reply=answered(3, {"colour": "blue"}))

    told = json.loads(
        jsonl.resume_message(TASK, Resumed(session=session, interruption=interruption))
    )

    assert told["interrupted"]["reply"] == {
        "interaction_id": 3, "response": {"colour": "blue"},
    }  # fmt: skip
    assert "reply" not in told
