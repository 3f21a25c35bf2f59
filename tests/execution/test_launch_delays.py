"""A launch for which the system lacks resources is tried again, and fails no run."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from runrecovery_service.agents.workspaces import Workspaces
from runrecovery_service.domain.run import Profile, Run, RunStatus
from runrecovery_service.engines.catalog import Engine
from runrecovery_service.execution import launcher
from runrecovery_service.process import launch, processes
from runrecovery_service.process.launch_errors import LaunchDelayed, ShimLost, launch_error
from runrecovery_service.process.shim_events import NotStarted, parse_event
from runrecovery_service.process.shimmed_process import ShimmedProcess
from runrecovery_service.storage import runs, turn_starts
from runrecovery_service.trust import files

from .conftest import QUICK, Execution, NewExecution, until

LACKING = [errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.ENOMEM]


def twice(error: Callable[[], Exception], use: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function so that its first two calls raise."""
    left = [2]

    def call(*args: Any, **named: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise error()
        return use(*args, **named)

    return call


def in_turn(*uses: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose first call calls the first of `uses`, and so on."""
    left = iter(uses)

    def call(*args: Any, **named: Any) -> Any:
        return next(left)(*args, **named)

    return call


def lacking(number: int) -> Callable[[], OSError]:
    return lambda: OSError(number, os.strerror(number))


async def run_of(execution: Execution, engine: str = "quick") -> tuple[Run, list[str]]:
    """Run to the end; return the run, and the logged reasons of its delays."""
    with structlog.testing.capture_logs() as logs:
        run = await execution.until_ended(await execution.create(engine))
    delays = [line["reason"] for line in logs if line["event"] == "execution.launch_delayed"]
    return run, delays


@pytest.mark.parametrize("number", LACKING)
async def test_a_shim_that_cannot_start_for_lack_of_resources_is_started_later(
    execution: Execution, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "pipe", twice(lacking(number), os.pipe))

    run, delays = await run_of(execution)

    assert (run.status, run.error, run.attempt) == (RunStatus.SUCCEEDED, None, 1)
    assert delays == [f"{os.strerror(number)}: the shim"]


async def test_a_workspace_that_cannot_be_made_for_lack_of_resources_is_made_later(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workspaces, "prepare", twice(lacking(errno.EMFILE), Workspaces.prepare))

    run, delays = await run_of(execution)

    assert run.status is RunStatus.SUCCEEDED
    assert delays == ["cannot create the workspace: Too many open files"]


async def test_an_agent_that_could_not_be_forked_is_started_by_another_shim(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch is already recorded as RUNNING."""
    release = twice(lambda: LaunchDelayed("fork"), ShimmedProcess.release)
    monkeypatch.setattr(ShimmedProcess, "release", release)

    run, delays = await run_of(execution)

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"done": True})
    assert delays == ["fork"]
    launch = await execution.launch(run.run_id)
    assert (launch.state, launch.exit_code) == ("CLOSED", 0)


async def test_a_trust_file_that_cannot_be_edited_for_lack_of_resources_is_edited_later(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    engine = Engine(
        name="trusted",
        command=("/bin/sh", "-c", QUICK),
        profile=Profile.RESUMABLE,
        env_allow=("PATH",),
        env={"CODEX_HOME": str(home)},
        max_concurrent=None,
        session_file=None,
        trust="codex",
    )
    execution = await new_execution(more=[engine])
    monkeypatch.setattr(files, "edit", twice(lacking(errno.EMFILE), files.edit))

    run, delays = await run_of(execution, "trusted")

    assert run.status is RunStatus.SUCCEEDED
    assert len(delays) == 1
    assert "Too many open files" in delays[0]


async def test_a_delayed_launch_that_is_canceled_is_not_started(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise LaunchDelayed("no memory")

    monkeypatch.setattr(processes, "prepare", never)
    run_id = await execution.create("quick")

    async def is_followed() -> bool:
        return execution.dispatcher.slots_in_use == 1

    await until(is_followed)
    await execution.cancel(run_id)

    assert (await execution.until_ended(run_id)).status is RunStatus.CANCELED
    await execution.until_free(execution.dispatcher.capacity)


async def test_a_run_whose_cancel_came_before_its_turn_was_known_never_starts(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The turn is taken and canceled in one commit, so only the store has the cancel."""
    take, release = turn_starts.take_next, ShimmedProcess.release
    released: list[ShimmedProcess] = []

    def take_and_cancel(db: Any, **named: Any) -> Any:
        turn = take(db, **named)
        if turn is not None:
            runs.cancel(
                db,
                turn.run.run_id,
                owner=execution.owner,
                etag=None,
                receipt=None,
                now=named["now"],
            )
        return turn

    def record(process: ShimmedProcess, deadline_ns: int) -> None:
        released.append(process)
        release(process, deadline_ns)

    monkeypatch.setattr(turn_starts, "take_next", take_and_cancel)
    monkeypatch.setattr(ShimmedProcess, "release", record)

    run = await execution.until_ended(await execution.create("holds"))

    assert (run.status, released) == (RunStatus.CANCELED, [])
    await execution.until_free(execution.dispatcher.capacity)


async def test_every_try_of_a_launch_uses_one_workspace(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "prepare", twice(lacking(errno.EMFILE), launch.prepare))

    run, delays = await run_of(execution)

    assert (run.status, len(delays)) == (RunStatus.SUCCEEDED, 1)
    attempts = execution.launcher.workspaces.attempt(run.key, 1).parent
    assert [folder.name for folder in attempts.iterdir()] == ["1"]


async def test_an_error_other_than_a_lack_of_resources_fails_the_launch(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Workspaces, "prepare", twice(lacking(errno.EACCES), Workspaces.prepare))

    run, delays = await run_of(execution)

    assert run.error is not None
    assert (run.error.code, delays) == ("LAUNCH_FAILED", [])


def test_a_shim_reports_which_resource_is_missing() -> None:
    event = parse_event("refused 11 fork")

    assert isinstance(event, NotStarted)
    assert (event.reason, event.errno) == ("Resource temporarily unavailable: fork", 11)
    assert isinstance(launch_error(OSError(11, ""), "fork"), LaunchDelayed)
    assert not isinstance(launch_error(OSError(errno.ENOENT, ""), "gone"), LaunchDelayed)


async def test_a_shim_that_is_lost_at_its_gate_is_replaced(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shim for which the system has no descriptor ends without an event."""
    lost = twice(lambda: ShimLost("the shim ended"), launch.prepare)
    monkeypatch.setattr(processes, "prepare", lost)

    run, delays = await run_of(execution)

    assert (run.status, run.error, run.attempt) == (RunStatus.SUCCEEDED, None, 1)
    assert delays == ["the shim ended"]


def lose(*_: object, **__: object) -> ShimmedProcess:
    raise ShimLost("the shim ended")


async def test_a_shim_that_is_lost_after_a_failed_fork_of_another_is_replaced(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shim could not fork its agent, so nothing of the agent has run."""
    steps = in_turn(launch.prepare, lose, launch.prepare, launch.prepare)
    monkeypatch.setattr(processes, "prepare", steps)
    release = twice(lambda: LaunchDelayed("fork"), ShimmedProcess.release)
    monkeypatch.setattr(ShimmedProcess, "release", release)

    run, delays = await run_of(execution)

    assert (run.status, run.error, run.attempt) == (RunStatus.SUCCEEDED, None, 1)
    assert delays == ["fork"]


async def test_shims_that_are_lost_with_another_delay_between_them_do_not_fail_the_launch(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lack(*_: object, **__: object) -> ShimmedProcess:
        raise LaunchDelayed("no memory")

    steps = in_turn(*[lose] * 4, lack, *[lose] * 4, launch.prepare)
    monkeypatch.setattr(processes, "prepare", steps)
    monkeypatch.setattr(launcher, "DELAY_MOST_S", launcher.DELAY_FIRST_S)

    run, _ = await run_of(execution)

    assert (run.status, run.error, run.attempt) == (RunStatus.SUCCEEDED, None, 1)


async def test_five_shims_lost_in_a_row_fail_the_launch(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[None] = []

    def lose(*_: object, **__: object) -> None:
        tries.append(None)
        raise ShimLost("the shim ended")

    monkeypatch.setattr(processes, "prepare", lose)

    run, _ = await run_of(execution)

    assert run.error is not None
    assert (run.error.code, len(tries)) == ("LAUNCH_FAILED", 5)
