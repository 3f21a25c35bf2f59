"""Let processes race for the queue of one of them: no run has two owners, none is lost.

    python tests/campaign/race.py --runs 10000 --processes 8
    python tests/campaign/race.py --mutate scan                must be detected

Each process is an instance of its own on one PostgreSQL. It takes runs as a service does: from its
own queue, and from the queues of its peers. It starts no agents. Half-way through, some of the
processes are killed by SIGKILL: others start what the killed ones had moved and not started.

Exit code 0: no violation was found, or that of the mutant was found. Exit code 1: otherwise.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import click

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench
sys.path.insert(0, str(Path(__file__).parents[1]))

from campaign.judges import Violation
from campaign.replica_judges import TWO_OWNERS
from runrecovery_service.clock import Clock
from runrecovery_service.domain.run import NewRun, Profile, RestartPolicy
from runrecovery_service.storage import instances, runs, turn_starts, work_stealing
from runrecovery_service.storage.database import Database
from runrecovery_service.storage.instances import InstanceStart, Owner
from runrecovery_service.storage.launch_records import LaunchSite
from runrecovery_service.storage.opening import open_database
from runrecovery_service.storage.use_case import run_use_case
from support.owner_history import HISTORY, STALE_WRITERS, WRONG_MOVES
from support.waiting import until

from bench.postgres import memory_place, run_postgres

ENGINE: Final = "demo"
LEASE_S: Final = 3600.0
SETTINGS: Final = ("fsync=off", "max_connections=50")
SITE: Final = LaunchSite(host_id="host", boot_id="boot", pid_namespace=1, watermark_bits=62)
PATIENCE_S: Final = 3600.0
NOTHING_FOUND_S: Final = 0.05
QUEUED: Final = "SELECT 1 FROM run WHERE status = 'QUEUED' LIMIT 1"
LAUNCHED: Final = (
    "SELECT r.run_id, r.owner, l.instance, count(l.id) OVER (PARTITION BY r.id)"
    " FROM run r LEFT JOIN process_lease l ON l.run = r.id"
)
LOCK: Final = " FOR UPDATE OF r SKIP LOCKED"
MUTANT: Final = "scan"
"""A run of a peer is searched without a lock, and then taken."""


# -- one process -----------------------------------------------------------------------------------


def claim(db: Database, name: str) -> Owner:
    """Claim an instance for this process."""
    start = InstanceStart(
        instance=name,
        boot_token=name,
        host_id="host",
        data_dir="/nowhere",
        pid=1,
        engines=(ENGINE,),
        max_running=1,
    )
    return instances.claim(db, start, now=Clock().now(), ttl_s=LEASE_S)


def create_runs(db: Database, owner: Owner, count: int) -> None:
    """Fill the queue of an instance."""
    for number in range(count):
        new = NewRun(
            run_id=f"run-{number:05}",
            engine=ENGINE,
            labels={},
            profile=Profile.RESUMABLE,
            restart_policy=RestartPolicy.FAIL,
            max_attempts=1,
            input={},
        )
        runs.create(db, new, owner=owner, max_queued=count, receipt=None, now=Clock().now())


def start_one(db: Database, owner: Owner) -> str | None:
    """Start the next run of the own queue; return its run_id."""
    clock = Clock()
    turn = run_use_case(
        db,
        partial(
            turn_starts.take_next,
            owner=owner,
            busy_engines=(),
            site=SITE,
            due_in=clock.due_in,
            steady=clock.steady(),
            now=clock.now(),
        ),
    )
    return None if turn is None else turn.run.run_id


def move_one(db: Database, owner: Owner) -> bool:
    """Move a run of a peer into the own queue."""
    clock = Clock()
    taker = work_stealing.Taker(owner=owner, engines=(ENGINE,), shares_workspaces=False)
    now, steady = clock.now(), clock.steady()
    peer = run_use_case(db, work_stealing.find_peer, taker, now=now)
    if peer is None:
        return False
    return (
        run_use_case(db, work_stealing.take_from, taker, peer, now=now, steady=steady) is not None
    )


def race(db: Database, owner: Owner) -> Iterator[str]:
    """Yield the run_id of each started run, until no queue has a run."""
    while True:
        run_id = start_one(db, owner)
        if run_id is not None:
            yield run_id
        elif not move_one(db, owner):
            if not db.fetch_all(QUEUED):
                return
            time.sleep(NOTHING_FOUND_S)


def race_as(name: str, url: str, mutant: str, count: str) -> None:
    """Wait for a line, race, and print the run_id of each run that this process has started.

    Args:
        count: the number of runs in the queue of this process at the start.
    """
    db = open_database(url, Path("/nowhere"))
    owner = claim(db, name)
    create_runs(db, owner, int(count))
    db.guard(partial(instances.demand_current, owner=owner))
    if mutant:
        fetch_one = Database.fetch_one
        Database.fetch_one = lambda self, sql, params=(): fetch_one(  # type: ignore[method-assign]
            self, sql.replace(LOCK, ""), params
        )
    print("ready", flush=True)
    sys.stdin.readline()
    for run_id in race(db, owner):
        print(run_id, flush=True)


# -- the race --------------------------------------------------------------------------------------


@dataclass
class Result:
    """What a race has shown.

    Attributes:
        started: the number of runs that each process has started and reported.
        moves: how often a run got another owner.
    """

    started: Counter[str] = field(default_factory=Counter)
    moves: int = 0
    took_s: float = 0.0
    violations: list[Violation] = field(default_factory=list)


class Racer:
    """One process of the race."""

    def __init__(self, name: str, url: str, mutant: str, count: int, journal: Path) -> None:
        self.name, self._journal = name, journal
        with journal.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, __file__, "--race-as", name, url, mutant, str(count)],
                stdin=subprocess.PIPE,
                stdout=output,
                text=True,
            )

    @property
    def lines(self) -> list[str]:
        """The complete lines that the process has printed."""
        return self._journal.read_text().split("\n")[:-1]

    def is_ready(self) -> bool:
        """Whether the process waits for the start."""
        assert self.process.poll() is None, f"{self.name} has ended"
        return bool(self.lines)

    def go(self) -> None:
        """Let the process begin."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


def play(
    folder: Path, *, url: str, count: int, processes: int, kills: int, mutant: str = ""
) -> Result:
    """Let processes race for the runs of the first one, and kill some of them half-way.

    Args:
        url: of an empty database.
        kills: how many processes are killed. The first one is not.
    """
    db = open_database(url, folder)
    for statement in HISTORY:
        db.execute(statement)
    result = Result()
    with ExitStack() as stack:
        racers = []
        for number in range(processes):
            name, queued = f"p{number}", 0 if number else count
            named = f"{url}&application_name={name}-1"
            racer = Racer(name, named, mutant, queued, folder / name)
            stack.enter_context(racer.process)
            stack.callback(racer.process.kill)
            racers.append(racer)
        until(
            lambda: all(racer.is_ready() for racer in racers), "all are ready", timeout_s=PATIENCE_S
        )
        # Otherwise peers leave the runs to their owner, which can start some hundred in that time.
        first_us = round(work_stealing.OWNER_FIRST_S * 1e6)
        db.execute("UPDATE run SET updated_at = updated_at - ?", (first_us,))
        begun_s = time.monotonic()
        for racer in racers:
            racer.go()
        half = "SELECT count(*) >= ? FROM run WHERE status = 'RUNNING'"
        until(lambda: db.fetch_all(half, (count // 2,)) == [(True,)], "half", timeout_s=PATIENCE_S)
        for racer in racers[1 : 1 + kills]:
            racer.process.kill()
        codes = [racer.process.wait(PATIENCE_S) for racer in racers]
        result.took_s = time.monotonic() - begun_s
    journals = {racer.name: racer.lines[1:] for racer in racers}
    result.started.update({name: len(lines) for name, lines in journals.items()})
    result.violations += judge(db, journals, count)
    failed = [code for code in (codes[0], *codes[1 + kills :]) if code]
    result.violations += [Violation("exit", str(code)) for code in failed]
    ((result.moves,),) = db.fetch_all(
        "SELECT count(*) FROM owner_history WHERE owner_before <> owner_after"
    )
    db.close()
    return result


def judge(db: Database, journals: dict[str, list[str]], count: int) -> Iterator[Violation]:
    """Yield what must not be after a race."""
    rows = [tuple(row) for row in db.fetch_all(LAUNCHED)]
    launched = {run_id: instance for run_id, _, instance, _ in rows}
    if len(launched) != count:
        yield Violation("lost", f"{count - len(launched)} runs are gone")
    for run_id, owner, instance, launches in rows:
        if launches != 1 or owner != instance:
            yield Violation(TWO_OWNERS, f"{run_id} of {owner}, started by {instance}")
    for name, lines in journals.items():
        for run_id in lines:
            if launched.get(run_id) != name:
                yield Violation("lost", f"{name} has started {run_id}")
    for kind, sql in (("stale write", STALE_WRITERS), (TWO_OWNERS, WRONG_MOVES)):
        yield from (Violation(kind, str(tuple(row))) for row in db.fetch_all(sql))


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n") if __doc__ else None)
@click.option("--runs", "count", type=click.IntRange(1), default=1000, show_default=True)
@click.option("--processes", type=click.IntRange(2), default=8, show_default=True)
@click.option("--kills", type=click.IntRange(0), default=2, show_default=True)
@click.option("--mutate", type=click.Choice([MUTANT]), help="Break the processes.")
def main(*, count: int, processes: int, kills: int, mutate: str | None) -> None:
    """Play a race."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and clear away
    with (
        tempfile.TemporaryDirectory(prefix="runrecovery-race-") as folder,
        run_postgres(*SETTINGS, place=memory_place()) as server,
    ):
        result = play(
            Path(folder),
            url=server.create("race"),
            count=count,
            processes=processes,
            kills=kills,
            mutant=mutate or "",
        )
    found = [one for one in result.violations if not mutate or one.kind == TWO_OWNERS]
    click.echo(f"started       {dict(sorted(result.started.items()))}")
    click.echo(f"moves         {result.moves}")
    for violation in found[:20]:
        click.echo(violation)
    click.echo(f"violations    {len(found)}")
    click.echo(f"took          {result.took_s:.1f} s")
    sys.exit(0 if bool(found) == bool(mutate) else 1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--race-as"]:
        race_as(*sys.argv[2:])
    else:
        main()
