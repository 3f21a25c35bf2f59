"""Kills a service at each of its crash points, and its recovery at each of the recovery's points.

python tests/crash_points/campaign.py [--pairs 200] [--minutes M] [--seed S] [FIRST SECOND]
python tests/crash_points/campaign.py --mutate NAME [--mutate NAME …]

First the scenario is played without a kill by a crash point, which finds all points. Each trial
plays it again in a home of its own: the service is killed at one point, and its recovery at a
second one; the next start must converge. The first points come in turn, so that few pairs try each
of them; the second points are drawn. `FIRST SECOND` replays one trial. Exit code 0: no promise was
broken, and all known points were reached. With `--mutate`: each mutant was detected.
"""

from __future__ import annotations

import math
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

import click

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench
sys.path.insert(0, str(Path(__file__).parents[1]))

from crash_points import points
from crash_points.kills import Kill
from crash_points.known import COMMITS, UNREACHED
from crash_points.mutants import MUTANTS
from crash_points.points import EFFECTS
from crash_points.scenario import BRIEF, FULL, Scenario, Size, home_of
from crash_points.snapshot import Violation
from crash_points.world import Broken, World

TRIAL_S: Final = 300.0
SECONDS: Final = 4
"""How many points are drawn for a second kill. Not every recovery passes every point."""
WITH_SHIMS: Final = 0.5
SHOWN: Final = 5
SIDES: Final = ("before", "after")


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One trial: what it has passed and broken. `reached`: the kills that happened."""

    kills: Sequence[Kill]
    reached: Sequence[Kill]
    passed: Sequence[tuple[str, str]]
    broken: Sequence[Violation]


def play(kills: Sequence[Kill], *, size: Size = FULL, mutant: str = "") -> Result:
    """Play the scenario once, with kills one after the other."""
    with tempfile.TemporaryDirectory(prefix="runrecovery-points-") as name:
        folder = Path(name)
        with home_of(folder) as (home, receiver):
            if mutant:
                home.env[points.MUTANT] = mutant
            world = World(home, folder, list(kills), end_s=time.monotonic() + TRIAL_S)
            scenario = Scenario(world=world, size=size, receiver=receiver)
            try:
                scenario.play()
                world.problems += scenario.judge()
            except Broken:
                pass
            except Exception as error:  # noqa: BLE001 - a trial that hangs is a result
                log = home.services[-1].text[-3000:]
                world.problems.append(Violation("stuck", f"{error!r:.1000}\n{log}"))
            return Result(
                kills=kills,
                reached=tuple(world.fired),
                passed=world.passed,
                broken=tuple(dict.fromkeys(world.problems)),
            )


def most_passes(passed: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Return for each point how often one process has passed it at most."""
    most: dict[str, int] = {}
    for (_, point), count in Counter(passed).items():
        most[point] = max(most.get(point, 0), count)
    return most


def pairs_of(survey: Result, rng: Random) -> Iterator[tuple[Kill, Kill]]:
    """Yield pairs of kills for ever: at any point, and at a point of the recovery from it.

    Each point comes in turn as the first. The second is the first of some that is passed.
    """
    most = most_passes(survey.passed)
    recovery = sorted(point for point in most if point.startswith("start: "))
    while True:
        for point in rng.sample(sorted(most), len(most)):
            first = Kill((point,), rng.randint(1, most[point]), rng.random() < WITH_SHIMS)
            some = tuple(rng.sample(recovery, SECONDS))
            yield first, Kill(some, 1, rng.random() < WITH_SHIMS)


@click.command()
@click.option("--pairs", default=200, show_default=True)
@click.option("--minutes", default=0.0, help="begin no trial after this time; 0: no limit")
@click.option("--jobs", default=2, show_default=True)
@click.option("--seed", type=int, default=None)
@click.option("--mutate", multiple=True, type=click.Choice(list(MUTANTS)))
@click.argument("replay", nargs=-1)
def main(
    pairs: int, minutes: float, jobs: int, seed: int | None, mutate: tuple[str, ...],
    replay: tuple[str, ...],
) -> None:  # fmt: skip
    """Run the campaign, one of its trials, or the trial of a mutant."""
    begun = time.monotonic()
    if mutate:
        sys.exit(0 if all(is_detected(name) for name in mutate) else 1)
    if replay:
        results = [play([Kill.parse(text) for text in replay])]
        unreached = []
    else:
        seed = secrets.randbelow(10**6) if seed is None else seed
        click.echo(f"seed {seed}")
        survey = play([])
        drawn = pairs_of(survey, Random(seed))  # noqa: S311 - moments, not secrets
        chosen = [next(drawn) for _ in range(pairs)]
        until_s = begun + minutes * 60 if minutes else math.inf
        with ThreadPoolExecutor(jobs) as pool:
            tried = pool.map(lambda pair: play_until(until_s, pair), chosen)
            results = [survey, *(each for each in tried if each is not None)]
        unreached = unreached_by(results)
    for result in [each for each in results if each.broken][:SHOWN]:
        show(result)
    for problem in unreached:
        click.echo(f"  {problem}")
    click.echo(summary(results, time.monotonic() - begun))
    sys.exit(1 if unreached or any(result.broken for result in results) else 0)


def play_until(until_s: float, kills: Sequence[Kill]) -> Result | None:
    """Play a trial, unless the time is over."""
    return play(kills) if time.monotonic() < until_s else None


def is_detected(mutate: str) -> bool:
    """Play the trial of a mutant, and return whether it was detected."""
    mutant = MUTANTS[mutate]
    result = play(mutant.kills, size=BRIEF, mutant=mutate)
    found = {violation.kind for violation in result.broken}
    detected = bool(found & mutant.kinds)
    if not detected:
        show(result)
    click.echo(f"mutant {mutate}: {'detected' if detected else 'NOT DETECTED'} ({sorted(found)})")
    return detected


def unreached_by(results: Sequence[Result]) -> list[str]:
    """Return a sentence for each known point that was not passed, and each unknown one that was."""
    names = {point.partition(": ")[2] for result in results for _, point in result.passed}
    commits = {name.removeprefix("commit of ") for name in names if name.startswith("commit of ")}
    sides = (
        f"{side} {effect.name}" for effect in EFFECTS if not effect.needs_replicas for side in SIDES
    )
    return [
        *(f"no trial has reached: commit of {name}" for name in sorted(COMMITS - commits)),
        *(f"an unknown use case commits: {n}" for n in sorted(commits - COMMITS - {*UNREACHED})),
        *(f"no trial has reached: {side}" for side in sides if side not in names),
    ]


def show(result: Result) -> None:
    """Print the violations of a trial, and the words that replay it."""
    click.echo("  " + " ".join(f"'{kill}'" for kill in result.reached))
    for violation in result.broken:
        click.echo(f"    {violation.kind}: {violation.detail}")


def summary(results: Sequence[Result], took_s: float) -> str:
    """Return the figures of a campaign."""
    points_passed = {point for result in results for _, point in result.passed}
    firsts = {result.reached[0].points for result in results if result.reached}
    both = [result.reached for result in results if len(result.reached) > 1]
    return (
        f"{len(results)} trials, {took_s:.0f} s: {len(points_passed)} points passed,"
        f" {len(firsts)} of them killed first; {len(both)} second kills, at"
        f" {len({second.points for _, second in both})} points;"
        f" {sum(bool(result.broken) for result in results)} trials broke a promise"
    )


if __name__ == "__main__":
    main()
