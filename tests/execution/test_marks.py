"""A question is recorded with what its session file is once nothing writes to it any more."""

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
from runrecovery_service.execution import launcher
from runrecovery_service.process.ending import Ending
from runrecovery_service.process.sweep import end_trees
from runrecovery_service.storage import reopening
from support.engines import AGENTS

from .conftest import NewFloor

AGENT: Final = (sys.executable, "-I", "-S", str(AGENTS / "asks_and_writes_on.py"))


def writer(home: Path, sessions: CliSessions | None = None, **more: Any) -> Engine:
    """An engine with the sessions of Claude Code; `sessions`: looked for elsewhere."""
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
    """Looks into a place that does not answer until it is released."""

    def __init__(self, home: Path) -> None:
        self.released = threading.Event()
        self.looks: list[bool] = []
        """Whether each look was on a thread that nobody waits for."""
        claude = sessions_of("claude", {"CLAUDE_CONFIG_DIR": str(home)})
        self.sessions = replace(claude, finder=lambda: self)

    def paths(self, stored: StoredHandle) -> Iterator[Path]:
        """Hang."""
        self.looks.append(threading.current_thread().daemon)
        self.released.wait()
        yield from ()


def not_seen(told: Sequence[Mapping[str, Any]]) -> list[str]:
    """The reasons of the warnings that a session was not seen."""
    return [line["reason"] for line in told if line["event"] == "execution.session_not_seen"]


async def test_a_mark_is_taken_when_the_whole_tree_has_ended(
    new_floor: NewFloor, tmp_path: Path
) -> None:
    engine = writer(tmp_path / "cli")
    floor = await new_floor(more=[engine])
    run_id = await floor.create("writer")

    run = await floor.until_status(run_id, RunStatus.WAITING_USER, RunStatus.FAILED)

    (file,) = (tmp_path / "cli").rglob("*.jsonl")
    found = file.stat()
    assert run.error is None
    assert run.session is not None
    candidate = await floor.storage.read_row(reopening.find_candidate, run_id)
    assert candidate.mark == SessionFingerprint(found.st_size, found.st_mtime_ns)
    stored = StoredHandle(
        handle=run.session.handle,
        workspace=floor.launcher.workspaces.workspace(run.key, run.attempt),
        fingerprint=candidate.mark,
    )
    assert engine.sessions is not None
    assert list(engine.sessions.check([stored])) == [FOUND[SessionReason.UNCHANGED]]


async def test_an_engine_of_which_it_is_not_known_where_sessions_lie_has_no_mark(
    new_floor: NewFloor,
) -> None:
    floor = await new_floor()
    run_id = await floor.create("resumable", {"questions": [{}]})

    await floor.until_status(run_id, RunStatus.WAITING_USER)

    assert (await floor.storage.read_row(reopening.find_candidate, run_id)).mark is None


# -- what cannot be seen -----------------------------------------------------------------------

ENDS: Final = (RunStatus.WAITING_USER, RunStatus.SUCCEEDED, RunStatus.FAILED)


async def test_a_session_that_lies_elsewhere_is_told_once_and_gone_on_with(
    new_floor: NewFloor, tmp_path: Path
) -> None:
    looked_at = tmp_path / "looked at"
    (looked_at / "projects").mkdir(parents=True)
    sessions = sessions_of("claude", {"CLAUDE_CONFIG_DIR": str(looked_at)})
    floor = await new_floor(more=[writer(tmp_path / "cli", sessions)])

    with structlog.testing.capture_logs() as told:
        run_id = await floor.create("writer")
        await floor.until_status(run_id, RunStatus.WAITING_USER, RunStatus.FAILED)
        assert not_seen(told) == ["missing"]
        await floor.reply(run_id, "there")
        ended = await floor.until(run_id, lambda run: run.turn == 2 and run.status in ENDS)

    assert (await floor.lease(run_id, turn=2)).pid is not None  # it was launched
    assert ended.error is None or ended.error.code != "SESSION_RESUME_FAILED"


async def test_a_session_that_was_seen_and_is_gone_is_not_gone_on_with(
    new_floor: NewFloor, tmp_path: Path
) -> None:
    floor = await new_floor(more=[writer(tmp_path / "cli")])
    with structlog.testing.capture_logs() as told:
        run_id = await floor.create("writer")
        await floor.until_status(run_id, RunStatus.WAITING_USER, RunStatus.FAILED)
    (file,) = (tmp_path / "cli").rglob("*.jsonl")
    file.unlink()

    await floor.reply(run_id, "there")
    ended = await floor.until_ended(run_id)

    assert not_seen(told) == []
    assert ended.error is not None
    assert ended.error.code == "SESSION_RESUME_FAILED"


@pytest.mark.parametrize("unknown", UnknownSession)
async def test_storage_that_does_not_answer_keeps_no_turn(
    new_floor: NewFloor, tmp_path: Path, unknown: UnknownSession
) -> None:
    hanging = Hanging(tmp_path / "cli")
    engine = writer(tmp_path / "cli", hanging.sessions, unknown_session=unknown)
    floor = await new_floor(more=[engine], session_check_s=0.05)
    try:
        with structlog.testing.capture_logs() as told:
            run_id = await floor.create("writer")
            asked = await floor.until_status(run_id, RunStatus.WAITING_USER, RunStatus.FAILED)
            assert asked.error is None
            assert (await floor.storage.read_row(reopening.find_candidate, run_id)).mark is None
            await floor.reply(run_id, "there")
            ended = await floor.until(run_id, lambda run: run.turn == 2 and run.status in ENDS)
    finally:
        hanging.released.set()

    assert not_seen(told)[:2] == ["not_answered", "not_answered"]
    assert hanging.looks
    assert all(hanging.looks)
    refused = ended.error is not None and ended.error.code == "SESSION_RESUME_FAILED"
    assert refused is (unknown is UnknownSession.FAIL)


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
async def test_a_file_that_may_still_be_written_gets_no_mark(
    new_floor: NewFloor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(*given: Any, **more: Any) -> Mapping[int, Ending]:
        return {key: replace(one, gone=False) for key, one in end_trees(*given, **more).items()}

    monkeypatch.setattr(launcher, "end_trees", stuck)
    floor = await new_floor(more=[writer(tmp_path / "cli")])

    with structlog.testing.capture_logs() as told:
        run_id = await floor.create("writer")
        await floor.until_status(run_id, RunStatus.WAITING_USER, RunStatus.FAILED)

    assert not_seen(told) == ["not_ended"]
    assert (await floor.storage.read_row(reopening.find_candidate, run_id)).mark is None
