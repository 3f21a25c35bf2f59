"""Runs whose shim, wait or dispatcher ends before their processes."""

from __future__ import annotations

import asyncio
import gc
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from runrecovery_service.agents.output import OutputChannel
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.run import Profile, Run, RunStatus
from runrecovery_service.engines.catalog import Engine
from runrecovery_service.engines.dialect import AskMessage
from runrecovery_service.execution import (
    agent_io,
    supervisor,
    turn_state,
)
from runrecovery_service.execution.turn_state import Signal
from runrecovery_service.process import processes
from runrecovery_service.process.launch import prepare
from runrecovery_service.process.launch_errors import LaunchFailed
from runrecovery_service.process.shimmed_process import ShimmedProcess
from runrecovery_service.process.tree_ending import end_trees
from runrecovery_service.storage import interactions, launch_records, passed_deadlines, turns
from support.processes import is_alive, is_stopped, send_signal

from .conftest import Execution, NewExecution, until


def error_of(run: Run) -> str:
    assert run.error is not None
    return run.error.code


# -- a shim that is lost ---------------------------------------------------------------------------


async def test_a_run_whose_shim_is_killed_fails_and_its_processes_end(execution: Execution) -> None:
    run_id = await execution.create("family")
    launch = await execution.until_tree(run_id, 2)

    send_signal(launch.shim, signal.SIGKILL)
    run = await execution.until_ended(run_id)

    assert (run.status, error_of(run)) == (RunStatus.FAILED, "SUPERVISION_LOST")
    assert launch.tree() == []
    ended = await execution.launch(run_id)
    assert (ended.state, ended.exit_code, ended.processes_ended) == ("CLOSED", None, 2)


async def test_a_waiting_sticky_run_whose_shim_is_killed_loses_its_process(
    execution: Execution,
) -> None:
    run_id = await execution.create("asks")
    await execution.until_status(run_id, RunStatus.WAITING_USER)
    launch = await execution.launch(run_id)

    send_signal(launch.shim, signal.SIGKILL)
    run = await execution.until_ended(run_id)

    assert error_of(run) == "INTERACTION_PROCESS_LOST"
    assert launch.tree() == []
    assert await execution.storage.read(
        lambda db: db.fetch_all("SELECT state FROM interaction")
    ) == [("CLOSED",)]


async def test_a_shim_that_is_stopped_does_not_keep_a_canceled_run_alive(
    execution: Execution,
) -> None:
    run_id = await execution.create("holds")
    launch = await execution.until_tree(run_id, 1)
    send_signal(launch.shim, signal.SIGSTOP)

    async def stands_still() -> bool:
        return is_stopped(launch.shim)

    await until(stands_still)

    await execution.cancel(run_id)
    run = await execution.until_ended(run_id)

    assert run.status is RunStatus.CANCELED
    assert launch.tree() == []
    assert not is_alive(launch.shim)


async def test_an_exit_reported_before_its_shim_was_missed_is_judged_by_its_code(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write is retried while the shim is killed, and two checks notice that it is gone."""
    noticed, take = asyncio.Event(), supervisor.TurnSupervisor._take
    started: list[supervisor.TurnSupervisor] = []

    async def held_up(self: supervisor.TurnSupervisor, engine: Engine, event: Any) -> None:
        if isinstance(event, AskMessage):
            started.append(self)
            await noticed.wait()
        await take(self, engine, event)

    monkeypatch.setattr(supervisor.TurnSupervisor, "_take", held_up)
    read_report, reported = agent_io.AgentIO.read_shim_report, asyncio.Event()

    async def read_to_the_end(io: agent_io.AgentIO) -> None:
        await read_report(io)
        reported.set()

    monkeypatch.setattr(agent_io.AgentIO, "read_shim_report", read_to_the_end)
    run_id = await execution.create("resumable", {"questions": [{"prompt": "So?"}]})

    async def tree_has_ended() -> bool:
        return bool(started) and reported.is_set()

    await until(tree_has_ended)
    send_signal((await execution.launch(run_id)).shim, signal.SIGKILL)

    async def is_shim_gone() -> bool:
        return started[0].launch.is_shim_gone

    await until(is_shim_gone)
    for _ in range(supervisor.UNGUARDED_CHECKS):
        execution.turns.check_shims()
    noticed.set()
    run = await execution.until_status(run_id, RunStatus.WAITING_USER, RunStatus.FAILED)

    assert (run.status, run.error) == (RunStatus.WAITING_USER, None)


@pytest.mark.parametrize("newline", ["\n", ""])
async def test_a_result_that_is_parsed_after_the_exit_counts(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch, newline: str
) -> None:
    """The line is parsed after the deadline that follows the exit was extended many times."""
    parsing, may_parse = threading.Event(), threading.Event()
    parse, advance = agent_io.AgentIO._parse, supervisor.TurnSupervisor._advance
    extended: list[Any] = []

    def gated(self: agent_io.AgentIO, line: bytes) -> Any:
        parsing.set()
        may_parse.wait(10)
        return parse(self, line)

    def count(self: supervisor.TurnSupervisor, event: Any) -> Any:
        action = advance(self, event)
        if parsing.is_set() and event is Signal.OUTPUT_UNREAD:
            extended.append(event)
        if len(extended) > 10:
            may_parse.set()
        return action

    monkeypatch.setattr(turn_state, "LAST_OUTPUT_S", 0.02)
    monkeypatch.setattr(agent_io.AgentIO, "_parse", gated)
    monkeypatch.setattr(supervisor.TurnSupervisor, "_advance", count)
    execution = await new_execution(more=[long_result(newline)])

    run = await execution.until_ended(await execution.create("long"))

    assert (run.status, run.error) == (RunStatus.SUCCEEDED, None)
    assert run.output == {"a": "x" * 30_000}


def long_result(newline: str) -> Engine:
    """Return an engine whose result is long enough to be parsed in a thread."""
    line = '{"type":"result","output":{"a":"' + "x" * 30_000 + '"}}' + newline
    return Engine(
        name="long",
        command=("/bin/sh", "-c", f"read task; printf %s '{line}'"),
        profile=Profile.RESUMABLE,
        env_allow=("PATH",),
        max_concurrent=None,
        session_file=None,
        session_timeout_s=600.0,
    )


# -- the end of a wait -----------------------------------------------------------------------------


async def test_a_sticky_wait_without_a_reply_ends_with_its_process(
    new_execution: NewExecution,
) -> None:
    execution = await new_execution(session_timeout_s=0.3)
    run_id = await execution.create("deaf")
    waiting = await execution.until_status(run_id, RunStatus.WAITING_USER, RunStatus.FAILED)
    launch = await execution.launch(run_id)

    run = await execution.until_ended(run_id)

    assert error_of(run) == "INTERACTION_WAIT_TIMEOUT"
    assert launch.tree() == []
    assert run.pending is None
    asked = await execution.storage.read_row(interactions.find, run.key, 1)
    assert asked is not None
    assert asked.wait_deadline_at is not None
    assert asked.wait_deadline_at - asked.asked_at >= timedelta(seconds=0.29)
    assert run.ended_at is not None
    assert run.ended_at >= asked.wait_deadline_at
    assert waiting.run_id == run_id
    assert (await execution.launch(run_id)).state == "CLOSED"


async def test_a_reply_right_before_the_end_of_the_wait_is_delivered(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch
) -> None:
    execution = await new_execution(session_timeout_s=0.2)
    write, answers = execution.storage.write, list[object]()

    async def reply_first(use: Callable[..., Any], *args: Any, **named: Any) -> Any:
        if use is passed_deadlines.end_wait:
            await execution.reply(run_id, "now")
        answer = await write(use, *args, **named)
        if use is passed_deadlines.end_wait:
            answers.append(answer)
        return answer

    monkeypatch.setattr(execution.storage, "write", reply_first)
    run_id = await execution.create("asks")
    run = await execution.until_ended(run_id)

    assert answers == [None]
    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"done": True})


async def test_an_answered_question_does_not_end_its_run_at_its_deadline(
    new_execution: NewExecution,
) -> None:
    execution = await new_execution(session_timeout_s=0.4)
    run_id = await execution.create("sticky", {"questions": [{"prompt": "So?"}], "work_s": 0.8})
    await execution.until_status(run_id, RunStatus.WAITING_USER)
    await execution.reply(run_id, "yes")

    run = await execution.until_ended(run_id)

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"answers": ["yes"]})


async def test_a_cancel_during_the_end_of_a_wait_cancels_the_run(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch
) -> None:
    execution = await new_execution(session_timeout_s=0.2)
    reached, go_on = threading.Event(), threading.Event()
    sweep = end_trees

    def end_slowly(*args: Any, **named: Any) -> Any:
        reached.set()
        assert go_on.wait(30)
        return sweep(*args, **named)

    monkeypatch.setattr(processes, "end_trees", end_slowly)
    run_id = await execution.create("deaf")
    assert await asyncio.to_thread(reached.wait, 30)
    await execution.cancel(run_id)
    go_on.set()

    assert (await execution.until_ended(run_id)).status is RunStatus.CANCELED


# -- the record of an end --------------------------------------------------------------------------


async def test_the_exit_code_and_resource_usage_of_an_agent_are_recorded(
    execution: Execution,
) -> None:
    run_id = await execution.create("works")
    await execution.until_ended(run_id)

    launch = await execution.launch(run_id)

    assert (launch.state, launch.exit_code) == ("CLOSED", 7)
    assert launch.user_us is not None
    assert launch.system_us is not None
    assert 0 < launch.user_us + launch.system_us < 60e6
    assert launch.max_rss_kib is not None
    assert 100 < launch.max_rss_kib < 1 << 20


async def test_a_good_exit_is_recorded(execution: Execution) -> None:
    run_id = await execution.create("quick")
    await execution.until_ended(run_id)

    launch = await execution.launch(run_id)

    assert (launch.exit_code, launch.processes_ended) == (0, 0)
    assert launch.max_rss_kib


async def test_the_signal_by_which_a_cancel_ended_an_agent_is_recorded(
    execution: Execution,
) -> None:
    run_id = await execution.create("holds")
    await execution.until_tree(run_id, 1)
    await execution.cancel(run_id)
    await execution.until_ended(run_id)

    launch = await execution.launch(run_id)

    assert (launch.state, launch.exit_code, launch.processes_ended) == (
        "CLOSED", -signal.SIGTERM, 1,
    )  # fmt: skip
    assert launch.max_rss_kib


# -- stopping in the middle of a launch ------------------------------------------------------------


@pytest.mark.parametrize("step", ["prepare", "record_gated", "record_running", "release"])
async def test_a_launch_that_a_stop_cuts_off_leaves_no_process(
    execution: Execution, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    reached, go_on = threading.Event(), threading.Event()

    def held_up(use: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            result = use(*args, **named)
            reached.set()
            assert go_on.wait(30)
            return result

        return call

    if step == "prepare":
        monkeypatch.setattr(processes, "prepare", held_up(prepare))
    elif step == "release":
        monkeypatch.setattr(ShimmedProcess, "release", held_up(ShimmedProcess.release))
    else:
        monkeypatch.setattr(launch_records, step, held_up(getattr(launch_records, step)))
    run_id = await execution.create("family")
    assert await asyncio.to_thread(reached.wait, 30)
    launch = await execution.launch(run_id)

    stopping = asyncio.create_task(execution.dispatcher.stop())
    # Less than the 30 s after which the step would fail by itself.
    most_s = 0.5 if step in {"prepare", "release"} else 25.0
    stopped, _ = await asyncio.wait([stopping], timeout=most_s)
    waits_for_the_step = not stopped
    go_on.set()
    await stopping

    # The stop must know the processes that a thread is creating, to end them.
    assert waits_for_the_step is (step in {"prepare", "release"})
    assert execution.dispatcher.slots_in_use == 0
    assert launch.tree() == []
    assert not (await execution.launch(run_id)).is_guarded
    assert (await execution.get(run_id)).status is RunStatus.RUNNING  # the planned stop decides


async def test_a_fenced_launch_runs_no_agent(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fenced(*_: object, **__: object) -> None:
        raise Fenced("lease")

    monkeypatch.setattr(launch_records, "record_running", fenced)
    run_id = await execution.create("quick")

    async def is_fenced() -> bool:
        return execution.is_fenced

    await until(is_fenced)
    await execution.dispatcher.stop()
    launch = await execution.launch(run_id)

    assert launch.state == "GATED"
    assert launch.tree() == []
    assert not launch.is_guarded
    assert execution.output.size(1, 1, OutputChannel.STDOUT) == 0


async def test_a_stop_ends_the_tree_of_a_run_that_a_newer_epoch_owns(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fenced(*_: object, **__: object) -> None:
        raise Fenced("run")

    monkeypatch.setattr(turns, "record_sticky_question", fenced)
    run_id = await execution.create("deaf")
    launch = await execution.until_tree(run_id, 1)

    async def is_fenced() -> bool:
        return execution.is_fenced

    await until(is_fenced)
    await execution.dispatcher.stop()

    assert execution.dispatcher.slots_in_use == 0
    assert launch.tree() == []
    assert not launch.is_guarded


async def is_canceled(task: asyncio.Task[None]) -> bool:
    return task.cancelling() > 0


async def test_a_launch_that_fails_while_a_stop_cuts_it_off_logs_no_unretrieved_error(
    execution: Execution, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, go_on = threading.Event(), threading.Event()
    reported: list[str] = []

    def fail_late(*_: object, **__: object) -> None:
        reached.set()
        assert go_on.wait(30)
        raise LaunchFailed("the system refused")

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: reported.append(context["message"]))
    monkeypatch.setattr(processes, "prepare", fail_late)
    await execution.create("quick")
    assert await asyncio.to_thread(reached.wait, 30)
    following = execution.dispatcher.turns.tasks

    stopping = asyncio.create_task(execution.dispatcher.stop())
    await until(lambda: is_canceled(following[0]))
    go_on.set()
    await stopping
    following.clear()
    gc.collect()

    assert reported == []
