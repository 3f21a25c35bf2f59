"""Hostile input against a real service: every method of the contract, and the port below it.

    python tests/fuzz/hostile.py --cases 50000
    python tests/fuzz/hostile.py --seed 7 --cases 250          the same cases again
    python tests/fuzz/hostile.py --replay runrecovery.v1.RunService/GetRun 0a0161
    python tests/fuzz/hostile.py --mutate unknown --cases 500  must be detected

Cases come from the descriptors (`cases.py`), and hostile connections from `attacks.py`. Each answer
must be a documented one (`oracle.py` reads docs/api.md) and disclose nothing internal. The store
must not change, unless the call was to change it and was answered OK (`effects.py`). At the end the
service serves, has no more memory than allowed, has no defect in its log, and leaves no process.

Exit code 0: every claim held, or the mutant was detected. 1: otherwise.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # the client's complaints about what it sends
sys.path.insert(0, str(Path(__file__).parents[2]))  # bench
sys.path.insert(0, str(Path(__file__).parents[1]))

import click
import grpc
from fuzz import attacks
from fuzz.cases import METHODS, OURS, Case, Manner, cases, changes
from fuzz.effects import EffectChecker
from fuzz.mutants import MUTANTS
from fuzz.oracle import Fault, Found
from fuzz.target import Target, start_target
from hypothesis import HealthCheck, Phase, Verbosity, given, settings
from hypothesis import seed as seeded

SEEDS: Final = 2**32
ROUND: Final = 250
"""How many cases of one seed are played before one attack."""
WARM: Final = 500
"""Cases until the service's memory is measured first."""
GROWTH_MIB: Final = 64.0
"""What it may grow by afterwards: four times what was seen (docs/development.md)."""


class FaultFound(Exception):
    """A case has found a fault."""


@dataclass(slots=True)
class Summary:
    """What was counted and found over all cases."""

    seed: int
    played: int = 0
    attacks: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    methods: Counter[str] = field(default_factory=Counter)
    changes: int = 0
    warm_mib: float = 0.0
    end_mib: float = 0.0
    found: list[Found] = field(default_factory=list)
    guilty: Case | None = None

    def kinds(self) -> set[Fault]:
        """Return the kinds of the faults."""
        return {fault for fault, _ in self.found}

    def lines(self) -> Iterator[str]:
        """Return the summary in a few lines."""
        yield f"cases              {self.played}, of {len(self.methods)} methods"
        yield "answers            " + ", ".join(f"{n} {c}" for c, n in self.statuses.most_common())
        yield f"effects            {self.changes}, each looked at"
        yield f"attacks            {self.attacks.total()} of {len(self.attacks)} kinds"
        yield f"memory             {self.warm_mib:.0f} MiB warm, {self.end_mib:.0f} MiB at the end"
        for fault, what in self.found:
            yield f"FOUND              {fault}: {what}"
        if self.guilty is not None:
            yield f"again              python tests/fuzz/hostile.py {self.guilty.command()}"
        yield f"faults             {len(self.found) or 'none'}"


class Campaign:
    """Plays cases and attacks against one target."""

    def __init__(self, target: Target, seed: int, *, shrinks: bool) -> None:
        self.summary = Summary(seed)
        self._target = target
        self._effects = EffectChecker(target)
        self._phases = (Phase.generate, Phase.shrink) if shrinks else (Phase.generate,)

    def run(self, total: int, *, with_attacks: bool = True) -> Summary:
        """Play `total` cases, or until one finds a fault."""
        summary = self.summary
        number = 0
        while summary.played < total and not summary.found:
            self._round(number, min(ROUND, total - summary.played))
            if with_attacks and not summary.found:
                self._attack(number)
            if not summary.warm_mib and summary.played >= min(WARM, total // 2):
                summary.warm_mib = self._target.resident_mib()
            number += 1
        summary.found += _ending(self._target, summary)
        return summary

    def play(self, case: Case) -> list[Found]:
        """Play one case."""
        summary = self.summary
        summary.played += 1
        try:
            outcome, found = self._effects.play(case)
        except (AssertionError, grpc.RpcError) as error:
            return [(Fault.HEALTH, f"{type(error).__name__}: {error}"[:500])]
        if case.method in METHODS:
            summary.methods[case.method] += 1
        summary.statuses[outcome.code.name if outcome.code else "not sent"] += 1
        summary.changes += outcome.is_ok and case.method in OURS and changes(OURS[case.method])
        return found

    def _round(self, number: int, count: int) -> None:
        """Play the cases of one seed; after the first that finds something, only smaller ones."""

        @seeded(self.summary.seed + number)
        @settings(
            max_examples=count,
            phases=self._phases,
            database=None,
            deadline=None,
            verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
        )
        @given(cases(self._target.lexicon))
        def play(case: Case) -> None:
            if found := self.play(case):
                if self.summary.guilty is None or case.size <= self.summary.guilty.size:
                    self.summary.guilty, self.summary.found = case, found
                raise FaultFound(found)

        try:
            play()
        except (
            Exception
        ):  # also the error of hypothesis for a fault that a repetition does not show
            if not self.summary.found:
                raise

    def _attack(self, number: int) -> None:
        self.summary.attacks[attacks.name(number)] += 1
        try:
            self.summary.found += attacks.attack(
                number, self.summary.seed, self._target.service.address, self._target.serves
            )
            self._target.service.until_serving()
        except (AssertionError, OSError, grpc.RpcError) as error:
            told = f"attack {attacks.name(number)!r}: {type(error).__name__}: {error}"
            self.summary.found.append((Fault.HEALTH, told[:500]))
        self.summary.found += self._effects.unchanged()


def _ending(target: Target, summary: Summary) -> list[Found]:
    """Check the service after all cases, and stop it."""
    found: list[Found] = []
    summary.end_mib = target.resident_mib()
    if summary.warm_mib and summary.end_mib > summary.warm_mib + GROWTH_MIB:
        found.append((Fault.MEMORY, f"{summary.end_mib:.0f} MiB after {summary.warm_mib:.0f}"))
    if not target.serves():
        found.append((Fault.HEALTH, "the service does not serve at the end"))
    found += [(Fault.LOG, line[:300]) for line in _defects(target.service.text)]
    if target.service.stop():
        found.append((Fault.HEALTH, "the service did not stop in order"))
    if left := target.home.agents():
        found.append((Fault.LEFTOVER, f"{len(left)} processes of agents"))
    return found


_GRPCS: Final = (
    "UnicodeDecodeError", "codec can't decode byte", "rpc.server_ended",
    "ExecuteBatchError raised in core",
)  # fmt: skip
"""What gRPC logs by itself, with a stack: of a path that is not UTF-8, which ends its server (it is
replaced), and of a caller who hung up while he was answered."""


def _defects(log: str) -> list[str]:
    defects = ("rpc.internal_error", "Traceback", '"exception"', '"level": "critical"')
    return [
        line
        for line in log.splitlines()
        if any(word in line for word in defects) and not any(word in line for word in _GRPCS)
    ]


# -- the command -----------------------------------------------------------------------------------


def run_cases(seed: int, total: int, *, mutant: str = "", with_attacks: bool = True) -> Summary:
    """Play cases against a target of their own; against a mutant without attacks and shrinking."""
    with (
        tempfile.TemporaryDirectory(prefix="runrecovery-fuzz-") as place,
        start_target(Path(place), mutant=mutant) as target,
    ):
        return Campaign(target, seed, shrinks=not mutant).run(total, with_attacks=with_attacks)


def is_detected(mutant: str, seed: int, total: int) -> bool:
    """Return whether the campaign detects a broken service, by the fault that the service has."""
    summary = run_cases(seed, total, mutant=mutant, with_attacks=False)
    return not MUTANTS[mutant].faults.isdisjoint(fault.name for fault in summary.kinds())


def replay(case: Case) -> list[Found]:
    """Play one case against a target of its own."""
    with (
        tempfile.TemporaryDirectory(prefix="runrecovery-fuzz-") as place,
        start_target(Path(place)) as target,
    ):
        campaign = Campaign(target, 0, shrinks=False)
        found = campaign.play(case)
        click.echo(f"answer             {', '.join(campaign.summary.statuses)}")
        return found + _ending(target, campaign.summary)


def _told(found: list[Found]) -> bool:
    for fault, what in found:
        click.echo(f"FOUND              {fault}: {what}")
    return not found


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n") if __doc__ else None)
@click.option("--cases", "total", type=click.IntRange(1), default=5000, show_default=True)
@click.option("--seed", type=click.IntRange(0), help="Of the first round; the next has the next.")
@click.option("--mutate", type=click.Choice(sorted(MUTANTS)), help="Break the service in that way.")
@click.option("--replay", "again", nargs=2, metavar="METHOD HEX|@FILE", help="One call again.")
@click.option("--manner", type=click.Choice(list(Manner)), default=Manner.PLAIN, help="Of it.")
@click.option("--metadata", nargs=2, multiple=True, metavar="KEY VALUE", help="Of it; -bin in hex.")
def main(
    *,
    total: int,
    seed: int | None,
    mutate: str | None,
    again: tuple[str, str] | None,
    manner: str,
    metadata: tuple[tuple[str, str], ...],
) -> None:
    """Play cases."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and clear away
    first = secrets.randbelow(SEEDS) if seed is None else seed
    if again is not None:
        pairs = tuple(
            (key, bytes.fromhex(text) if key.endswith("-bin") else text) for key, text in metadata
        )
        text = Path(again[1][1:]).read_text("ascii") if again[1].startswith("@") else again[1]
        payload = bytes.fromhex(text)
        case = Case(method=f"/{again[0]}", payload=payload, manner=Manner(manner), metadata=pairs)
        held = _told(replay(case))
    elif mutate is not None:
        held = is_detected(mutate, first, total)
        click.echo(f"mutant {mutate:<17} {'detected' if held else 'NOT DETECTED'} (seed {first})")
    else:
        click.echo(f"first seed         {first}")
        summary = run_cases(first, total)
        for line in summary.lines():
            click.echo(line)
        held = not summary.found
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
