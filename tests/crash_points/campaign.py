"""Kills a service at each of its crash points, and its recovery at each of the recovery's points.

python tests/crash_points/campaign.py [--pairs 200] [--minutes M] [--seed S] [FIRST SECOND]
python tests/crash_points/campaign.py --mutate NAME [--mutate NAME …]

Two thirds of the pairs are for the scenario of one service, one third for that of two services on
one PostgreSQL. A scenario is first played without a kill by a crash point, which finds its points.
Each trial plays it again in a home of its own: a service is killed at one point, and its recovery
(or the takeover by its peer) at a second one; the next start must converge. The first points come
in turn; the second points are drawn. `FIRST SECOND` replays one trial. Exit code 0: no promise was
broken, and all known points were reached. With `--mutate`: each mutant was detected.
"""

from __future__ import annotations

import itertools
import logging
import math
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Final, Protocol

import click
import structlog

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench
sys.path.insert(0, str(Path(__file__).parents[1]))

from crash_points import points
from crash_points.kills import Kill
from crash_points.known import COMMITS, UNREACHED
from crash_points.mutants import MUTANTS
from crash_points.points import EFFECTS
from crash_points.replicas import replicas
from crash_points.scenario import BRIEF, FULL, Scenario, Size, single
from crash_points.snapshot import Violation
from crash_points.world import Broken
from runrecovery_service.storage.opening import open_database

from bench.postgres import memory_place, scratch_postgres

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


def play(
    kills: Sequence[Kill], *, size: Size = FULL, mutant: str = "", database: str = ""
) -> Result:
    """Play a scenario once, with kills one after the other.

    Args:
        database: a migrated PostgreSQL database, for the scenario of two services.
    """
    end_s = time.monotonic() + TRIAL_S
    with tempfile.TemporaryDirectory(prefix="runrecovery-points-") as name, ExitStack() as scene:
        folder = Path(name)
        scenario: Scenario = scene.enter_context(
            replicas(folder, kills, database=database, end_s=end_s)
            if database
            else single(folder, kills, size=size, end_s=end_s)
        )
        if mutant:
            scenario.world.home.env[points.MUTANT] = mutant
        problems = scenario.world.problems
        try:
            scenario.play()
            problems += scenario.judge()
        except Broken:
            pass
        except Exception as error:  # noqa: BLE001 - a trial that hangs is a result
            logs = [world.home.services[-1].text[-3000:] for world in scenario.worlds]
            problems.append(Violation("stuck", "\n".join([f"{error!r:.1000}", *logs])))
        worlds = sorted(scenario.worlds, key=lambda world: world.instance)
        return Result(
            kills=kills,
            reached=tuple(kill for world in worlds for kill in world.fired),
            passed=[
                (pid, f"{world.instance}/{point}" if database else point)
                for world in worlds
                for pid, point in world.passed
            ],
            broken=tuple(dict.fromkeys(problems)),
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
    while True:
        for point in rng.sample(sorted(most), len(most)):
            first = _kill([point], rng.randint(1, most[point]), rng)
            recoveries = [f"{first.instance}/start: " if first.instance else "start: "]
            recoveries += ["b/takeover: "] if first.instance == "a" else []
            begin = rng.choice(recoveries)
            some = sorted(each for each in most if each.startswith(begin))
            yield first, _kill(rng.sample(some, min(SECONDS, len(some))), 1, rng)


def _kill(named: Sequence[str], times: int, rng: Random) -> Kill:
    kill = Kill.parse("|".join(name.rpartition("/")[2] for name in named))
    instance = named[0].rpartition("/")[0] if named else ""
    return replace(kill, times=times, with_shims=rng.random() < WITH_SHIMS, instance=instance)


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
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    begun = time.monotonic()
    if mutate:
        sys.exit(0 if all(is_detected(name) for name in mutate) else 1)
    with databases() as database:
        if replay:
            kills = [Kill.parse(text) for text in replay]
            with database(is_shared=bool(kills[0].instance)) as url:
                results, unreached = [play(kills, database=url)], []
        else:
            seed = secrets.randbelow(10**6) if seed is None else seed
            click.echo(f"seed {seed}")
            campaign = Campaign(Random(seed), database)  # noqa: S311 - moments, not secrets
            limit_s = minutes * 60 or math.inf
            shares = [
                Share(pairs=pairs - pairs // 3, is_shared=False, until_s=begun + limit_s * 2 / 3),
                Share(pairs=pairs // 3, is_shared=True, until_s=begun + limit_s),
            ]
            with ThreadPoolExecutor(jobs) as pool:
                results = [result for share in shares for result in campaign.run(pool, share)]
            unreached = unreached_by(results)
    for result in [each for each in results if each.broken][:SHOWN]:
        show(result)
    for problem in unreached:
        click.echo(f"  {problem}")
    click.echo(summary(results, time.monotonic() - begun))
    sys.exit(1 if unreached or any(result.broken for result in results) else 0)


class NewDatabase(Protocol):
    """Makes a database for one trial."""

    def __call__(self, *, is_shared: bool) -> AbstractContextManager[str]:
        """Return the URL of a migrated PostgreSQL database, or an empty one for SQLite."""
        ...


@contextmanager
def databases() -> Iterator[NewDatabase]:
    """Run a PostgreSQL, and make databases in it."""
    numbers = itertools.count()
    with (
        scratch_postgres("max_connections=200", "fsync=off", place=memory_place()) as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        open_database(server.create("migrated"), Path(folder)).close()

        @contextmanager
        def make(*, is_shared: bool) -> Iterator[str]:
            if not is_shared:
                yield ""
                return
            name = f"trial_{next(numbers)}"
            yield server.create(name, template="migrated")
            server.drop(name)

        yield make


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a campaign: pairs of one scenario.

    Attributes:
        pairs: how many.
        is_shared: whether two services share a PostgreSQL.
        until_s: no trial begins after this time, as of `monotonic`.
    """

    pairs: int
    is_shared: bool
    until_s: float


@dataclass(frozen=True, slots=True)
class Campaign:
    """Trials of pairs that are drawn."""

    rng: Random
    database: NewDatabase

    def run(self, pool: ThreadPoolExecutor, share: Share) -> Iterator[Result]:
        """Yield the results of a scenario without kills, and of a trial of each pair."""
        with self.database(is_shared=share.is_shared) as url:
            survey = play([], database=url)
        yield survey
        drawn = pairs_of(survey, self.rng)
        chosen = [next(drawn) for _ in range(share.pairs)]
        tried = pool.map(lambda pair: self._try(pair, share), chosen)
        yield from (result for result in tried if result is not None)

    def _try(self, kills: Sequence[Kill], share: Share) -> Result | None:
        if time.monotonic() > share.until_s:
            return None
        with self.database(is_shared=share.is_shared) as url:
            return play(kills, database=url)


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
    sides = (f"{side} {effect.name}" for effect in EFFECTS for side in SIDES)
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
