"""The journal of a launch tells a start how an agent ended while no service was running."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from process.trees import Start
from runrecovery_service.process.shim_journal import (
    RecordedEnd,
    killed_by_shim,
    read_end,
    record_kept,
)

SHIM: Final = (70, 900)
BY: Final = {"by": 70, "by_start_ticks": 900}
EXITED: Final = {"event": "agent.exited", "at_ns": 1, "code": 0, **BY}
KEPT: Final = {"event": "output.kept", "begin": 10, "end": 30, **BY}


def journal_of(place: Path, *entries: dict[str, Any] | str) -> Path:
    journal = place / "shim-1.log"
    lines = (each if isinstance(each, str) else json.dumps(each) for each in entries)
    journal.write_text("".join(f"{line}\n" for line in lines))
    return journal


@pytest.mark.parametrize(
    ("code", "expected"),
    [("pass", 0), ("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9)],
)
def test_the_shim_records_how_the_agent_ended(start: Start, code: str, expected: int) -> None:
    tree = start([sys.executable, "-I", "-S", "-c", code])
    tree.process.popen.wait(30)
    shim = (tree.process.pid, tree.process.start_ticks)
    record_kept(tree.journal, shim, begin=0, end=7)

    assert read_end(tree.journal, shim) == RecordedEnd(exit_code=expected, begin=0, end=7)
    assert killed_by_shim(tree.journal) == frozenset()


def test_an_agent_that_its_shim_kills_is_recorded_as_killed(start: Start) -> None:
    tree = start(["/bin/sleep", "600"])
    shim = (tree.process.pid, tree.process.start_ticks)
    record_kept(tree.journal, shim, begin=0, end=0)

    tree.process.close_gate()
    tree.process.popen.wait(30)

    assert read_end(tree.journal, shim) == RecordedEnd(exit_code=-signal.SIGKILL, begin=0, end=0)


def test_both_records_together_are_the_end_of_an_agent(tmp_path: Path) -> None:
    for entries in ([EXITED, KEPT], [KEPT, EXITED]):
        journal = journal_of(tmp_path, *entries)

        assert read_end(journal, SHIM) == RecordedEnd(exit_code=0, begin=10, end=30)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [EXITED],
        [KEPT],
        [EXITED, EXITED, KEPT],
        [EXITED, KEPT, KEPT],
        [EXITED | {"by": 71}, KEPT],
        [EXITED | {"by_start_ticks": 901}, KEPT],
        [EXITED, KEPT | {"by_start_ticks": 901}],
        [EXITED | {"code": "0"}, KEPT],
        [EXITED | {"code": False}, KEPT],
        [EXITED, KEPT | {"begin": 31}],
        [EXITED, KEPT | {"begin": -1}],
        [EXITED, KEPT | {"end": None}],
        [json.dumps(EXITED)[:-1], KEPT],
        [json.dumps(EXITED)[:-1] + json.dumps(KEPT)],
        ["[" * 100_000, EXITED],
        [EXITED, "[]", "\ufffd"],
    ],
)
def test_records_that_are_missing_doubled_cut_or_of_another_launch_prove_nothing(
    tmp_path: Path, entries: list[dict[str, Any] | str]
) -> None:
    assert read_end(journal_of(tmp_path, *entries), SHIM) is None


def test_text_of_a_failing_shim_does_not_hide_the_records(tmp_path: Path) -> None:
    journal = journal_of(tmp_path, "Traceback (most recent call last):", EXITED, KEPT)

    assert read_end(journal, SHIM) == RecordedEnd(exit_code=0, begin=10, end=30)


def test_a_link_in_place_of_the_journal_is_neither_read_nor_written(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text("untouched")
    journal = tmp_path / "shim-1.log"
    journal.symlink_to(other)

    with pytest.raises(OSError, match="symbolic links"):
        record_kept(journal, SHIM, begin=0, end=1)
    with pytest.raises(OSError, match="symbolic links"):
        read_end(journal, SHIM)
    assert other.read_text() == "untouched"
