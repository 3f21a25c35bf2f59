"""Kill a service under load at random moments, again and again: nothing acknowledged is lost.

    python tests/campaign/kills.py --kills 2000
    python tests/campaign/kills.py --kills 500 --postgres
    python tests/campaign/kills.py --mutate early-answer         must be detected

A process of clients (`kill_load.py`) creates runs, replies, cancels, reopens and watches. Its
journal is on the disk before a client goes on. The service is killed by SIGKILL at a random moment:
early in its start, amid its recovery, or while it serves. Some agents are slow, ignore SIGTERM,
leave processes, ask, or wait with a process. Some runs start again or are resumed. Now and then a
session is lost while the service is dead, and is there again once it serves.

The judges (`kill_judges.py`) compare the store with the journal and with the notes of the agents
after each kill: every acknowledged call has its effect, events have no gap, a completed recovery
has decided once about each live run, watchers got each event once. When the service is SERVING, no
process of an earlier start lives. Every 200 kills the service is left in peace until all runs have
ended. Then each launch is closed and every slot is free, and a new store begins.

The seed determines the calls, and the moments as far as the machine lets it.

Exit code 0: no violation was found, or that of the mutant was found. Exit code 1: otherwise.
"""

from __future__ import annotations

import os
import secrets
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from random import Random
from typing import Final

import click
import grpc

os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")  # see `replicas.py`
sys.path.insert(0, str(Path(__file__).parents[2]))  # bench
sys.path.insert(0, str(Path(__file__).parents[1]))

from campaign.judges import Violation
from campaign.kill_home import KillHome, Load, lost_run
from campaign.kill_judges import (
    SLOTS,
    StoredRun,
    newest_report,
    stored_runs,
    violations_in_the_end,
    violations_now,
    wrong_decisions,
)
from campaign.kill_load import KillClient
from campaign.kill_mutants import MUTANTS
from support.api import Api, status_word
from support.service import ServiceProcess
from support.stores import lose_session
from support.waiting import until

from bench.postgres import memory_place, run_postgres

EVENTS: Final = "SELECT count(*) FROM run_event WHERE kind <> 'STARTED'"
KILLS_OF_A_STORE: Final = 200
SETTLE_S: Final = 60.0
SURVIVOR: Final = "survivor"
EARLY: Final = "in its start"
RECOVERING: Final = "amid its recovery"
SERVING: Final = "while it served"
WEIGHTS: Final = {EARLY: 1, RECOVERING: 2, SERVING: 5}
START_MOST_S: Final = 0.15
RECOVERY_MOST_S: Final = 0.02
MOST_EVENTS: Final = 5
SERVE_MOST_S: Final = 2.0
POLL_S: Final = 0.01
MOMENT_S: Final = 0.02
LOSE_SHARE: Final = 0.15


class Round:
    """Kills of the services of one store."""

    def __init__(self, home: KillHome, seed: int) -> None:
        self.home = home
        self.violations: list[Violation] = []
        self.counts: Counter[str] = Counter()
        self._random = Random(seed)  # noqa: S311 - moments, no secrets
        self._seed = seed
        self._before: dict[int, StoredRun] = {}
        self._last_report = 0
        self._lost: str | None = None
        self._lost_ever: set[str] = set()
        self._kept: dict[str, bytes] = {}
        service, _ = home.start()  # so that the store is there
        service.kill()
        self.load = Load(home, seed)

    def kill(self) -> None:
        """Start the service, kill it at a random moment, and judge."""
        (wanted,) = self._random.choices([*WEIGHTS], weights=[*WEIGHTS.values()])
        service = self.home.spawn()
        try:
            if wanted == EARLY:
                time.sleep(self._random.uniform(0, START_MOST_S))
            elif wanted == RECOVERING:
                service.until_event("recovery.started")
                time.sleep(self._random.uniform(0, RECOVERY_MOST_S))
            else:
                self._serve(service)
                self._wait_for_events()
            if (code := service.popen.poll()) is not None:
                self._find("service", f"it exited with {code}:\n{service.text[-2000:]}")
        except AssertionError as error:
            self._find("service", str(error))
        service.kill()
        self.home.until_silent()
        self._judge()

    def _find(self, kind: str, text: str) -> None:
        self.violations.append(Violation(kind, text))

    def _serve(self, service: ServiceProcess) -> Api:
        service.address = self.home.address
        service.until_event("service.listening")
        api = service.until_serving()
        with self.home.reader() as rows:
            self.violations += [
                Violation(SURVIVOR, text) for text in self.home.survivors(service, rows)
            ]
        for name, text in self._kept.items():  # from now on clients can reopen the run
            Path(name).write_bytes(text)
        self._kept = {}
        return api

    def _wait_for_events(self) -> None:
        """Wait for a random number of ends and questions, however fast the machine is."""
        ends_s = time.monotonic() + SERVE_MOST_S
        wanted = self._random.randrange(MOST_EVENTS)
        with self.home.reader() as rows:
            ((before,),) = rows(EVENTS)
            while rows(EVENTS)[0][0] < before + wanted and time.monotonic() < ends_s:
                time.sleep(POLL_S)
        time.sleep(self._random.uniform(0, MOMENT_S))

    def _judge(self) -> None:
        """Judge after a kill, and prepare the next start."""
        journal = self.load.read()
        with self.home.reader() as rows:
            report = newest_report(rows)
            if report is None or report.key == self._last_report:
                self.counts["before its recovery"] += 1
            else:
                self._last_report = report.key
                self.counts[f"recovery {report.state}"] += 1
                self.violations += wrong_decisions(self._before, report, self._lost, rows)
                if report.state == "COMPLETED":
                    self._lost = None
            self.violations += violations_now(journal, rows, self.home.notes)
            self._before = stored_runs(rows)
            if not self._kept and self._random.random() < LOSE_SHARE:
                self._lose_session(lost_run(rows))

    def _lose_session(self, run_id: str | None) -> None:
        if run_id is not None and run_id not in self._lost_ever:
            self._lost = run_id
            self._lost_ever.add(run_id)
            self._kept = lose_session(self.home, run_id)
            self.counts["sessions lost"] += 1

    def settle(self) -> None:
        """Let every run end, judge, and see that every slot can be had."""
        service = self.home.spawn()
        try:
            api = self._serve(service)
            self.load.end_clients()
            self._end_all(api)
            self.load.end_watchers()
            with self.home.reader() as rows:
                self.violations += violations_in_the_end(self.load.journal, rows, self.home.notes)
            self._take_every_slot(api)
        except (AssertionError, grpc.RpcError) as error:
            self._find("settle", str(error))
        self.violations += [Violation("defect", text) for text in self.home.defects()]
        service.kill()

    def _end_all(self, api: Api) -> None:
        """Answer each open question until every run has ended."""
        finisher = KillClient(-1, self._seed, self.load.journal, api, 0.0)

        def all_over() -> bool:
            alive = self.load.journal.runs.keys() - self.load.journal.ended
            for run_id in alive:
                run = finisher.get(run_id)
                if run is not None and status_word(run) == "WAITING_USER":
                    finisher.reply_to(run_id, run.pending_interaction.interaction_id)
            return not alive

        with suppress(AssertionError):  # the judge names the runs
            until(all_over, "every run has ended", timeout_s=SETTLE_S)

    def _take_every_slot(self, api: Api) -> None:
        until(lambda: not self.home.agents(), "no agent lives")
        held = [api.create("resumable", {"hold": True}) for _ in range(SLOTS + 1)]
        until(lambda: len(self.home.agents()) == SLOTS, "every slot can be had")
        if (word := status_word(api.get(held[-1].run_id))) != "QUEUED":
            self._find("slots", f"with {SLOTS} agents another run is {word}")
        for run in held:
            api.cancel(run.run_id)
        for run in held:
            api.until_ended(run.run_id)


def play(
    place: Path, seed: int, kills: int, *, database: str = "", mutant: str = ""
) -> Iterator[Round]:
    """Yield a round after each kill; settle it after the last one."""
    home = KillHome(place, database=database, mutant=mutant)
    with ExitStack() as stack:
        stack.callback(home.clear)
        round_ = Round(home, seed)
        stack.callback(round_.load.close)
        for _ in range(kills):
            round_.kill()
            yield round_
        if not mutant:
            round_.settle()
            yield round_


def summary(round_: Round) -> str:
    """Return a line about a round."""
    journal = round_.load.journal
    seen = sum(map(len, journal.seen.values()))
    return (
        f"{dict(sorted(round_.counts.items()))}; acknowledged: {journal.answers} calls,"
        f" {len(journal.runs)} runs, {len(journal.replies)} replies,"
        f" {len(journal.cancels)} cancels, {len(journal.reopens)} reopenings; {seen} events watched"
    )


@click.command(help=(__doc__ or "").partition("\n")[0])
@click.option("--kills", type=click.IntRange(1), default=200, show_default=True)
@click.option("--seed", type=click.IntRange(0))
@click.option("--postgres", "is_postgres", is_flag=True, help="The store is on PostgreSQL.")
@click.option("--mutate", type=click.Choice(sorted(MUTANTS)), help="Break the service.")
def main(*, kills: int, seed: int | None, is_postgres: bool, mutate: str | None) -> None:
    """Play a campaign."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and clear away
    seed = secrets.randbelow(2**32) if seed is None else seed
    click.echo(f"seed {seed}")
    begun_s, played = time.monotonic(), 0
    mutant = MUTANTS[mutate] if mutate else None
    found: list[Violation] = []
    with ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="runrecovery-kills-"))
        server = None
        if is_postgres:
            server = stack.enter_context(run_postgres("fsync=off", place=memory_place()))
        while played < kills and not found:
            now = min(KILLS_OF_A_STORE, kills - played)
            url = server.create(f"kills_{played}") if server else ""
            folder = Path(place) / str(played)
            for round_ in play(folder, seed + played, now, database=url, mutant=mutate or ""):
                found = [
                    one for one in round_.violations if mutant is None or one.kind == mutant.kind
                ]
                if found:
                    break
            played += now
            click.echo(f"{played} kills, {time.monotonic() - begun_s:.0f} s: {summary(round_)}")
    for violation in found[:20]:
        click.echo(violation)
    click.echo(f"violations {len(found)}, took {time.monotonic() - begun_s:.0f} s")
    if mutant:
        click.echo(f"mutant {mutate} {'detected' if found else 'NOT DETECTED'} by: {mutant.kind}")
    sys.exit(0 if bool(found) == bool(mutant) else 1)


if __name__ == "__main__":
    main()
