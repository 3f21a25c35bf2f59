"""A question has the fingerprint of its session file after the processes have ended."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
import structlog
from runrecovery_service.domain.run import Profile, RunStatus
from runrecovery_service.domain.session_check import (
    SessionFingerprint,
    SessionReason,
    StoredHandle,
    UnknownSession,
)
from runrecovery_service.engines.catalog import Engine
from runrecovery_service.engines.sessions import sessions_of
from runrecovery_service.engines.sessions.files import CliSessions
from runrecovery_service.engines.sessions.lines import FOUND
from runrecovery_service.process import processes
from runrecovery_service.process.ending_result import Ending
from runrecovery_service.process.tree_ending import end_trees
from runrecovery_service.storage import reopening
from support.engines import AGENTS

from .conftest import NewExecution

AGENT: Final = (sys.executable, "-I", "-S", str(AGENTS / "asks_and_writes_on.py"))


def writer(home: Path, sessions: CliSessions | None = None, **more: Any) -> Engine:
    """Return an engine with sessions of Claude Code; `sessions` is the place to search for them."""
    return Engine(
        name="writer",
        command=(*AGENT, str(home)),
        profile=Profile.RESUMABLE,
        env_allow=("PATH",),
        max_concurrent=None,
        session_file=None,
        sessions=sessions or sessions_of("claude", {"CLAUDE_CONFIG_DIR": str(home)}),
        **more,
    )


class Hanging:
    """A search for sessions that does not answer until it is released."""

    def __init__(self, home: Path) -> None:
        self.released = threading.Event()
        self.looks: list[bool] = []
        """For each search, whether it was on a daemon thread."""
        claude = sessions_of("claude", {"CLAUDE_CONFIG_DIR": str(home)})
        self.sessions = replace(claude, finder=lambda: self)

    def paths(self, stored: StoredHandle) -> Iterator[Path]:
        """Hang."""
        self.looks.append(threading.current_thread().daemon)
        self.released.wait()
        yield from ()


def not_seen(logged: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the reasons of the warnings that a session was not found."""
    return [line["reason"] for line in logged if line["event"] == "execution.session_not_seen"]


async def test_the_fingerprint_is_taken_after_the_whole_tree_has_ended(
    new_execution: NewExecution, tmp_path: Path
) -> None:
    engine = writer(tmp_path / "cli")
    execution = await new_execution(more=[engine])
    run_id = await execution.create("writer")

    run = await execution.until_status(run_id, RunStatus.WAITING_USER, RunStatus.FAILED)

    (file,) = (tmp_path / "cli").rglob("*.jsonl")
    found = file.stat()
    assert run.error is None
    assert run.session is not None
    candidate = await execution.storage.read_row(reopening.find_candidate, run_id)
    assert candidate.mark == SessionFingerprint(found.st_size, found.st_mtime_ns)
    stored = StoredHandle(
        handle=run.session.handle,
        workspace=execution.launcher.workspaces.workspace(run.key, run.attempt),
        fingerprint=candidate.mark,
    )
    assert engine.sessions is not None
    assert list(engine.sessions.check([stored])) == [FOUND[SessionReason.UNCHANGED]]


async def test_an_engine_without_a_known_session_location_has_no_fingerprint(
    new_execution: NewExecution,
) -> None:
    execution = await new_execution()
    run_id = await execution.create("resumable", {"questions": [{}]})

    await execution.until_status(run_id, RunStatus.WAITING_USER)

    assert (await execution.storage.read_row(reopening.find_candidate, run_id)).mark is None


# -- what cannot be seen -----------------------------------------------------------------------

ENDS: Final = (RunStatus.WAITING_USER, RunStatus.SUCCEEDED, RunStatus.FAILED)


async def test_a_session_that_was_never_found_is_logged_once_and_resumed(
    new_execution: NewExecution, tmp_path: Path
) -> None:
    looked_at = tmp_path / "looked at"
    (looked_at / "projects").mkdir(parents=True)
    sessions = sessions_of("claude", {"CLAUDE_CONFIG_DIR": str(looked_at)})
    execution = await new_execution(more=[writer(tmp_path / "cli", sessions)])

    with structlog.testing.capture_logs() as logged:
        run_id = await execution.create("writer")
        await execution.until_status(run_id, RunStatus.WAITING_USER, RunStatus.FAILED)
        assert not_seen(logged) == ["missing"]
        await execution.reply(run_id, "there")
        ended = await execution.until(run_id, lambda run: run.turn == 2 and run.status in ENDS)

    assert (await execution.launch(run_id, turn=2)).pid is not None  # it was launched
    assert ended.error is None or ended.error.code != "SESSION_RESUME_FAILED"


async def test_a_session_that_was_found_and_is_gone_is_not_resumed(
    new_execution: NewExecution, tmp_path: Path
) -> None:
    execution = await new_execution(more=[writer(tmp_path / "cli")])
    with structlog.testing.capture_logs() as logged:
        run_id = await execution.create("writer")
        await execution.until_status(run_id, RunStatus.WAITING_USER, RunStatus.FAILED)
    (file,) = (tmp_path / "cli").rglob("*.jsonl")
    file.unlink()

    await execution.reply(run_id, "there")
    ended = await execution.until_ended(run_id)

    assert not_seen(logged) == []
    assert ended.error is not None
    assert ended.error.code == "SESSION_RESUME_FAILED"


@pytest.mark.parametrize("unknown", UnknownSession)
async def test_a_file_system_that_does_not_answer_delays_no_turn(
    new_execution: NewExecution, tmp_path: Path, unknown: UnknownSession
) -> None:
    hanging = Hanging(tmp_path / "cli")
    engine = writer(tmp_path / "cli", hanging.sessions, unknown_session=unknown)
    execution = await new_execution(more=[engine], session_check_s=0.05)
    try:
        with structlog.testing.capture_logs() as logged:
            run_id = await execution.create("writer")
            asked = await execution.until_status(run_id, RunStatus.WAITING_USER, RunStatus.FAILED)
            assert asked.error is None
            assert (await execution.storage.read_row(reopening.find_candidate, run_id)).mark is None
            await execution.reply(run_id, "there")
            ended = await execution.until(run_id, lambda run: run.turn == 2 and run.status in ENDS)
    finally:
        hanging.released.set()

    assert not_seen(logged)[:2] == ["not_answered", "not_answered"]
    assert hanging.looks
    assert all(hanging.looks)
    refused = ended.error is not None and ended.error.code == "SESSION_RESUME_FAILED"
    assert refused is (unknown is UnknownSession.FAIL)


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
async def test_a_session_file_that_may_still_be_written_gets_no_fingerprint(
    new_execution: NewExecution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(*given: Any, **more: Any) -> Mapping[int, Ending]:
        return {key: replace(one, gone=False) for key, one in end_trees(*given, **more).items()}

    monkeypatch.setattr(processes, "end_trees", stuck)
    execution = await new_execution(more=[writer(tmp_path / "cli")])

    with structlog.testing.capture_logs() as logged:
        run_id = await execution.create("writer")
        await execution.until_status(run_id, RunStatus.WAITING_USER, RunStatus.FAILED)

    assert not_seen(logged) == ["not_ended"]
    assert (await execution.storage.read_row(reopening.find_candidate, run_id)).mark is None
