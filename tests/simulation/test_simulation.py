"""A short simulation. `make campaign-simulation` plays more histories, and detects mutants."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from simulation import simulate
from simulation.history import History
from simulation.virtual_loop import Stuck, VirtualLoop

SCRIPT = Path(simulate.__file__)
HISTORIES, PARTS = 48, 6


def play(seed: int, folder: Path) -> History:
    history = History(seed, folder / "history")
    history.play()
    return history


@pytest.mark.parametrize("part", range(PARTS))
def test_no_history_breaks_a_promise(part: int) -> None:
    result = simulate.play(range(part * HISTORIES // PARTS, (part + 1) * HISTORIES // PARTS))

    assert (result.histories, result.violations) == (HISTORIES // PARTS, {})
    assert {"fault", "served", "SUCCEEDED"} <= result.reached.keys()


def test_a_seed_gives_the_same_history_in_every_process(tmp_path: Path) -> None:
    histories = (play(seed, tmp_path) for seed in range(HISTORIES))
    here = next(one for one in histories if one.reached["crash at commit"] and one.reached["fault"])
    for hash_seed in ("1", "2"):
        shown = subprocess.run(
            [sys.executable, str(SCRIPT), "--seed", str(here.seed)],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        )
        assert shown.stdout.splitlines() == here.world.trace
    assert len(here.world.trace) > 20


def test_another_seed_gives_another_history(tmp_path: Path) -> None:
    assert play(1, tmp_path).world.trace != play(2, tmp_path).world.trace


@pytest.mark.parametrize(
    ("mutant", "violation"),
    [
        ("rearmed", " is at another time"),
        ("slot-twice", "I9: "),
        ("orphans", "I5: "),
        ("gate", "I2: SERVING, but nothing was decided on "),
        ("answer", " for ever"),
        ("receipts", "I1: a create was recorded twice"),
        ("launches", "I3: "),
        ("heartbeats", " for ever"),
    ],
)
def test_the_simulation_detects(mutant: str, violation: str) -> None:
    found = simulate.play(range(HISTORIES), mutant=mutant)

    assert [text for text in found.violations.values() if violation in text] != []


def test_time_passes_only_when_nothing_is_ready() -> None:
    loop = VirtualLoop(lambda: 0.25)
    order: list[tuple[str, float]] = []
    loop.call_later(5.0, lambda: order.append(("timer", loop.time())))
    loop.run_in_executor(None, lambda: order.append(("blocking", loop.time())))
    loop.call_soon(lambda: order.append(("ready", loop.time())))

    loop.run_for(10.0)
    loop.close()

    assert order == [("ready", 0.0), ("blocking", 0.25), ("timer", 5.0)]


def test_a_loop_in_which_nothing_can_happen_any_more_fails() -> None:
    loop = VirtualLoop(lambda: 0.0)
    with pytest.raises(Stuck):
        loop.run_until_complete(loop.create_future())
    loop.close()
