"""Plays seeded histories of a service: calls, faults, crashes and stops, in virtual time.

python tests/simulation/simulate.py [--histories 10000] [--first S] [--jobs 2] [--mutate NAME …]
python tests/simulation/simulate.py --seed S [--mutate NAME]

Exit code 0: the service has kept its promises in every history. With `--mutate`: some history has
found each mutant. With `--seed` the history of one seed is played and printed.
"""

from __future__ import annotations

import multiprocessing
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import click

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench
sys.path.insert(0, str(Path(__file__).parents[1]))

from simulation.history import History
from simulation.mutants import MUTANTS, mutated
from simulation.world import Violation

from bench.postgres import memory_place

PER_TASK: Final = 25
SHOWN: Final = 5
MUTANT_HISTORIES: Final = 2000
EXPECTED: Final = frozenset(
    {
        "crash at begin", "crash at commit", "crash at step", "crash in a recovery", "fault",
        "launch refused", "orphan", "planned stop", "reboot", "served", "shim lost at its gate",
        "tree deadline", "tree not ended", "CreateRun", "SubmitReply", "CancelRun", "ReopenRun",
        "sent again", "SUCCEEDED", "FAILED", "CANCELED", "auto-decided",
        "rule accepted_reply_redriven",
        "rule result_found_in_output", "rule session_handle_lost", "rule reopened_by_caller",
    }
)  # fmt: skip
"""Situations that many histories must have reached, or they prove little."""


@dataclass
class Result:
    """What came of some histories.

    Attributes:
        violations: by seed.
        reached: how often each situation was reached.
    """

    histories: int = 0
    violations: dict[int, str] = field(default_factory=dict)
    reached: Counter[str] = field(default_factory=Counter)
    cpu_s: float = 0.0

    def __add__(self, other: Result) -> Result:
        return Result(
            self.histories + other.histories,
            self.violations | other.violations,
            self.reached + other.reached,
            self.cpu_s + other.cpu_s,
        )


def play(seeds: Sequence[int], *, mutant: str | None = None) -> Result:
    """Play the histories of these seeds; with a mutant only until one of them finds it."""
    result, begun_s = Result(), time.process_time()
    with mutated(mutant), _folder() as folder:
        for seed in seeds:
            history = History(seed, folder / "history")
            try:
                history.play()
            except Violation as violation:
                result.violations[seed] = str(violation)
            result.histories += 1
            result.reached.update(history.reached)
            if result.violations and mutant is not None:
                break
    result.cpu_s = time.process_time() - begun_s
    return result


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="simulation-", dir=memory_place()) as folder:
        yield Path(folder)


def play_in_parallel(first: int, histories: int, *, jobs: int, mutant: str | None) -> Result:
    """Play many histories. A mutant is not played on once it is found."""
    tasks = [
        range(seed, min(seed + PER_TASK, first + histories))
        for seed in range(first, first + histories, PER_TASK)
    ]
    result = Result()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        try:
            for part in pool.map(partial(play, mutant=mutant), tasks):
                result += part
                if result.violations and (mutant is not None or len(result.violations) >= SHOWN):
                    break
        except KeyboardInterrupt:
            print("interrupted")
        pool.shutdown(wait=True, cancel_futures=True)
    return result


def show(seed: int, mutant: str | None) -> int:
    """Play one history, print it, and return the exit code."""
    with mutated(mutant), _folder() as folder:
        history = History(seed, folder / "history")
        try:
            history.play()
        except Violation as violation:
            print("\n".join(history.world.trace))
            print(f"VIOLATION {violation}")
            return 1
    print("\n".join(history.world.trace))
    return 0


@click.command()
@click.option("--histories", default=1000, show_default=True)
@click.option("--first", type=int, help="The first seed; by default a random one.")
@click.option("--jobs", default=2, show_default=True)
@click.option("--seed", type=int, help="Play and print this one history.")
@click.option("--mutate", type=click.Choice([*MUTANTS]), multiple=True)
def main(
    histories: int, first: int | None, jobs: int, seed: int | None, mutate: tuple[str, ...]
) -> None:
    """Play histories, and exit with 1 if a promise was broken."""
    if seed is not None:
        sys.exit(show(seed, mutate[0] if mutate else None))
    first = secrets.randbelow(10**9) if first is None else first
    if mutate:
        sys.exit(_find(mutate, first, jobs))
    begun_s = time.monotonic()
    result = play_in_parallel(first, histories, jobs=jobs, mutant=None)
    for number, text in list(result.violations.items())[:SHOWN]:
        print(f"seed {number}: {text}\n  python tests/simulation/simulate.py --seed {number}")
    missing = EXPECTED - result.reached.keys() if histories >= MUTANT_HISTORIES else ()
    for situation in sorted(missing):
        print(f"no history has reached: {situation}")
    print(", ".join(f"{name} {count}" for name, count in sorted(result.reached.items())))
    print(
        f"{result.histories} histories from seed {first}: {len(result.violations)} broke a promise;"
        f" {time.monotonic() - begun_s:.0f} s, {result.cpu_s:.0f} s of CPU time"
    )
    sys.exit(bool(result.violations or missing))


def _find(mutants: Sequence[str], first: int, jobs: int) -> int:
    missed = 0
    for mutant in mutants:
        result = play_in_parallel(first, MUTANT_HISTORIES, jobs=jobs, mutant=mutant)
        if result.violations:
            seed, text = next(iter(result.violations.items()))
            print(f"{mutant}: found by seed {seed}: {text}", flush=True)
        else:
            missed += 1
            print(f"{mutant}: NOT found in {result.histories} histories from {first}", flush=True)
    return bool(missed)


if __name__ == "__main__":
    main()
