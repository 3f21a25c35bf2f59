"""The last output of an agent is read and kept, even while the parser or the store is busy."""

from __future__ import annotations

import asyncio
import sys
import threading
from typing import Any, Final

import pytest
from runrecovery_service.agents.output import OutputChannel
from runrecovery_service.domain.run import Profile, RunStatus
from runrecovery_service.engines.catalog import Engine
from runrecovery_service.engines.gemini import GEMINI
from runrecovery_service.execution import agent_io, supervisor
from runrecovery_service.execution.agent_io import AgentIO
from runrecovery_service.execution.pipes import bytes_held
from runrecovery_service.execution.turn_state import TurnEvent
from runrecovery_service.process.spool import READ_BYTES

from .conftest import NewExecution, until

HASTY: Final = """
import array, fcntl, json, os, sys, termios, time
def print_and_lose(line):  # as Node does: what a full pipe does not take is lost at the exit
    os.set_blocking(1, False)
    try:
        while line:
            line = line[os.write(1, line):]
    except BlockingIOError:
        pass
def progress(size):
    return json.dumps({"type": "progress", "message": "x" * size}).encode() + b"\\n"
sys.stdin.readline()
"""
ONE_BURST: Final = (
    HASTY
    + """
result = json.dumps({"type": "result", "output": {"done": True}}).encode() + b"\\n"
print_and_lose(progress(900_000) + result)
"""
)
TWO_BURSTS: Final = (
    HASTY
    + """
print_and_lose(progress(1))
print_and_lose(progress(900_000))
held = array.array("i", [1])
while held[0]:
    time.sleep(0.005)
    fcntl.ioctl(1, termios.FIONREAD, held)
print_and_lose(progress(900_000))
result = json.dumps({"type": "result", "output": {"done": True}}).encode() + b"\\n"
print_and_lose(result)
"""
)
MANY_LINES: Final = (
    HASTY
    + """
for _ in range(30):
    sys.stdout.buffer.write(progress(10_000))
print(json.dumps({"type": "result", "output": {"done": True}}), flush=True)
"""
)
ENDLESS: Final = (
    HASTY
    + """
while True:
    sys.stdout.buffer.write(progress(10_000))
"""
)


RETRIES: Final = """
import sys, time
sys.stdin.read()
for attempt in range(50):
    print(f"Attempt {attempt} failed with status 429. Retrying", file=sys.stderr)
print("." * 40, file=sys.stderr)
time.sleep(600)
"""


def hasty(script: str, **changes: Any) -> Engine:
    facts: dict[str, Any] = {
        "name": "hasty",
        "command": (sys.executable, "-I", "-S", "-c", script),
        "profile": Profile.RESUMABLE,
        "env_allow": ("PATH",),
        "max_concurrent": None,
        "session_file": None,
        "session_timeout_s": 600.0,
    }
    return Engine(**facts | changes)


class HeldParser:
    """Holds the parser at its first line until `go_on` is called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.io: AgentIO | None = None
        self._may_parse = threading.Event()
        parse = AgentIO._parse

        def held(io: AgentIO, line: bytes) -> Any:
            self.io = io
            assert self._may_parse.wait(30)
            return parse(io, line)

        monkeypatch.setattr(AgentIO, "_parse", held)
        monkeypatch.setattr(agent_io, "LONG_LINE_BYTES", 0)  # parse in a thread, not in the loop

    def go_on(self) -> None:
        self._may_parse.set()


async def test_a_result_that_its_agent_printed_in_one_burst_and_did_not_flush_is_read(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service reads nothing until the agent has exited."""
    read, exited = AgentIO.read_stdout, asyncio.Event()

    async def read_late(io: AgentIO) -> None:
        await exited.wait()
        await read(io)

    monkeypatch.setattr(AgentIO, "read_stdout", read_late)
    execution = await new_execution(more=[hasty(ONE_BURST)])
    run_id = await execution.create("hasty")

    async def has_exited() -> bool:
        return any(one.state.exited is not None for one in execution.turns.supervisors)

    await until(has_exited)
    exited.set()
    run = await execution.until_ended(run_id)

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"done": True})


async def test_a_slow_parser_does_not_make_an_agent_lose_its_result(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch
) -> None:
    parser = HeldParser(monkeypatch)
    execution = await new_execution(more=[hasty(TWO_BURSTS)])
    run_id = await execution.create("hasty")

    async def has_exited() -> bool:
        return any(one.state.exited is not None for one in execution.turns.supervisors)

    await until(has_exited)
    parser.go_on()
    run = await execution.until_ended(run_id)

    assert (run.status, run.output) == (RunStatus.SUCCEEDED, {"done": True})


async def test_an_agent_that_prints_for_ever_waits_in_its_pipe_once_the_backlog_is_full(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_io, "BACKLOG_BYTES", 1 << 18)
    parser = HeldParser(monkeypatch)
    execution = await new_execution(more=[hasty(ENDLESS)])
    run_id = await execution.create("hasty")

    async def does_agent_wait() -> bool:
        # A full pipe of 1 MiB has fewer bytes, because parts of its pages stay empty.
        return parser.io is not None and bytes_held(parser.io.process.stdout.fileno()) > 1 << 19

    await until(does_agent_wait)
    assert parser.io is not None
    waiting = len(parser.io._backlog)
    parser.go_on()
    await execution.cancel(run_id)

    assert 1 << 18 <= waiting < (1 << 18) + READ_BYTES
    assert (await execution.until_ended(run_id)).status is RunStatus.CANCELED


async def test_output_is_kept_while_the_store_does_not_answer(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, may_take = supervisor.TurnSupervisor._take, asyncio.Event()

    async def held(self: supervisor.TurnSupervisor, engine: Engine, event: TurnEvent) -> None:
        await may_take.wait()
        await take(self, engine, event)

    monkeypatch.setattr(supervisor.TurnSupervisor, "_take", held)
    execution = await new_execution(more=[hasty(MANY_LINES)])
    run_id = await execution.create("hasty")
    run = await execution.get(run_id)

    async def is_result_kept() -> bool:
        try:
            kept = execution.output.read(run.key, 1, OutputChannel.STDOUT, 0, 1 << 20)
        except FileNotFoundError:
            return False
        return kept.data.endswith(b'"result", "output": {"done": true}}\n')

    await until(is_result_kept)
    may_take.set()

    assert (await execution.until_ended(run_id)).status is RunStatus.SUCCEEDED


@pytest.mark.parametrize(("bound", "most"), [("UNTAKEN_BYTES", 60_000), ("UNTAKEN_EVENTS", 10)])
async def test_the_parser_runs_ahead_of_the_supervisor_only_up_to_a_bound(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch, bound: str, most: int
) -> None:
    take, may_take = supervisor.TurnSupervisor._take, asyncio.Event()
    followed: list[AgentIO] = []

    async def held(self: supervisor.TurnSupervisor, engine: Engine, event: TurnEvent) -> None:
        assert self._io is not None
        followed.append(self._io)
        await may_take.wait()
        await take(self, engine, event)

    monkeypatch.setattr(supervisor.TurnSupervisor, "_take", held)
    monkeypatch.setattr(agent_io, bound, most)
    execution = await new_execution(more=[hasty(ENDLESS)])
    run_id = await execution.create("hasty")

    async def is_backlog_full() -> bool:
        return bool(followed) and len(followed[0]._backlog) >= agent_io.BACKLOG_BYTES

    await until(is_backlog_full)
    parsed_bytes = followed[0]._parsed_bytes
    await execution.cancel(run_id)
    may_take.set()

    assert parsed_bytes <= 3 * READ_BYTES
    assert (await execution.until_ended(run_id)).status is RunStatus.CANCELED


async def test_retries_on_standard_error_do_not_pile_up_while_the_store_does_not_answer(
    new_execution: NewExecution, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, may_take = supervisor.TurnSupervisor._take, asyncio.Event()
    keep, kept = AgentIO._keep_stderr, bytearray()
    waiting: list[int] = []

    async def held(self: supervisor.TurnSupervisor, engine: Engine, event: TurnEvent) -> None:
        await may_take.wait()
        await take(self, engine, event)

    async def noted(self: AgentIO, text: bytes) -> None:
        await keep(self, text)
        kept.extend(text)
        waiting.append(self.events.qsize())

    monkeypatch.setattr(supervisor.TurnSupervisor, "_take", held)
    monkeypatch.setattr(AgentIO, "_keep_stderr", noted)
    monkeypatch.setattr(agent_io, "UNTAKEN_EVENTS", 10)
    execution = await new_execution(more=[hasty(RETRIES, dialect=GEMINI)])
    run_id = await execution.create("hasty")

    async def is_all_kept() -> bool:
        return b"Attempt 49 failed with status 429" in kept

    await until(is_all_kept)
    await execution.cancel(run_id)
    may_take.set()

    assert waiting[-1] == 11
    assert (await execution.until_ended(run_id)).status is RunStatus.CANCELED
