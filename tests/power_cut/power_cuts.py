"""Cuts the power of a recorded service at random moments, and opens its store afterwards.

python tests/power_cut/power_cuts.py [--cuts 10000] [--starts 50] [--seed S] [--mutate NAME]

A service works for some seconds under strace, is killed, starts again and stops. Each cut takes the
files at a random moment, and leaves out changes that were not synced. Then the store must open and
be whole, and no call may be lost whose answer the client had by then. After some cuts the service
itself starts. Exit code 0: so it was. With `--mutate`: some cut has found the mutant.
"""

from __future__ import annotations

import logging
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import click
import structlog

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench
sys.path.insert(0, str(Path(__file__).parents[1]))

from power_cut.disk import Disk
from power_cut.mutants import MUTANTS, mutated
from power_cut.recording import TRUST_FILE, Answered, Recording, record
from power_cut.trace import STRACE
from power_cut.trial import Violation, empty, judge, judge_by_a_start

from bench.postgres import memory_place

RUNS: Final = 6
"""Runs of each client at each start of the recorded service."""
SHOWN: Final = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Campaign:
    """The power cuts of one recording.

    Attributes:
        cuts: how many.
        starts: after how many of them the service itself starts too.
    """

    recording: Recording
    cuts: int
    starts: int
    seed: int

    def run(self, target: Path) -> Iterator[Violation]:
        """Yield every violation. The states of the disk are made in `target`, one after another."""
        rng = Random(self.seed)  # noqa: S311 - moments, not secrets
        calls = self.recording.calls
        moments = Counter(rng.randint(0, len(calls)) for _ in range(self.cuts))
        started = set(rng.sample(range(self.cuts), self.starts))
        disk, number = Disk(str(self.recording.root), self.recording.files), 0
        whole = {disk.content(TRUST_FILE)}
        for moment in range(len(calls) + 1):
            for _ in range(moments[moment]):
                empty(target)
                disk.cut(target, rng)
                answered = self._answered_by(moment)
                if (target / TRUST_FILE).read_bytes() not in whole:
                    yield Violation("damaged", TRUST_FILE)
                yield from judge(target, answered)
                if number in started:
                    yield from judge_by_a_start(target, answered)
                number += 1
            if moment < len(calls):
                disk.apply(calls[moment])
                if calls[moment].name.startswith("rename"):
                    whole.add(disk.content(TRUST_FILE))

    def _answered_by(self, moment: int) -> list[Answered]:
        """Return the calls that were answered before the power is cut.

        Whatever was answered before the latest system call began was committed by an earlier one.
        """
        by_s = self.recording.calls[moment - 1].begun_s if moment else 0.0
        return [each for each in self.recording.answered if each.at_s < by_s]


@click.command()
@click.option("--cuts", default=10_000, show_default=True)
@click.option("--starts", default=50, show_default=True)
@click.option("--seed", type=int, default=None)
@click.option("--mutate", type=click.Choice(list(MUTANTS)))
def main(cuts: int, starts: int, seed: int | None, mutate: str | None) -> None:
    """Run the campaign."""
    # What the service logs of each of the thousands of stores is not of interest.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    seed = secrets.randbelow(10**6) if seed is None else seed
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="runrecovery-cuts-", dir=memory_place()) as name:
        folder = Path(name)
        recording = record(
            folder,
            seed=seed,
            runs=RUNS,
            command=lambda trace: mutated(mutate, [*STRACE, str(trace)]),
        )
        campaign = Campaign(recording=recording, cuts=cuts, starts=min(starts, cuts), seed=seed)
        found = list(campaign.run(folder / "cut"))
    kinds = Counter(violation.kind for violation in found)
    for violation in found[:SHOWN]:
        click.echo(f"  {violation.kind}: {violation.detail}")
    click.echo(
        f"seed {seed}: {cuts} power cuts ({campaign.starts} with a start) over"
        f" {len(recording.calls)} system calls and {len(recording.answered)} answers,"
        f" {time.monotonic() - begun:.0f} s: {kinds['lost']} answers lost,"
        f" {kinds['damaged']} files damaged, {kinds['refused']} starts refused"
    )
    if mutate is not None:
        is_detected = bool(MUTANTS[mutate].kinds & kinds.keys())
        click.echo(f"mutant {mutate}: {'detected' if is_detected else 'NOT DETECTED'}")
        sys.exit(0 if is_detected else 1)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
