"""At the end of a turn the service counts the model calls in the session file."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from runrecovery_service.domain.run import Profile, RunEventKind, RunStatus
from runrecovery_service.domain.usage import SessionUsage, Usage
from runrecovery_service.engines.catalog import Engine
from runrecovery_service.engines.codex import CODEX
from runrecovery_service.engines.sessions import sessions_of
from runrecovery_service.storage import events, usage
from support.engines import AGENTS
from support.waiting import until_async

from .conftest import Execution, NewExecution

ONE_CALL = Usage(
    input_tokens=100, cached_input_tokens=60, output_tokens=10, reasoning_output_tokens=4
)


def codex(home: Path) -> Engine:
    """Return an engine with a pretended Codex."""
    env = {"CODEX_HOME": str(home), "HOME": str(home)}
    return Engine(
        name="codex",
        command=(sys.executable, "-I", "-S", str(AGENTS / "pretend_cli.py"), "codex"),
        profile=Profile.RESUMABLE,
        dialect=replace(CODEX, trusted=True),
        env_allow=("PATH",),
        env=env,
        max_concurrent=None,
        session_file=None,
        sessions=sessions_of("codex", env),
    )


def _prepare(folder: Path) -> None:
    folder.mkdir()
    (folder / "stop-result").touch()


async def stopped_after_a_call(execution: Execution, folder: Path) -> str:
    """Create a run, and return its id once its agent has stored a call and hangs."""
    _prepare(folder)
    run_id = await execution.create("codex", {"prompt": f"STEPS {folder}"})

    async def has_stopped() -> bool:
        return (folder / "stopped").exists()

    await until_async(has_stopped, "the agent hangs")
    return run_id


def reasons(logged: Sequence[structlog.typing.EventDict]) -> list[str]:
    name = "execution.session_usage_not_read"
    return [line["reason"] for line in logged if line["event"] == name]


async def test_a_turn_that_is_ended_by_a_cancel_has_the_calls_in_its_session(
    new_execution: NewExecution, tmp_path: Path
) -> None:
    execution = await new_execution(more=[codex(tmp_path / "cli")])
    run_id = await stopped_after_a_call(execution, tmp_path / "steps")
    assert (await execution.get(run_id)).usage is None

    await execution.cancel(run_id)
    run = await execution.until_ended(run_id)

    assert (run.status, run.usage) == (RunStatus.CANCELED, ONE_CALL)
    found = await execution.storage.read(lambda db: events.events_after(db, run, 0))
    assert [(event.kind, event.usage) for event in found][-1] == (RunEventKind.CANCELED, ONE_CALL)


async def test_a_question_records_the_usage_of_its_session_for_the_next_turn(
    new_execution: NewExecution, tmp_path: Path
) -> None:
    execution = await new_execution(more=[codex(tmp_path / "cli")])
    run_id = await execution.create("codex", {"prompt": "Ask."})

    run = await execution.until_status(run_id, RunStatus.WAITING_USER, RunStatus.FAILED)

    assert run.usage == ONE_CALL
    known = await execution.storage.read(lambda db: usage.of_session(db, run.key))
    assert known == SessionUsage(total=ONE_CALL, stored=ONE_CALL)


@pytest.mark.parametrize("damage", ["gone", "refused"])
async def test_a_turn_whose_session_cannot_be_read_has_no_usage_and_the_log_says_why(
    new_execution: NewExecution, tmp_path: Path, damage: str
) -> None:
    execution = await new_execution(more=[codex(tmp_path / "cli")])
    run_id = await stopped_after_a_call(execution, tmp_path / "steps")
    (file,) = (tmp_path / "cli").glob("sessions/*/*/*/rollout-*.jsonl")
    if damage == "gone":
        shutil.rmtree(tmp_path / "cli" / "sessions")
    else:
        file.unlink()
        os.mkfifo(file)

    with structlog.testing.capture_logs() as logged:
        await execution.cancel(run_id)
        run = await execution.until_ended(run_id)

    assert (run.status, run.usage) == (RunStatus.CANCELED, None)
    assert reasons(logged) == [{"gone": "missing", "refused": "not_a_file"}[damage]]
