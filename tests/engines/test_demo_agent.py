"""The demo agent obeys the protocol, and its sessions survive its processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runrecovery_service.domain.run import JsonObject, Session
from runrecovery_service.engines import demo_agent, jsonl
from runrecovery_service.engines.dialect import (
    AskMessage,
    Message,
    ProgressMessage,
    ResultMessage,
    Resumed,
    RunContext,
    SessionMessage,
)
from support.engines import REPOSITORY
from support.questions import answered

Start = Callable[..., subprocess.Popen[bytes]]

TWO_QUESTIONS: JsonObject = {
    "questions": [
        {"kind": "confirm", "prompt": "Go on?", "options": ["yes", "no"]},
        {"prompt": "Where to?"},
    ],
    "result": {"summary": "done"},
}


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts demo agents; kills those that still live at the end."""
    started: list[subprocess.Popen[bytes]] = []

    def make(profile: str, message: bytes) -> subprocess.Popen[bytes]:
        agent = subprocess.Popen(
            [sys.executable, "-m", demo_agent.__name__, "--profile", profile],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        started.append(agent)
        assert agent.stdin is not None
        agent.stdin.write(message)
        return agent

    yield make
    for agent in started:
        agent.kill()
        agent.wait()
        for pipe in (agent.stdin, agent.stdout, agent.stderr):
            assert pipe is not None
            pipe.close()


def task(workspace: Path, given: JsonObject) -> RunContext:
    return RunContext(run_id="r-1", attempt=1, input=given, workspace=str(workspace))


def next_message(agent: subprocess.Popen[bytes]) -> Message:
    """Return the next message that is not progress."""
    assert agent.stdout is not None
    while True:
        message = jsonl.parse(agent.stdout.readline())
        if not isinstance(message, ProgressMessage):
            return message


def turn(start: Start, task: RunContext, session: str | None, reply: str) -> tuple[str, Message]:
    """Run one process of a resumable run; return its session and its last message."""
    if session is None:
        agent = start("resumable", jsonl.start_message(task))
        number = 0
    else:
        number = int(reply.removeprefix("answer "))
        held = Session(type="jsonl", handle=session, turn=number)
        agent = start(
            "resumable",
            jsonl.resume_message(task, Resumed(session=held, reply=answered(number, reply))),
        )
    named, then = next_message(agent), next_message(agent)
    assert agent.wait(30) == 0
    assert isinstance(named, SessionMessage)
    return named.value, then


def test_a_resumable_agent_keeps_its_session_over_several_processes(
    start: Start, tmp_path: Path
) -> None:
    work = task(tmp_path, TWO_QUESTIONS)

    session, first = turn(start, work, None, "")
    same, second = turn(start, work, session, "answer 1")
    still, last = turn(start, work, session, "answer 2")

    assert session == same == still
    assert isinstance(first, AskMessage)
    assert first.question.prompt == "Go on?"
    assert isinstance(second, AskMessage)
    assert second.question.prompt == "Where to?"
    assert last == ResultMessage(output={"summary": "done", "answers": ["answer 1", "answer 2"]})


def test_a_reply_that_is_delivered_twice_counts_once(start: Start, tmp_path: Path) -> None:
    work = task(tmp_path, TWO_QUESTIONS)
    session, _ = turn(start, work, None, "")

    turn(start, work, session, "answer 1")
    _, again = turn(start, work, session, "answer 1")

    assert isinstance(again, AskMessage)
    assert again.question.prompt == "Where to?"


def test_a_lost_session_is_refused(start: Start, tmp_path: Path) -> None:
    lost = Session(type="jsonl", handle="0" * 32, turn=1)
    work = task(tmp_path, TWO_QUESTIONS)

    agent = start(
        "resumable", jsonl.resume_message(work, Resumed(session=lost, reply=answered(1, "x")))
    )
    _, stderr = agent.communicate(timeout=30)

    assert agent.returncode == demo_agent.EXIT_NO_SESSION
    assert b"cannot be resumed" in stderr


def test_a_sticky_agent_answers_in_one_process(start: Start, tmp_path: Path) -> None:
    agent = start("sticky", jsonl.start_message(task(tmp_path, TWO_QUESTIONS)))
    assert agent.stdin is not None

    first = next_message(agent)
    agent.stdin.write(jsonl.reply_message(answered(1, "yes")))
    second = next_message(agent)
    agent.stdin.write(jsonl.reply_message(answered(2, {"city": "Ulm"})))
    last = next_message(agent)

    assert isinstance(first, AskMessage)
    assert isinstance(second, AskMessage)
    assert last == ResultMessage(output={"summary": "done", "answers": ["yes", {"city": "Ulm"}]})
    assert agent.wait(30) == 0


def test_a_sticky_agent_exits_when_its_input_is_closed(start: Start, tmp_path: Path) -> None:
    agent = start("sticky", jsonl.start_message(task(tmp_path, TWO_QUESTIONS)))
    assert agent.stdin is not None
    next_message(agent)

    agent.stdin.close()

    assert agent.wait(30) == demo_agent.EXIT_NO_REPLY


def test_the_agent_fails_if_its_input_says_so(start: Start, tmp_path: Path) -> None:
    agent = start("resumable", jsonl.start_message(task(tmp_path, {"fail": "exit3"})))

    _, stderr = agent.communicate(timeout=30)

    assert agent.returncode == 3
    assert b"told to fail" in stderr


def test_the_agent_finishes_its_work_after_its_pipes_are_closed(
    start: Start, tmp_path: Path
) -> None:
    agent = start("resumable", jsonl.start_message(task(tmp_path, {"work_s": 0.4})))
    assert isinstance(next_message(agent), SessionMessage)
    assert agent.stdin is not None
    assert agent.stdout is not None

    agent.stdin.close()
    agent.stdout.close()

    assert agent.wait(30) == 0


def test_the_agent_ignores_sigterm_if_its_input_says_so(start: Start, tmp_path: Path) -> None:
    given: JsonObject = {"ignore_sigterm": True, "work_s": 0.5, "result": {"kept": "on"}}
    agent = start("resumable", jsonl.start_message(task(tmp_path, given)))
    assert agent.stdout is not None
    next_message(agent)
    agent.stdout.readline()  # it works, so it has set its handler

    agent.terminate()

    assert next_message(agent) == ResultMessage(output={"kept": "on", "answers": []})


def test_sigterm_ends_the_agent(start: Start, tmp_path: Path) -> None:
    agent = start("resumable", jsonl.start_message(task(tmp_path, {"hold": True})))
    next_message(agent)

    agent.terminate()

    assert agent.wait(30) == -15


@pytest.mark.parametrize("nonsense", [b"hello\n", b"[]\n", b""])
def test_input_that_is_no_message_has_an_exit_code_of_its_own(
    start: Start, nonsense: bytes
) -> None:
    agent = start("resumable", nonsense)

    agent.communicate(timeout=30)

    assert agent.returncode == demo_agent.EXIT_BAD_INPUT


@pytest.mark.parametrize("words", [[], ["--profile"], ["--profile", "other"]])
def test_a_command_line_without_a_profile_is_refused_with_the_usage(words: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", demo_agent.__name__, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )

    assert (done.returncode, done.stdout) == (demo_agent.EXIT_USAGE, "")
    assert done.stderr == "usage: demo_agent --profile resumable|sticky\n"


def test_the_agent_imports_no_heavy_library() -> None:
    code = (
        f"import sys; sys.path.append({str(REPOSITORY / 'service')!r});"
        "import runrecovery_service.engines.demo_agent;"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    loaded = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()

    assert "runrecovery_service" in loaded
    heavy = {"asyncio", "grpc", "google", "peewee", "structlog"}
    heavy |= {"argparse", "pathlib", "subprocess", "typing", "uuid"}
    assert not heavy & set(loaded)
