"""Fails calls of a service to its database, one after another, at every place that makes one.

python tests/faults/database_faults.py --database sqlite [--calls 300] [--seed S] [--mutate NAME]

First a service lives without faults, which shows the sites of its calls (`database_calls.py`). Then
it lives again and again, and in each life some calls fail: at sites where this kind of failure was
not tried yet, once, or from there on for a while. `judge.py` has what must be true afterwards. Exit
code 0: so it was. With `--mutate`: some life has found the mutant. `--replay` plays one printed
life.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from datetime import datetime
from itertools import cycle
from pathlib import Path
from random import Random
from typing import Any, Final

import click
import structlog

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench
sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.database_calls import POSTGRESQL_KINDS, SQLITE_KINDS
from faults.judge import judge
from faults.life import Arena, Database, Fault, Plan, arena
from faults.mutants import MUTANTS

from bench.postgres import ScratchPostgres, memory_place, scratch_postgres

KINDS: Final = {"sqlite": list(SQLITE_KINDS), "postgresql": list(POSTGRESQL_KINDS)}
CALLS_A_LIFE: Final = 30
STARTS_A_LIFE: Final = 1
"""How many of them before the service serves: `recovery_tries` bounds the failures of a start."""
OUTAGES: Final = 0.25
"""The share of lives in which all calls fail for a while."""
OUTAGE_S: Final = (0.3, 8.0)


@dataclass(slots=True)
class Site:
    """A place that calls the database.

    Attributes:
        count: how often a life without faults has called there.
        is_start: whether the first call came before the service served.
    """

    name: str
    is_start: bool
    count: int = 1


@dataclass(slots=True)
class Life:
    """A life that was played.

    Attributes:
        failed: the faults that were made. A planned one is missing if its call did not come.
    """

    plan: Plan
    failed: list[Fault]
    exits: list[tuple[str, int]]
    answers: Counter[str]
    violations: list[str]
    last_words: list[str]


@dataclass(slots=True)
class Campaign:
    """The lives of one arena.

    Attributes:
        only: a regular expression that finds the names of the sites at which calls fail.
        tried: the sites at which a call has failed, each with the kind of failure.
    """

    arena: Arena
    database: Database
    rng: Random
    mutant: str = ""
    only: str = ""
    sites: dict[str, Site] = field(default_factory=dict)
    tried: set[tuple[str, str]] = field(default_factory=set)

    def survey(self) -> Life:
        """Play a life without faults, and learn the sites."""
        return self.play(Plan(database=self.database, mutant=self.mutant))

    def lives(self, calls: int) -> Iterator[Life]:
        """Play lives until so many calls have failed."""
        kinds = KINDS[self.database]
        if self.mutant:
            kinds, self.only = [MUTANTS[self.mutant].kind], MUTANTS[self.mutant].sites
        turns, failed = cycle(self.rng.sample(kinds, len(kinds))), 0
        while failed < calls:
            life = self.play(self._plan(next(turns)))
            yield life
            failed += max(1, len(life.failed))

    def play(self, plan: Plan) -> Life:
        """Play one life, and judge it."""
        journal = self.arena.play(plan)
        is_outage = any(fault.seconds for fault in plan.faults)
        violations = judge(self.arena, journal, is_outage=is_outage)
        failed = self._read_calls()
        self.tried |= {(fault.site, fault.kind) for fault in failed}
        words = [line for one in self.arena.home.services for line in one.text.splitlines()]
        last_words = [line for line in words if line.startswith("error: ")]
        return Life(plan, failed, journal.exits, journal.answers, violations, last_words)

    def _plan(self, kind: str) -> Plan:
        rng = self.rng
        wanted = [key for key, site in self.sites.items() if re.search(self.only, site.name)]
        new = [site for site in wanted if (site, kind) not in self.tried]
        rng.shuffle(new)
        starts = [site for site in new if self.sites[site].is_start][:STARTS_A_LIFE]
        later = [site for site in new if not self.sites[site].is_start]
        chosen = [*starts, *later[: CALLS_A_LIFE - len(starts)]] or [rng.choice(wanted)]
        if is_outage := not self.mutant and rng.random() < OUTAGES:
            chosen = [rng.choice(chosen)]
        faults = tuple(
            Fault(
                site=site,
                nth=rng.choice((1, 1, rng.randint(1, self.sites[site].count))),
                kind=kind,
                seconds=round(rng.uniform(*OUTAGE_S), 1) if is_outage else 0.0,
            )
            for site in chosen
        )
        return Plan(database=self.database, faults=faults, mutant=self.mutant)

    def _read_calls(self) -> list[Fault]:
        """Learn the sites of the latest life, and return the faults that were made."""
        lines = (self.arena.plan_folder / "journal.jsonl").read_text("utf-8").splitlines()
        serving = self.arena.home.services[0].events("service.serving")
        serving_s = _seconds(serving[0]["timestamp"]) if serving else float("inf")
        failed = []
        for line in map(json.loads, lines):
            match line:
                case {"fault": fault}:
                    failed.append(Fault(**fault))
                case {"site": site, "name": name, "at": at_s}:
                    self.sites.setdefault(site, Site(name=name, is_start=at_s < serving_s))
                case {"counts": counts}:
                    for site, count in counts.items():
                        self.sites[site].count = max(count, self.sites[site].count)
        return failed


@contextmanager
def campaign(
    folder: Path, server: ScratchPostgres | None, *, seed: int, mutant: str = "", only: str = ""
) -> Iterator[Campaign]:
    """Make a campaign in a new folder, on SQLite if no server is given."""
    database: Database = "sqlite" if server is None else "postgresql"
    with arena(folder / f"faults-{secrets.token_hex(4)}", server) as made:
        yield Campaign(
            arena=made,
            database=database,
            rng=Random(seed),  # noqa: S311 - choices
            mutant=mutant,
            only=only,
        )


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


def show(life: Life, sites: dict[str, Site]) -> None:
    """Print a life that broke a promise, and how to replay it."""
    for violation in life.violations:
        click.echo(f"  {violation}")
    for fault in life.failed:
        click.echo(f"    {fault.kind} #{fault.nth} at {sites[fault.site].name[:300]}")
    click.echo(f"    ends {life.exits} {life.last_words}, answers {dict(life.answers)}")
    click.echo(f"    --replay '{json.dumps(asdict(life.plan))}'")


def _plan_of(text: str) -> Plan:
    given: dict[str, Any] = json.loads(text)
    return Plan(**given | {"faults": tuple(Fault(**fault) for fault in given["faults"])})


@click.command()
@click.option(
    "--database", type=click.Choice(list(KINDS)), help="Default: the mutant's, or SQLite."
)
@click.option("--calls", default=300, show_default=True, help="How many calls fail.")
@click.option("--seconds", type=float, default=float("inf"), help="Begin no life after this time.")
@click.option("--seed", type=int, default=None)
@click.option("--mutate", type=click.Choice(list(MUTANTS)))
@click.option("--only", default="", metavar="REGEX", help="Fail calls at such sites only.")
@click.option("--replay", type=_plan_of, default=None, metavar="JSON")
def main(
    database: Database | None,
    calls: int,
    seconds: float,
    seed: int | None,
    mutate: str | None,
    only: str,
    replay: Plan | None,
) -> None:
    """Run the campaign."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    seed = secrets.randbelow(10**6) if seed is None else seed
    database = database or (MUTANTS[mutate].database if mutate else "sqlite")
    begun, found, failed, lives = time.monotonic(), 0, 0, 0
    answers: Counter[str] = Counter()
    exits: Counter[tuple[str, int]] = Counter()
    # Durability is not what this campaign is about, and syncs take most of the time of a life.
    place = memory_place()
    server_of: dict[str, AbstractContextManager[ScratchPostgres | None]] = {
        "sqlite": nullcontext(),
        "postgresql": scratch_postgres("fsync=off", place=place),
    }
    with (
        tempfile.TemporaryDirectory(prefix="runrecovery-faults-", dir=place) as name,
        server_of[database] as server,
        campaign(Path(name), server, seed=seed, mutant=mutate or "", only=only) as made,
    ):
        assert (clean := made.survey()).violations == [], clean
        for life in [made.play(replay)] if replay else made.lives(calls):
            lives, failed = lives + 1, failed + len(life.failed)
            answers.update(life.answers)
            exits.update(life.exits)
            if life.violations:
                found += 1
                show(life, made.sites)
            if (mutate and found) or time.monotonic() - begun > seconds:
                break
        pairs = len(made.sites) * len(KINDS[database])
        click.echo(
            f"{database}, seed {seed}: {failed} calls failed in {lives} lives,"
            f" {len(made.tried)} of {pairs} pairs of site and kind,"
            f" {time.monotonic() - begun:.0f} s: {found} lives broke a promise;"
            f" ends {dict(exits)}; answers {dict(answers)}"
        )
    if mutate:
        click.echo(f"mutant {mutate}: {'detected' if found else 'NOT DETECTED'}")
        sys.exit(not found)
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
