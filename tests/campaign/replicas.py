"""Break replicas, their database and their network at random: no write is lost, no owner is stale.

    python tests/campaign/replicas.py --seconds 600
    python tests/campaign/replicas.py --seconds 300 --pooled          behind PgBouncer
    python tests/campaign/replicas.py --mutate exists --seconds 120   should be detected

Three replicas on one PostgreSQL work under the load of clients (`replica_load.py`). The seed
determines the faults: SIGKILL, planned stops, SIGSTOP for longer than the lease (also in the middle
of a transaction), cut and silent connections, a lost answer to a COMMIT, a crash of PostgreSQL.

Three judges: the journal of the clients, a history of owners that triggers in the database write
(`support/owner_history.py`), and a lock that each agent takes while it lives. In the end every run
must have ended, after a reply through a random replica where it waits for one.

Exit code 0: no violation was found, or any was found of a mutant. Exit code 1: otherwise. A short
run proves nothing by not detecting a mutant: 25 s did not detect `drain`.
"""

from __future__ import annotations

import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any, Final

import click
import psycopg

sys.path.insert(0, str(Path(__file__).parents[2]))  # bench
sys.path.insert(0, str(Path(__file__).parents[1]))

from campaign.replica_load import Client, Journal, problems_of
from campaign.replica_mutants import MUTANTS
from runrecovery_service.storage.opening import open_database
from support.api import Api
from support.defects import defect_in
from support.engines import EngineSpec, demo_command, script
from support.owner_history import (
    HISTORY,
    OVERLAPPING,
    STALE_WRITERS,
    TAKEN_WHILE_STOPPING,
    WRONG_MOVES,
)
from support.pg_proxy import Proxy, proxied
from support.pgbouncer import PROGRAM, pooled, set_what_is_needed
from support.processes import are_dead
from support.service import Home, ServiceProcess
from support.waiting import until

from bench.postgres import ScratchPostgres, crash, memory_place, run_postgres, start_again

TTL_S: Final = 3.0
REPLICAS: Final = ("a", "b", "c")
CLIENTS: Final = 4
SETTLE_S: Final = 150.0
EXITS: Final = frozenset({0, 10, 6, -signal.SIGKILL})
"""A stop, a lost lease, a start without the database, a kill."""
SETTINGS: Final = ("fsync=off", "max_connections=200")
UNENDED: Final = "SELECT run_id, status, owner FROM run WHERE ended_at IS NULL"
TWICE: Final = "SELECT labels, count(*) FROM run GROUP BY labels HAVING count(*) > 1"
JUDGES: Final = {
    "stale write": STALE_WRITERS,
    "wrong move": WRONG_MOVES,
    "taken while stopping": TAKEN_WHILE_STOPPING,
    "overlapping launches": OVERLAPPING,
    "created twice": TWICE,
}
LOCKED: Final = """
import fcntl, os
mine = os.environ["RUNRECOVERY_RUN_ID"]
held = open(os.path.join({locks!r}, mine), "w")
try:
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
except OSError:
    with open(os.path.join({locks!r}, "violations"), "a") as file:
        file.write(mine + "\\n")
"""
WORKS: Final = """
import json, sys, time
sys.stdin.readline()
time.sleep({seconds})
print(json.dumps({{"type": "result", "output": {{"done": True}}}}), flush=True)
"""


def engines(locks: Path) -> dict[str, EngineSpec]:
    """Return engines whose agents lock their run."""
    lock = LOCKED.format(locks=str(locks))
    *python, text, _, _ = demo_command("resumable")
    session = {"session_file": "{workspace}/session-{value}.json"}
    return {
        "quick": script(lock + WORKS.format(seconds=0)),
        "works": script(lock + WORKS.format(seconds=1.5)),
        "resumable": EngineSpec(
            command=(*python, lock + text, "--profile", "resumable"), more=session
        ),
        "sticky": EngineSpec(
            command=(*python, lock + text, "--profile", "sticky"), profile="sticky_process"
        ),
    }


class Replica:
    """One instance, which is started again and again, and its ways to the database."""

    def __init__(self, name: str, home: Home, ways: tuple[Proxy, ...]) -> None:
        self.name, self.home, self.ways = name, home, ways
        self.service: ServiceProcess | None = None
        self.api: Api | None = None
        self.exits: Counter[int] = Counter()
        self.problems: list[str] = []
        self._starts = 0

    def spawn(self) -> None:
        """Start, under an application_name of this start."""
        self._starts += 1
        name = f"?application_name={self.name}-{self._starts}"
        database, *direct = [way.url + name for way in self.ways]
        self.home.write_config(database=database, database_direct=direct[0] if direct else "")
        self.service = self.home.spawn()

    def look(self) -> None:
        """Note an address or an end, and start again after an end."""
        service = self.service
        if service is None or (code := service.popen.poll()) is not None:
            if service is not None:
                self._end(service, code or 0)
            self.spawn()
        elif not service.address and (listening := service.events("service.listening")):
            service.address = listening[0]["address"]
            self.api = Api(service.address, timeout_s=4.0)

    def _end(self, service: ServiceProcess, code: int) -> None:
        self.exits[code] += 1
        if self.api is not None:
            self.api.channel.close()
        self.api = None
        service.close()
        text = service.text
        if code not in EXITS:
            self.problems.append(f"{self.name} exited with {code}:\n{text[-3000:]}")
        self.problems += [
            f"{self.name} logged {name} in {event}"
            for event in service.events()
            if (name := defect_in(event))
        ]
        self.service = None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the service, if it lives."""
        if self.service is not None and self.service.popen.poll() is None:
            with suppress(ProcessLookupError):
                self.service.popen.send_signal(number)

    def until_serving(self) -> None:
        """Wait until health says SERVING, through restarts."""

        def look() -> bool:
            self.look()
            with suppress(Exception):
                return self.api is not None and self.api.health_of() == "SERVING"
            return False

        until(look, f"replica {self.name} serves", timeout_s=SETTLE_S)


class Campaign:
    """Three replicas, their clients, and the faults of a seed."""

    def __init__(self, server: ScratchPostgres, url: str, replicas: list[Replica], seed: int):
        self.server, self.url, self.replicas = server, url, replicas
        self.journal = Journal()
        self.faults: Counter[str] = Counter()
        self._random = Random(seed)  # noqa: S311 - a plan, no secret
        self._servers = ExitStack()
        self._clients = [Client(number, seed, self.journal, self.apis) for number in range(CLIENTS)]

    def apis(self) -> list[Api]:
        """Return channels to the replicas that listen."""
        return [api for replica in self.replicas if (api := replica.api) is not None]

    # -- faults --------------------------------------------------------------------------------

    def kill(self, replica: Replica) -> None:
        """Kill a replica, and let peers notice before it is started again, or not."""
        replica.signal(signal.SIGKILL)
        self._pause(self._random.choice((0.0, TTL_S + 1.5)), but=replica)

    def stop(self, replica: Replica) -> None:
        """Stop a replica in order."""
        replica.signal(signal.SIGTERM)
        self._pause(self._random.choice((0.5, TTL_S + 1.5)), but=replica)

    def freeze(self, replica: Replica) -> None:
        """Freeze a replica for longer than its lease."""
        replica.signal(signal.SIGSTOP)
        self._pause(TTL_S + self._random.uniform(0.5, 2.5), but=replica)
        replica.signal(signal.SIGCONT)

    def freeze_in_transaction(self, replica: Replica) -> None:
        """Freeze a replica in a transaction, whose next statement arrives after the lease."""
        way = replica.ways[0]
        way.hold_in_transaction(self._random.randint(2, 5))
        if way.holding.wait(2.0):
            replica.signal(signal.SIGSTOP)
            self._pause(TTL_S + 2.5, but=replica)
        way.release()
        self._pause(0.1, but=replica)
        replica.signal(signal.SIGCONT)

    def cut(self, replica: Replica) -> None:
        """Cut every connection of a replica."""
        for way in replica.ways:
            way.cut()

    def silence(self, replica: Replica) -> None:
        """Let a replica's network drop everything for a while."""
        for way in replica.ways:
            way.silent = True
        self._pause(self._random.uniform(0.5, TTL_S + 2), but=None)
        for way in replica.ways:
            way.silent = False
            way.cut()

    def stall(self, replica: Replica) -> None:
        """Stall the connections that a replica has."""
        for way in replica.ways:
            way.stall()

    def lose_commit(self, replica: Replica) -> None:
        """Cut a connection right after a COMMIT of it was sent."""
        replica.ways[0].lose_answer_after("BEGIN")
        replica.ways[0].lost.wait(2.0)

    def crash_database(self, _: Replica) -> None:
        """Crash PostgreSQL and start it again."""
        postmaster = int((self.server.folder / "data/postmaster.pid").read_text().split()[0])
        crash(self.server)
        until(lambda: are_dead([postmaster]), "the database is dead")
        self._pause(self._random.uniform(0.0, 1.0), but=None)
        self._servers.enter_context(start_again(self.server, *SETTINGS))

    def _pause(self, seconds: float, *, but: Replica | None) -> None:
        """Keep the replicas up for a while, except one."""
        end_s = time.monotonic() + seconds
        while True:
            for replica in self.replicas:
                if replica is not but:
                    replica.look()
            if time.monotonic() >= end_s:
                return
            time.sleep(0.05)

    # -- the whole -----------------------------------------------------------------------------

    def run(self, seconds: float, tell: Callable[[str], object]) -> None:
        """Play faults under load for some seconds; then let everything end."""
        faults: tuple[tuple[Callable[[Replica], None], int], ...] = (
            (self.kill, 4),
            (self.stop, 4),
            (self.freeze, 2),
            (self.freeze_in_transaction, 4),
            (self.cut, 2),
            (self.silence, 2),
            (self.stall, 2),
            (self.lose_commit, 3),
            (self.crash_database, 1),
        )
        for replica in self.replicas:
            replica.until_serving()
        for client in self._clients:
            client.start()
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            self._pause(self._random.uniform(0.3, 2.0), but=None)
            (fault,) = self._random.choices(*zip(*faults, strict=True))
            replica = self._random.choice(self.replicas)
            self.faults[fault.__name__] += 1
            tell(f"{end_s - time.monotonic():6.1f} s left: {fault.__name__} {replica.name}")
            fault(replica)
        for client in self._clients:
            client.stop.set()
        for client in self._clients:
            client.join()

    def settle(self) -> None:
        """Let every run end, with a reply where one waits."""
        for replica in self.replicas:
            replica.until_serving()
        finisher = Client(CLIENTS, 0, self.journal, self.apis)

        def all_ended() -> bool:
            for replica in self.replicas:
                replica.look()
            unended = self.rows(UNENDED)
            for run_id, status, _ in unended:
                run = finisher.get(run_id)
                if status == "WAITING_USER" and run is not None:
                    with suppress(Exception):
                        if run.HasField("pending_interaction"):
                            finisher.reply_to(run)
            return not unended

        with suppress(AssertionError):  # the judge names them
            until(all_ended, "every run has ended", timeout_s=SETTLE_S)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            return connection.execute(sql.encode()).fetchall()

    def violations(self, locks: Path) -> Iterator[str]:
        """Yield everything that must not be."""
        yield from self.journal.violations
        for replica in self.replicas:
            yield from replica.problems
        for name, sql in JUDGES.items():
            yield from (f"{name}: {row}" for row in self.rows(sql))
        yield from (f"not ended: {row}" for row in self.rows(UNENDED))
        if (violations := locks / "violations").exists():
            yield from (f"two agents at a time: {run}" for run in violations.read_text().split())
        yield from problems_of(self.journal, self.replicas[0].api or self.apis()[0])

    def lines(self) -> Iterator[str]:
        """Yield the lines of the summary."""
        yield f"faults        {dict(sorted(self.faults.items()))}"
        for replica in self.replicas:
            yield f"exits of {replica.name}    {dict(replica.exits)}"
        logs = "".join(replica.home.logs() for replica in self.replicas)
        for event in ("takeover.completed", "takeover.fenced", "handover.done"):
            yield f"{event:<20}{logs.count(event)}"
        yield f"calls         {dict(sorted(self.journal.counts.items()))}"
        yield (
            f"acknowledged  {len(self.journal.runs)} runs, {len(self.journal.replies)} replies,"
            f" {len(self.journal.cancels)} cancels"
        )
        ((changes,),) = self.rows("SELECT count(*) FROM owner_history")
        ((moves,),) = self.rows(
            "SELECT count(*) FROM owner_history WHERE owner_before <> owner_after"
        )
        yield f"history       {changes} changes of runs, {moves} of them of the owner"

    def close(self) -> None:
        """End what this campaign has started, except the replicas' homes."""
        for client in self._clients:
            client.stop.set()
        for replica in self.replicas:
            if replica.api is not None:
                replica.api.channel.close()
        self._servers.close()


@contextmanager
def campaign(place: Path, *, seed: int, is_pooled: bool, mutant: str) -> Iterator[Campaign]:
    """Yield a campaign whose files are in `place`."""
    locks = place / "locks"
    locks.mkdir()
    shares = bool(seed % 2)
    prefix = (sys.executable, str(Path(__file__).with_name("replica_mutants.py")), mutant)
    with ExitStack() as stack:
        server = stack.enter_context(run_postgres(*SETTINGS, place=memory_place()))
        url = server.create("chaos")
        open_database(url, place).close()
        with psycopg.connect(url, autocommit=True) as connection:
            for statement in HISTORY:
                connection.execute(statement.encode())
        targets = [url]
        if is_pooled:
            set_what_is_needed(url)
            settings = {
                "pool_mode": "transaction",
                "ignore_startup_parameters": "options",
                "server_login_retry": 1,
                "default_pool_size": 60,
            }
            targets = [stack.enter_context(pooled(url, place, **settings)), url]
        replicas = []
        for name in REPLICAS:
            folder = place / f"home-{name}"
            folder.mkdir()
            ways = tuple(stack.enter_context(proxied(target)) for target in targets)
            shared: dict[str, Any] = {"shared_workspaces": True, "runs_dir": str(place / "volume")}
            home = Home(
                folder,
                engines=engines(locks),
                prefix=prefix if mutant else (),
                instance=name,
                lease_ttl_s=TTL_S,
                **(shared if shares else {}),
            )
            replicas.append(Replica(name, home, ways))
            stack.callback(home.clear)
        running = Campaign(server, url, replicas, seed)
        stack.callback(running.close)
        yield running


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n") if __doc__ else None)
@click.option("--seconds", type=click.IntRange(1), default=60, show_default=True)
@click.option("--seed", type=click.IntRange(0), help="An odd one: replicas share workspaces.")
@click.option("--pooled", "is_pooled", is_flag=True, help="Behind PgBouncer, by transaction.")
@click.option("--verbose", is_flag=True, help="A line for each fault.")
@click.option("--keep", type=click.Path(path_type=Path), help="Copy the logs there.")
@click.option("--mutate", type=click.Choice(sorted(MUTANTS)), help="Break the replicas.")
def main(
    *,
    seconds: int,
    seed: int | None,
    is_pooled: bool,
    verbose: bool,
    keep: Path | None,
    mutate: str | None,
) -> None:
    """Play a campaign."""
    if is_pooled and PROGRAM is None:
        click.echo("pgbouncer is not installed: skipped")
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and clear away
    seed = secrets.randbelow(2**32) if seed is None else seed
    click.echo(f"seed          {seed}{', pooled' if is_pooled else ''}")
    begun_s = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="runrecovery-replicas-") as folder,
        campaign(Path(folder), seed=seed, is_pooled=is_pooled, mutant=mutate or "") as running,
    ):
        try:
            running.run(seconds, tell=click.echo if verbose else lambda _: None)
            running.settle()
            found = list(running.violations(Path(folder) / "locks"))
            for line in (*running.lines(), *found[:40]):
                click.echo(line)
        finally:
            if keep is not None:
                for log in Path(folder).glob("home-*/service-*.log"):
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(log, keep / f"{log.parent.name}-{log.name}")
    click.echo(f"violations    {len(found)}")
    click.echo(f"took          {time.monotonic() - begun_s:.0f} s")
    if mutate:
        click.echo(f"mutant {mutate:<10} {'detected' if found else 'NOT DETECTED'}")
    sys.exit(0 if bool(found) == bool(mutate) else 1)


if __name__ == "__main__":
    main()
