"""What an agent printed before its service died is saved by its shim."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from process.trees import Start, Tree, alive, in_ns, until
from runrecovery_service.execution.pipes import bytes_held
from runrecovery_service.process import wire
from runrecovery_service.process.boot_clock import boot_time_ns
from runrecovery_service.process.launch import OutputRest
from runrecovery_service.process.shim_events import Empty, EndsItself, Exited
from runrecovery_service.process.shim_journal import RecordedRest, read_rest

PRINTED: Final = b"one\ntwo\nthr"
PRINTS: Final = f"import os, time; os.write(1, {PRINTED!r}); "
WAITS: Final = PRINTS + "time.sleep(600)"
LARGE: Final = b"x" * 900_000
"""Much, but not more than the pipe takes."""


@pytest.fixture
def rest(tmp_path: Path) -> OutputRest:
    return OutputRest(tmp_path / "stdout-1.rest", kept_bytes=70)


def agent(code: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", code]


def until_printed(tree: Tree, size: int = len(PRINTED)) -> None:
    until(lambda: bytes_held(tree.process.stdout.fileno()) == size)


def recorded(tree: Tree) -> RecordedRest | None:
    return read_rest(tree.journal, (tree.process.pid, tree.process.start_ticks))


def rest_entries(tree: Tree) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in tree.journal.read_text().splitlines()]
    return [line for line in lines if line["event"] == wire.REST]


@pytest.mark.parametrize(("code", "exit_code"), [(PRINTS, 0), (WAITS, -signal.SIGKILL)])
def test_output_that_the_service_has_not_read_is_saved_when_the_gate_closes(
    start: Start, rest: OutputRest, code: str, exit_code: int
) -> None:
    tree = start(agent(code), rest=rest)
    until_printed(tree)
    if not exit_code:
        tree.events(Empty)

    tree.process.close_gate()

    assert tree.shim_exit() == 0
    assert rest.path.read_bytes() == PRINTED
    assert rest.path.stat().st_mode & 0o777 == 0o600
    assert recorded(tree) == RecordedRest(
        kept=70, size=11, begin=70, at_end=True, exit_code=exit_code, is_kept=False
    )


def test_output_that_the_service_had_read_comes_before_what_is_in_the_pipe(
    start: Start, rest: OutputRest
) -> None:
    code = f"{PRINTS}input(); os.write(1, b'ee\\n' + b'x' * {len(LARGE)}); time.sleep(600)"
    tree = start(agent(code), rest=rest)
    until_printed(tree)
    spool = tree.process.spool
    first = spool.end
    assert spool.fill(tree.process.stdout.fileno()) == len(PRINTED)
    spool.note_kept(first + 4, size=80, begin=70)  # "one" is in the file
    tree.process.stdin.write(b"\n")
    until_printed(tree, len(LARGE) + 3)

    tree.process.close_gate()

    assert tree.shim_exit() == 0
    assert rest.path.read_bytes() == b"two\nthree\n" + LARGE
    assert recorded(tree) == RecordedRest(
        kept=80, size=len(LARGE) + 10, begin=70, at_end=True, exit_code=-9, is_kept=False
    )


def test_a_shim_exits_without_a_rest_once_the_service_needs_no_output(
    start: Start, rest: OutputRest
) -> None:
    tree = start(agent(PRINTS), rest=rest)
    assert [type(event) for event in tree.events()] == [Exited, Empty]  # the report has ended
    assert alive(tree.shim)

    tree.process.need_no_output()

    assert tree.shim_exit() == 0
    assert not rest.path.exists()
    assert rest_entries(tree) == []


def test_a_gate_that_closes_after_the_service_needed_no_output_saves_none(
    start: Start, rest: OutputRest
) -> None:
    tree = start(agent(WAITS), rest=rest)
    until_printed(tree)

    tree.process.need_no_output()
    tree.process.close_gate()

    assert tree.shim_exit() == 0
    assert not rest.path.exists()


def test_output_that_a_living_service_leaves_is_saved_when_the_tree_has_ended(
    start: Start, rest: OutputRest
) -> None:
    tree = start(agent(f"{PRINTS}input()"), rest=rest)
    until_printed(tree)

    tree.process.leave_output()
    until(tree.heard_everything)
    assert not rest.path.exists()
    tree.process.stdin.write(b"\n")

    assert tree.shim_exit() == 0
    assert rest.path.read_bytes() == PRINTED
    assert recorded(tree) == RecordedRest(
        kept=70, size=11, begin=70, at_end=False, exit_code=0, is_kept=False
    )


def test_nothing_is_saved_while_a_service_that_missed_the_deadline_may_still_read(
    start: Start, rest: OutputRest
) -> None:
    tree = start(agent(WAITS), rest=rest)
    until_printed(tree)

    tree.process.heartbeat(boot_time_ns() - 1)

    assert tree.events()[0] == EndsItself(wire.LEASE_OVER)
    assert alive(tree.shim)
    assert not rest.path.exists()
    assert tree.process.stdout.read(4) == b"one\n"  # the service wakes up, and is killed
    tree.process.close_gate()
    assert tree.shim_exit() == 0
    assert rest.path.read_bytes() == b"two\nthr"


def test_a_full_disk_loses_the_rest_but_keeps_no_process_alive(
    start: Start, rest: OutputRest
) -> None:
    tree = start(agent(WAITS), rest=OutputRest(Path("/dev/full"), kept_bytes=0))
    until_printed(tree)

    tree.process.close_gate()

    assert tree.shim_exit() == 0
    (entry,) = rest_entries(tree)
    assert (entry["errno"], entry["size"], entry["at_end"]) == (28, 0, False)


def test_a_file_that_cannot_be_made_is_noted_in_the_journal(start: Start, tmp_path: Path) -> None:
    tree = start(agent(WAITS), rest=OutputRest(tmp_path / "none" / "rest", kept_bytes=0))
    until_printed(tree)

    tree.process.close_gate()

    assert tree.shim_exit() == 0
    (entry,) = rest_entries(tree)
    assert entry["errno"] == 2
    assert recorded(tree) is None


def test_output_after_a_loss_is_not_saved(start: Start, rest: OutputRest) -> None:
    tree = start(agent(WAITS), rest=rest)
    until_printed(tree)
    tree.process.spool.note_kept(tree.process.spool.end, size=None, begin=None)

    tree.process.close_gate()

    assert tree.shim_exit() == 0
    assert not rest.path.exists()
    assert recorded(tree) is None


def test_a_writer_outside_of_the_tree_delays_nothing_and_leaves_the_end_open(
    start: Start, rest: OutputRest
) -> None:
    tree = start(agent(WAITS), rest=rest)
    until_printed(tree)
    writer = os.open(f"/proc/self/fd/{tree.process.stdout.fileno()}", os.O_WRONLY)
    try:
        tree.process.close_gate()

        assert tree.shim_exit() == 0
    finally:
        os.close(writer)
    assert rest.path.read_bytes() == PRINTED
    assert recorded(tree) == RecordedRest(
        kept=70, size=11, begin=70, at_end=False, exit_code=-9, is_kept=False
    )


def test_the_agent_gets_no_descriptor_of_the_shim(start: Start, rest: OutputRest) -> None:
    code = "import os; os.write(1, repr(sorted(os.listdir('/proc/self/fd'))).encode())"
    tree = start(agent(code), rest=rest)

    assert tree.events(Exited)
    assert tree.process.stdout.read() == b"['0', '1', '2', '3']"  # 3 lists the folder


def test_a_shim_whose_tree_has_ended_waits_beyond_its_deadline(
    start: Start, rest: OutputRest
) -> None:
    tree = start(agent(PRINTS), rest=rest)
    tree.events()
    until_printed(tree)
    tree.process.heartbeat(in_ns(-1))  # its deadline matters no more: its tree is dead
    until(tree.heard_everything)
    assert alive(tree.shim)

    tree.process.close_gate()

    assert tree.shim_exit() == 0
    assert rest.path.read_bytes() == PRINTED
