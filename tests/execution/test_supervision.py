"""What becomes of runs when those who watch over their processes do not."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
from runrecovery_service.agents.output import OutputChannel
from runrecovery_service.domain.errors import Fenced
from runrecovery_service.domain.run import Profile, RestartPolicy, Run, RunStatus
from runrecovery_service.engines.catalog import Engine
from runrecovery_service.engines.dialect import AskMessage
from runrecovery_service.execution import (
    agent_io,
    dispatcher,
    launcher,
    supervisor,
    turn_state,
)
from runrecovery_service.execution.turn_state import Signal
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.process.ending import Ending
from runrecovery_service.process.launch import prepare
from runrecovery_service.process.shimmed_process import ShimmedProcess
from runrecovery_service.process.sweep import end_trees
from runrecovery_service.storage import deadlines, interactions, launch_records, turns
from support.processes import is_alive, is_stopped, living_process, send_signal

from .conftest import Floor, LeaseRow, NewFloor, until

SHORT_S = 2.5
"""Long enough for what a test does in it on a busy machine."""
"""A deadline that tests wait for."""


def error_of(run: Run) -> str:
    assert run.error is not None
    return run.error.code


async def until_nothing_lives(lease: LeaseRow) -> None:
    async def is_so() -> bool:
        return not lease.tree() and not lease.is_guarded

    await until(is_so)


# -- a shim that is lost -----------------------------------------------------------------------


async def test_a_run_whose_shim_is_killed_fails_and_nothing_of_it_lives_on(floor: Floor) -> None:
    run_id = await floor.create("family")
    lease = await floor.until_tree(run_id, 2)

    send_signal(lease.shim, signal.SIGKILL)
    run = await floor.until_ended(run_id)

    assert (run.status, error_of(run)) == (RunStatus.FAILED, "SUPERVISION_LOST")
    assert lease.tree() == []
    ended = await floor.lease(run_id)
    assert (ended.state, ended.exit_code, ended.processes_ended) == ("CLOSED", None, 2)


async def test_a_sticky_run_that_waits_loses_its_process_with_its_shim(floor: Floor) -> None:
    run_id = await floor.create("asks")
    await floor.until_status(run_id, RunStatus.WAITING_USER)
    lease = await floor.lease(run_id)

    send_signal(lease.shim, signal.SIGKILL)
    run = await floor.until_ended(run_id)

    assert error_of(run) == "INTERACTION_PROCESS_LOST"
    assert lease.tree() == []
    assert await floor.storage.read(lambda db: db.fetch_all("SELECT state FROM interaction")) == [
        ("CLOSED",)
    ]


async def test_a_shim_that_is_stopped_does_not_keep_a_canceled_run_alive(floor: Floor) -> None:
    run_id = await floor.create("holds")
    lease = await floor.until_tree(run_id, 1)
    send_signal(lease.shim, signal.SIGSTOP)

    async def stands_still() -> bool:
        return is_stopped(lease.shim)

    await until(stands_still)

    await floor.cancel(run_id)
    run = await floor.until_ended(run_id)

    assert run.status is RunStatus.CANCELED
    assert lease.tree() == []
    assert not is_alive(lease.shim)


async def test_an_exit_reported_before_its_shim_was_missed_is_judged_by_its_code(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write is retried while the shim ends and the sweep notices twice that it is gone."""
    noticed, take = asyncio.Event(), supervisor.TurnSupervisor._take
    started: list[supervisor.TurnSupervisor] = []

    async def held_up(self: supervisor.TurnSupervisor, engine: Engine, event: Any) -> None:
        if isinstance(event, AskMessage):
            started.append(self)
            await noticed.wait()
        await take(self, engine, event)

    monkeypatch.setattr(supervisor.TurnSupervisor, "_take", held_up)
    run_id = await floor.create("resumable", {"questions": [{"prompt": "So?"}]})

    async def shim_has_ended() -> bool:
        return bool(started) and started[0].launch.is_shim_gone

    await until(shim_has_ended)
    for _ in range(supervisor.UNGUARDED_CHECKS):
        floor.turns.check_shims()
    noticed.set()
    run = await floor.until_status(run_id, RunStatus.WAITING_USER, RunStatus.FAILED)

    assert (run.status, run.error) == (RunStatus.WAITING_USER, None)


@pytest.mark.parametrize("newline", ["\n", ""])
async def test_a_result_that_is_parsed_after_the_exit_counts(
    new_floor: NewFloor, monkeypatch: pytest.MonkeyPatch, newline: str
) -> None:
    """The line is parsed only once the deadline after the exit has been set anew many times."""
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
    floor = await new_floor(more=[long_result(newline)])

    run = await floor.until_ended(await floor.create("long"))

    assert (run.status, run.error) == (RunStatus.SUCCEEDED, None)
    assert run.output == {"a": "x" * 30_000}


def long_result(newline: str) -> Engine:
    """An engine whose result is long enough to be parsed in a thread."""
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


# -- heartbeats --------------------------------------------------------------------------------


async def test_heartbeats_keep_a_tree_alive_and_their_end_ends_it(new_floor: NewFloor) -> None:
    floor = await new_floor()
    run_id = await floor.create("family")
    lease = await floor.until_tree(run_id, 2)
    tree, first_deadline = lease.tree(), boot_time_ns() + int(SHORT_S * 1e9)

    async def long_past_the_first() -> bool:
        floor.beat(SHORT_S)
        return boot_time_ns() > first_deadline + int(SHORT_S * 1e9)

    await until(long_past_the_first)
    lived_on = lease.tree()
    run = await floor.until_ended(run_id)

    assert lived_on == tree
    assert error_of(run) == "ORCHESTRATOR_RESTART_INTERRUPTED"
    assert run.error is not None
    assert run.error.message == turn_state.SUSPENDED
    assert boot_time_ns() > floor.turns.tree_deadline.deadline_ns
    await until_nothing_lives(lease)


async def test_a_sticky_run_is_lost_with_the_lease_that_it_waits_in(new_floor: NewFloor) -> None:
    floor = await new_floor(trees_live_s=SHORT_S)
    floor.beat(SHORT_S)
    run_id = await floor.create("asks")

    run = await floor.until_ended(run_id)

    assert error_of(run) in {"INTERACTION_PROCESS_LOST", "ORCHESTRATOR_RESTART_INTERRUPTED"}
    await until_nothing_lives(await floor.lease(run_id))


async def test_a_run_that_may_start_over_does_so_in_the_next_lease(new_floor: NewFloor) -> None:
    floor = await new_floor()
    run_id = await floor.create("holds", policy=RestartPolicy.REQUEUE)
    first = await floor.until_tree(run_id, 1)
    floor.beat(SHORT_S)
    await until_nothing_lives(first)

    async def taken_again() -> bool:
        return (await floor.get(run_id)).attempt == 2

    await until(taken_again)
    before_the_beat = (await floor.lease(run_id, attempt=2)).state
    floor.beat(60)

    async def works_again() -> bool:
        return len((await floor.lease(run_id, attempt=2)).tree()) == 1

    await until(works_again)
    run = await floor.get(run_id)

    assert before_the_beat == "INTENT"  # nothing is launched into a lease that is over
    assert (run.status, run.attempt) == (RunStatus.RUNNING, 2)
    assert (await floor.lease(run_id)).state == "CLOSED"


async def test_a_shim_whose_time_runs_out_at_its_gate_interrupts_its_run(
    new_floor: NewFloor, monkeypatch: pytest.MonkeyPatch
) -> None:
    floor = await new_floor(trees_live_s=60)
    floor.beat(SHORT_S)
    gated = launch_records.record_gated

    def gated_too_late(*args: Any, **named: Any) -> None:
        while boot_time_ns() < floor.turns.tree_deadline.deadline_ns:
            os.sched_yield()
        gated(*args, **named)

    monkeypatch.setattr(launch_records, "record_gated", gated_too_late)
    run = await floor.until_ended(await floor.create("holds"))

    assert error_of(run) == "ORCHESTRATOR_RESTART_INTERRUPTED"


# -- the end of a wait -------------------------------------------------------------------------


async def test_a_sticky_wait_ends_with_its_process_when_nobody_answers(
    new_floor: NewFloor,
) -> None:
    floor = await new_floor(session_timeout_s=0.3)
    run_id = await floor.create("deaf")
    waiting = await floor.until_status(run_id, RunStatus.WAITING_USER, RunStatus.FAILED)
    lease = await floor.lease(run_id)

    run = await floor.until_ended(run_id)

    assert error_of(run) == "INTERACTION_WAIT_TIMEOUT"
    assert lease.tree() == []
    assert run.pending is None
    asked = await floor.storage.read_row(interactions.find, run.key, 1)
    assert asked is not None
    assert asked.wait_deadline_at is not None
    assert asked.wait_deadline_at - asked.asked_at >= timedelta(seconds=0.29)
    assert run.ended_at is not None
    assert run.ended_at >= asked.wait_deadline_at
    assert waiting.run_id == run_id
    assert (await floor.lease(run_id)).state == "CLOSED"


async def test_a_reply_right_before_the_end_of_the_wait_wins(
    new_floor: NewFloor, monkeypatch: pytest.MonkeyPatch
) -> None:
    floor = await new_floor(session_timeout_s=0.2)
    write, answers = floor.storage.write, list[object]()

    async def reply_first(use: Callable[..., Any], *args: Any, **named: Any) -> Any:
        if use is deadlines.end_wait:
            await floor.reply(run_id, "now")
        answer = await write(use, *args, **named)
        if use is deadlines.end_wait:
            answers.append(answer)
        return answer

    monkeypatch.setattr(floor.storage, "write", reply_first)
    run_id = await floor.create("asks")
    run = await floor.until_ended(run_id)

    assert answers == [None]
    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"done": True})


async def test_an_answered_question_does_not_end_its_run_at_its_deadline(
    new_floor: NewFloor,
) -> None:
    floor = await new_floor(session_timeout_s=0.4)
    run_id = await floor.create("sticky", {"questions": [{"prompt": "So?"}], "work_s": 0.8})
    await floor.until_status(run_id, RunStatus.WAITING_USER)
    await floor.reply(run_id, "yes")

    run = await floor.until_ended(run_id)

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"answers": ["yes"]})


async def test_a_cancel_of_a_wait_that_ends_is_still_a_cancel(
    new_floor: NewFloor, monkeypatch: pytest.MonkeyPatch
) -> None:
    floor = await new_floor(session_timeout_s=0.2)
    reached, go_on = threading.Event(), threading.Event()
    sweep = end_trees

    def end_slowly(*args: Any, **named: Any) -> Any:
        reached.set()
        assert go_on.wait(30)
        return sweep(*args, **named)

    monkeypatch.setattr(launcher, "end_trees", end_slowly)
    run_id = await floor.create("deaf")
    assert await asyncio.to_thread(reached.wait, 30)
    await floor.cancel(run_id)
    go_on.set()

    assert (await floor.until_ended(run_id)).status is RunStatus.CANCELED


# -- patrols -----------------------------------------------------------------------------------


@contextmanager
def straggler(lease: LeaseRow) -> Iterator[subprocess.Popen[bytes]]:
    """A process that bears a launch's mark and that nobody knows of."""
    popen = subprocess.Popen(
        ["/bin/sleep", "600"],
        env={"RUNRECOVERY_LEASE": lease.token},
        start_new_session=True,  # ours is never touched
    )
    try:
        yield popen
    finally:
        popen.kill()
        popen.wait()


async def test_a_patrol_ends_and_records_what_outlived_its_launch(floor: Floor) -> None:
    run_id = await floor.create("quick")
    await floor.until_ended(run_id)
    before = await floor.lease(run_id)
    with straggler(before) as left:
        await floor.straggler_sweep.sweep()

        assert living_process(left.pid) is None
    after = await floor.lease(run_id)
    assert (before.state, after.state) == ("CLOSED", "CLOSED")
    assert after.processes_ended == before.processes_ended + 1
    assert (await floor.get(run_id)).status is RunStatus.SUCCEEDED


async def test_a_patrol_that_finds_nothing_writes_nothing(floor: Floor) -> None:
    run_id = await floor.create("quick")
    await floor.until_ended(run_id)
    await floor.until_free(floor.dispatcher.capacity)

    def rows() -> Awaitable[list[Any]]:
        return floor.storage.read(lambda db: db.fetch_all("SELECT * FROM process_lease"))

    before = await rows()
    await floor.straggler_sweep.sweep()

    assert await rows() == before


async def test_a_patrol_leaves_a_launch_to_the_session_that_follows_it(floor: Floor) -> None:
    run_id = await floor.create("holds")
    lease = await floor.until_tree(run_id, 1)
    await floor.set_lease_state("KILL_PENDING")

    await floor.straggler_sweep.sweep()

    assert len(lease.tree()) == 1
    assert (await floor.lease(run_id)).state == "KILL_PENDING"


# A shim that may not be waited for is reaped by the next launch.
LEFT_ALONE = pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")


def not_at_first(use: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `end_trees` so that its first call ends nothing, and says so."""
    left = [1]

    def call(leases: Any, **named: Any) -> Any:
        if left[0]:
            left[0] -= 1
            return {lease.launch_key: Ending(refused=("stuck",), gone=False) for lease in leases}
        return use(leases, **named)

    return call


@LEFT_ALONE
async def test_a_patrol_frees_a_run_that_waits_for_what_could_not_be_ended(
    new_floor: NewFloor, monkeypatch: pytest.MonkeyPatch
) -> None:
    floor = await new_floor(trees_live_s=SHORT_S)
    floor.beat(SHORT_S)
    monkeypatch.setattr(launcher, "end_trees", not_at_first(end_trees))
    monkeypatch.setattr(dispatcher, "CHECK_INTERVAL_S", 600.0)  # only after a change
    run_id = await floor.create("holds", policy=RestartPolicy.REQUEUE)
    run = await floor.until(run_id, lambda run: run.attempt == 1 and run.status == "QUEUED")
    floor.beat(60)
    await floor.until_ended(await floor.create("quick"))  # the queue goes on without it
    held_back = [await floor.get(run_id), (await floor.lease(run_id)).state]

    await floor.straggler_sweep.sweep()
    again = await floor.until(run_id, lambda run: run.attempt == 2)

    assert held_back == [run, "KILL_PENDING"]
    assert again.status is RunStatus.RUNNING
    assert (await floor.lease(run_id)).state == "CLOSED"


@LEFT_ALONE
async def test_a_stuck_tree_of_a_canceled_run_is_named_until_a_patrol_has_ended_it(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launcher, "end_trees", not_at_first(end_trees))
    run_id = await floor.create("family")
    lease = await floor.until_tree(run_id, 2)
    await floor.cancel(run_id)
    run = await floor.until_ended(run_id)
    pending = (await floor.lease(run_id)).state

    async def unended() -> list[Any]:
        return await floor.storage.read(launch_records.unended_launches, floor.owner, limit=10)

    named = await unended()
    await floor.straggler_sweep.sweep()

    assert (run.status, pending) == (RunStatus.CANCELED, "KILL_PENDING")
    assert [one.run_id for one in named] == [run_id]
    assert await unended() == []
    assert lease.tree() == []


# -- what is known of the end ------------------------------------------------------------------


async def test_how_an_agent_ended_and_what_it_used_is_on_record(floor: Floor) -> None:
    run_id = await floor.create("works")
    await floor.until_ended(run_id)

    lease = await floor.lease(run_id)

    assert (lease.state, lease.exit_code) == ("CLOSED", 7)
    assert lease.user_us is not None
    assert lease.system_us is not None
    assert 0 < lease.user_us + lease.system_us < 60e6
    assert lease.max_rss_kib is not None
    assert 100 < lease.max_rss_kib < 1 << 20


async def test_a_good_end_is_on_record(floor: Floor) -> None:
    run_id = await floor.create("quick")
    await floor.until_ended(run_id)

    lease = await floor.lease(run_id)

    assert (lease.exit_code, lease.processes_ended) == (0, 0)
    assert lease.max_rss_kib


async def test_the_signal_that_a_cancel_ended_an_agent_by_is_on_record(floor: Floor) -> None:
    run_id = await floor.create("holds")
    await floor.until_tree(run_id, 1)
    await floor.cancel(run_id)
    await floor.until_ended(run_id)

    lease = await floor.lease(run_id)

    assert (lease.state, lease.exit_code, lease.processes_ended) == (
        "CLOSED", -signal.SIGTERM, 1,
    )  # fmt: skip
    assert lease.max_rss_kib


# -- stopping in the middle of a launch --------------------------------------------------------


@pytest.mark.parametrize("step", ["prepare", "record_gated", "record_running", "release"])
async def test_a_launch_that_a_stop_cuts_off_leaves_no_process(
    floor: Floor, monkeypatch: pytest.MonkeyPatch, step: str
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
        monkeypatch.setattr(launcher, "prepare", held_up(prepare))
    elif step == "release":
        monkeypatch.setattr(ShimmedProcess, "release", held_up(ShimmedProcess.release))
    else:
        monkeypatch.setattr(launch_records, step, held_up(getattr(launch_records, step)))
    run_id = await floor.create("family")
    assert await asyncio.to_thread(reached.wait, 30)
    lease = await floor.lease(run_id)

    stopping = asyncio.create_task(floor.dispatcher.stop())
    # Less than the 30 s after which the step would give up by itself.
    most_s = 0.5 if step in {"prepare", "release"} else 25.0
    stopped, _ = await asyncio.wait([stopping], timeout=most_s)
    waits_for_the_step = not stopped
    go_on.set()
    await stopping

    # What a thread makes of the processes must be known to whoever ends them.
    assert waits_for_the_step is (step in {"prepare", "release"})
    assert floor.dispatcher.slots_in_use == 0
    assert lease.tree() == []
    assert not (await floor.lease(run_id)).is_guarded
    assert (await floor.get(run_id)).status is RunStatus.RUNNING  # whoever stops decides


async def test_a_fenced_launch_runs_no_agent(floor: Floor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fenced(*_: object, **__: object) -> None:
        raise Fenced("lease")

    monkeypatch.setattr(launch_records, "record_running", fenced)
    run_id = await floor.create("quick")

    async def is_fenced() -> bool:
        return floor.is_fenced

    await until(is_fenced)
    await floor.dispatcher.stop()
    lease = await floor.lease(run_id)

    assert lease.state == "GATED"
    assert lease.tree() == []
    assert not lease.is_guarded
    assert floor.output.size(1, 1, OutputChannel.STDOUT) == 0


async def test_a_run_that_belongs_to_a_newer_epoch_loses_its_tree_with_the_dispatcher(
    floor: Floor, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fenced(*_: object, **__: object) -> None:
        raise Fenced("run")

    monkeypatch.setattr(turns, "record_sticky_question", fenced)
    run_id = await floor.create("deaf")
    lease = await floor.until_tree(run_id, 1)

    async def is_fenced() -> bool:
        return floor.is_fenced

    await until(is_fenced)
    await floor.dispatcher.stop()

    assert floor.dispatcher.slots_in_use == 0
    assert lease.tree() == []
    assert not lease.is_guarded
