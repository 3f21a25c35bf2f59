"""Random hostile trees, killed services: nobody survives who must not, nobody else is touched.

    python tests/campaign/processes.py --trials 100
    python tests/campaign/processes.py --seed 1234 --trials 1 --verbose     one trial again
    python tests/campaign/processes.py --mutate killpg --trials 5           must be found out

A trial lets a service run two to four agents that grow trees as a seed says (`plans.py` has what
there is), strikes the service and its shims, and starts the service again. From SERVING on nothing
of the trees may be alive, and each run must have its reason. Meanwhile canaries live, who look as
much like a tree's processes as strangers can. Who is alive is told by words among the arguments,
which the service does not know (`watch.py`).

Exit code 0: all held, or the mutant was found out (or this system cannot try it, which is said);
1: not so.
"""

from __future__ import annotations

import json
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Final

import click

sys.path.insert(0, str(Path(__file__).parents[1]))

from campaign.canaries import Neighbour
from campaign.house import House, is_root
from campaign.plans import Kind, Plan, plan, seeds
from campaign.trial import Fault, Outcome, Stage, Trial

TAKEOVER_S: Final = 60.0
UNSHARE: Final = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
NO_RECHECK: Final = "no-recheck"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """How a broken service is to be found out: by which fault, in which trials."""

    fault: Fault
    suits: Callable[[Plan], bool]
    root: bool = False


MUTATIONS: Final = {
    "killpg": Mutation(fault=Fault.INNOCENT, suits=lambda plan: plan.kind is Kind.ORDINARY),
    "no-watermark": Mutation(
        fault=Fault.SURVIVOR, suits=lambda plan: plan.only_watermark_tells and not plan.early
    ),
    "close-on-failure": Mutation(
        fault=Fault.LEASE, suits=lambda plan: plan.kind is Kind.UNENDED, root=True
    ),
}
MUTANTS: Final = (*MUTATIONS, NO_RECHECK)
"""The last one is found out by takeover.py, and not by chance in trials."""
SEEDS: Final = 2**32


class Campaign:
    """The houses in which trials are played, and what all of them saw."""

    def __init__(self, place: Path, *, mutant: str = "") -> None:
        self._place = place
        self._mutant = mutant
        self._stages: dict[Kind, Stage] = {}
        self._houses = 0
        self.neighbour = Neighbour(place)

    def play(self, seed: int) -> Outcome:
        """Play the trial of one seed. After one that did not get through, its house is left."""
        mark = secrets.token_hex(8)
        planned = plan(seed, mark, root=is_root())
        trial = Trial(
            stage=self._stage(planned.kind), plan=planned, mark=mark, neighbour=self.neighbour
        )
        begun = time.monotonic()
        try:
            trial.play()
        except Exception as error:  # noqa: BLE001 - told as a fault, and the next one is played
            trial.outcome.faults.append((Fault.BROKEN, f"{type(error).__name__}: {error}"))
            self._stages.pop(planned.kind).house.leave()
        trial.outcome.seconds = time.monotonic() - begun
        return trial.outcome

    def _stage(self, kind: Kind) -> Stage:
        if kind not in self._stages:
            self._houses += 1
            house = House(
                self._place / f"house-{self._houses}",
                mutant=self._mutant,
                all_mighty=kind is Kind.ORDINARY,
            )
            self._stages[kind] = Stage(house)
        return self._stages[kind]

    def leave(self) -> None:
        """End everything."""
        with ExitStack() as stack:
            stack.callback(self.neighbour.house.leave)
            for stage in self._stages.values():
                stack.callback(stage.house.leave)


@contextmanager
def campaign(*, mutant: str = "") -> Iterator[Campaign]:
    """A campaign in a temporary directory, of which nothing is left."""
    with tempfile.TemporaryDirectory(prefix="runrecovery-campaign-") as place:
        playing = Campaign(Path(place), mutant=mutant)
        try:
            yield playing
        finally:
            playing.leave()


# -- an innocent takes over a pid ----------------------------------------------------------------


def take_over(*words: str) -> dict[str, bool] | None:
    """Play takeover.py; None where the system does not let us: it needs root and namespaces."""
    if (
        not is_root()
        or subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode
    ):
        return None
    program = str(Path(__file__).with_name("takeover.py"))
    played = subprocess.run(
        [*UNSHARE, sys.executable, program, *words],
        check=True,
        capture_output=True,
        timeout=TAKEOVER_S,
    )
    spared: dict[str, bool] = json.loads(played.stdout)
    return spared


# -- many trials ---------------------------------------------------------------------------------


@dataclass(slots=True)
class Summary:
    """What all trials saw together."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failed(self) -> list[Outcome]:
        """Those that found something."""
        return [outcome for outcome in self.outcomes if outcome.faults]

    def found(self, fault: Fault) -> bool:
        """True when some trial found that."""
        return any(kind is fault for outcome in self.outcomes for kind, _ in outcome.faults)

    def lines(self) -> Iterator[str]:
        """Tell it in a few lines."""
        deaths = [o.last_death_s for o in self.outcomes if o.last_death_s is not None] or [0.0]
        unended = sum(o.plan.kind is Kind.UNENDED for o in self.outcomes)
        yield f"trials             {len(self.outcomes)} ({unended} of what cannot be ended)"
        yield f"processes grown    {sum(o.grown for o in self.outcomes)}"
        yield f"survivors          {sum(o.survivors for o in self.outcomes)}"
        yield f"innocents hit      {sum(o.innocents for o in self.outcomes)}"
        yield (
            f"kill to last death {statistics.median(deaths):.3f} s median, {max(deaths):.3f} s most"
        )
        yield f"a trial took       {statistics.fmean(o.seconds for o in self.outcomes):.2f} s mean"
        if not is_root():
            yield "skipped            other users, what cannot be ended, pid takeover: need root"
        failed = ", ".join(str(outcome.plan.seed) for outcome in self.failed)
        yield f"failed seeds       {failed or 'none'}"


def run_trials(
    of: Sequence[int],
    *,
    mutant: str = "",
    told: Callable[[Outcome], object] = lambda _: None,
    enough: Callable[[Summary], bool] = lambda _: False,
) -> Summary:
    """Play the trials of these seeds, until there are `enough`."""
    summary = Summary()
    with campaign(mutant=mutant) as playing:
        for seed in of:
            summary.outcomes.append(playing.play(seed))
            told(summary.outcomes[-1])
            if enough(summary):
                break
    return summary


def is_found_out(mutant: str, first: int, trials: int) -> bool | None:
    """Return whether the campaign finds a broken service out; None: only root can try."""
    if mutant == NO_RECHECK:
        spared = take_over("--no-recheck")
        return None if spared is None else not any(spared.values())
    mutation = MUTATIONS[mutant]
    if mutation.root and not is_root():
        return None
    suitable = list(islice(seeds(first, mutation.suits, root=is_root()), trials))
    summary = run_trials(
        suitable, mutant=mutant, enough=lambda so_far: so_far.found(mutation.fault)
    )
    return summary.found(mutation.fault)


# -- the command ---------------------------------------------------------------------------------


def _tell(outcome: Outcome, *, verbose: bool) -> None:
    if verbose or outcome.faults:
        click.echo(str(outcome))
    for fault, what in outcome.faults:
        click.echo(f"    {fault}: {what}")


def _mutate(mutant: str, first: int, trials: int) -> bool:
    found_out = is_found_out(mutant, first, trials)
    words = {None: "skipped (needs root)", True: "found out", False: "NOT FOUND OUT"}
    click.echo(f"mutant {mutant:<17} {words[found_out]}")
    return found_out is not False


def _play(first: int, trials: int, *, verbose: bool) -> bool:
    spared = take_over()
    for place, is_spared in (spared or {}).items():
        click.echo(f"taken-over pid     {place}: {'spared' if is_spared else 'HIT'}")
    summary = run_trials(
        range(first, first + trials), told=lambda outcome: _tell(outcome, verbose=verbose)
    )
    for line in summary.lines():
        click.echo(line)
    return not summary.failed and all((spared or {}).values())


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n") if __doc__ else None)
@click.option("--trials", type=click.IntRange(1), default=100, show_default=True)
@click.option("--seed", type=click.IntRange(0), help="Of the first trial; the next has the next.")
@click.option("--verbose", is_flag=True, help="A line for each trial.")
@click.option("--mutate", type=click.Choice(MUTANTS), help="Break the service in that way.")
def main(*, trials: int, seed: int | None, verbose: bool, mutate: str | None) -> None:
    """Play trials."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and clear away
    first = secrets.randbelow(SEEDS) if seed is None else seed
    click.echo(f"first seed         {first}")
    held = _mutate(mutate, first, trials) if mutate else _play(first, trials, verbose=verbose)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
