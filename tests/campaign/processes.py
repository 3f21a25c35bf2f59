"""Kill services over random hostile process trees: no process survives, no innocent is signalled.

    python tests/campaign/processes.py --trials 100
    python tests/campaign/processes.py --seed 1234 --trials 1 --verbose     one trial again
    python tests/campaign/processes.py --mutate killpg --trials 5           must be detected

A trial starts a service with two to four agents, whose trees follow from a seed (`plans.py`). Then
the trial kills the service and its shims, and starts the service again. From SERVING on no process
of the trees may live, and each run must have its reason. Innocent processes that look like agents
run beside the trees (`look_alikes.py`). The trial finds living processes by words among their
arguments, which the service does not know (`scan.py`).

Exit code 0: no fault was found, or the mutant was detected, or this system cannot try the mutant.
Exit code 1: otherwise.
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

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench
sys.path.insert(0, str(Path(__file__).parents[1]))

from campaign.home import CampaignHome, is_root
from campaign.look_alikes import Neighbour
from campaign.plans import Kind, Plan, plan, seeds
from campaign.trial import Fault, Outcome, Trial, TrialHome

TAKEOVER_S: Final = 60.0
UNSHARE: Final = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")
NO_RECHECK: Final = "no-recheck"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutation:
    """How the campaign finds a mutant out: by which fault, in which trials."""

    fault: Fault
    suits: Callable[[Plan], bool]
    root: bool = False


MUTATIONS: Final = {
    "killpg": Mutation(fault=Fault.INNOCENT, suits=lambda plan: plan.kind is Kind.ORDINARY),
    "no-watermark": Mutation(
        fault=Fault.SURVIVOR, suits=lambda plan: plan.only_watermark_tells and not plan.early
    ),
    "close-on-failure": Mutation(
        fault=Fault.LAUNCH, suits=lambda plan: plan.kind is Kind.UNENDED, root=True
    ),
}
MUTANTS: Final = (*MUTATIONS, NO_RECHECK)
"""takeover.py finds the last one out; trials would do so only by chance."""
SEEDS: Final = 2**32


class Campaign:
    """Runs trials, in one home for each kind of trial."""

    def __init__(self, place: Path, *, mutant: str = "") -> None:
        self._place = place
        self._mutant = mutant
        self._trial_homes: dict[Kind, TrialHome] = {}
        self._homes = 0
        self.neighbour = Neighbour(place)

    def run(self, seed: int) -> Outcome:
        """Run the trial of one seed. After a breakdown, remove its home."""
        mark = secrets.token_hex(8)
        planned = plan(seed, mark, root=is_root())
        trial = Trial(
            trial_home=self._trial_home(planned.kind),
            plan=planned,
            mark=mark,
            neighbour=self.neighbour,
        )
        begun = time.monotonic()
        try:
            trial.run()
        except Exception as error:  # noqa: BLE001 - recorded as a fault; the next trial runs
            trial.outcome.faults.append((Fault.BROKEN, f"{type(error).__name__}: {error}"))
            self._trial_homes.pop(planned.kind).home.clear_all()
        trial.outcome.seconds = time.monotonic() - begun
        return trial.outcome

    def _trial_home(self, kind: Kind) -> TrialHome:
        if kind not in self._trial_homes:
            self._homes += 1
            home = CampaignHome(
                self._place / f"home-{self._homes}",
                mutant=self._mutant,
                may_signal_all=kind is Kind.ORDINARY,
            )
            self._trial_homes[kind] = TrialHome(home)
        return self._trial_homes[kind]

    def clear_all(self) -> None:
        """Kill everything and remove all homes."""
        with ExitStack() as stack:
            stack.callback(self.neighbour.home.clear_all)
            for trial_home in self._trial_homes.values():
                stack.callback(trial_home.home.clear_all)


@contextmanager
def campaign(*, mutant: str = "") -> Iterator[Campaign]:
    """Yield a campaign in a temporary folder, which is removed."""
    with tempfile.TemporaryDirectory(prefix="runrecovery-campaign-") as place:
        running = Campaign(Path(place), mutant=mutant)
        try:
            yield running
        finally:
            running.clear_all()


# -- an innocent takes over a pid ----------------------------------------------------------------


def take_over(*words: str) -> dict[str, bool] | None:
    """Return the result of takeover.py, or None without root or namespaces."""
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
    """The outcomes of all trials."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def failed(self) -> list[Outcome]:
        """The trials that found a fault."""
        return [outcome for outcome in self.outcomes if outcome.faults]

    def found(self, fault: Fault) -> bool:
        """Return whether a trial found this fault."""
        return any(kind is fault for outcome in self.outcomes for kind, _ in outcome.faults)

    def lines(self) -> Iterator[str]:
        """Yield the lines of the summary."""
        deaths = [o.last_death_s for o in self.outcomes if o.last_death_s is not None] or [0.0]
        unended = sum(o.plan.kind is Kind.UNENDED for o in self.outcomes)
        yield f"trials             {len(self.outcomes)} ({unended} of unkillable processes)"
        yield f"processes grown    {sum(o.grown for o in self.outcomes)}"
        yield f"survivors          {sum(o.survivors for o in self.outcomes)}"
        yield f"innocents hit      {sum(o.innocents for o in self.outcomes)}"
        yield (
            f"kill to last death {statistics.median(deaths):.3f} s median, {max(deaths):.3f} s most"
        )
        yield f"a trial took       {statistics.fmean(o.seconds for o in self.outcomes):.2f} s mean"
        if not is_root():
            yield "skipped            other users, unkillable processes, pid takeover: need root"
        failed = ", ".join(str(outcome.plan.seed) for outcome in self.failed)
        yield f"failed seeds       {failed or 'none'}"


def run_trials(
    of: Sequence[int],
    *,
    mutant: str = "",
    report: Callable[[Outcome], object] = lambda _: None,
    enough: Callable[[Summary], bool] = lambda _: False,
) -> Summary:
    """Run the trials of these seeds, until `enough` holds."""
    summary = Summary()
    with campaign(mutant=mutant) as running:
        for seed in of:
            summary.outcomes.append(running.run(seed))
            report(summary.outcomes[-1])
            if enough(summary):
                break
    return summary


def is_detected(mutant: str, first: int, trials: int) -> bool | None:
    """Return whether the campaign finds a mutant out, or None if that needs root."""
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
    detected = is_detected(mutant, first, trials)
    words = {None: "skipped (needs root)", True: "detected", False: "NOT DETECTED"}
    click.echo(f"mutant {mutant:<17} {words[detected]}")
    return detected is not False


def _play(first: int, trials: int, *, verbose: bool) -> bool:
    spared = take_over()
    for place, is_spared in (spared or {}).items():
        click.echo(f"taken-over pid     {place}: {'spared' if is_spared else 'HIT'}")
    summary = run_trials(
        range(first, first + trials), report=lambda outcome: _tell(outcome, verbose=verbose)
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
    """Run trials."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and clear away
    first = secrets.randbelow(SEEDS) if seed is None else seed
    click.echo(f"first seed         {first}")
    held = _mutate(mutate, first, trials) if mutate else _play(first, trials, verbose=verbose)
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
