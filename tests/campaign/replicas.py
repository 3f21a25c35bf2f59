"""Break replicas, their database and their network at random: no write is lost, no owner is stale.

    python tests/campaign/replicas.py --seconds 600
    python tests/campaign/replicas.py --seconds 300 --pooled    behind PgBouncer
    python tests/campaign/replicas.py --mutate exists           must be detected

Three replicas on one PostgreSQL work under the load of clients (`load.py`). The seed
determines the faults (`replica_faults.py`): SIGKILL, planned stops, SIGSTOP for longer than the
lease (also in the middle of a transaction), cut and silent connections, a lost answer to a COMMIT,
a crash of PostgreSQL.

Four judges (`replica_judges.py`): the journal of the clients, a history of owners that triggers in
the database write (`support/owner_history.py`), a lock that each agent takes while it lives, and
the last time at which each agent lived. In the end every run must have ended, after a reply through
a random replica where it waits for one.

With a mutant (`replica_mutants.py`) only the fault that provokes its violation is played, until a
violation of its kind is found. Any other violation detects no mutant.

Exit code 0: no violation was found, or that of the mutant was found. Exit code 1: otherwise.
"""

from __future__ import annotations

import os
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
from typing import Any, Final

import click
import psycopg

# A server that runs as another user is forked, and gRPC's handlers of a fork can fail.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
sys.path.insert(0, str(Path(__file__).parents[2]))  # bench
sys.path.insert(0, str(Path(__file__).parents[1]))

from campaign.judges import Violation, lost_writes
from campaign.load import Client, Journal
from campaign.replica_faults import SETTINGS, Faults
from campaign.replica_judges import UNENDED, violations_now
from campaign.replica_mutants import MUTANTS, Mutant
from campaign.replica_process import Replica, engines
from runrecovery_service.storage.opening import open_database
from support.api import Api
from support.owner_history import HISTORY
from support.pg_proxy import proxied
from support.pgbouncer import PROGRAM, pooled, set_what_is_needed
from support.service import Home
from support.waiting import PATIENCE_S, patience_s, until

from bench.postgres import ScratchPostgres, memory_place, run_postgres

TTL_S: Final = 3.0
REPLICAS: Final = ("a", "b", "c")
CLIENTS: Final = 4
SETTLE_S: Final = 30.0
"""After the faults, a replica may have to start, and a peer to take over, before runs go on."""
SETTLE_RUN_S: Final = 0.5
"""More than a run needs on two cores for its last turns."""
QUESTIONS: Final = (
    "SELECT r.run_id, q.no FROM run r JOIN interaction q ON q.run = r.id AND q.state = 'OPEN'"
    " WHERE r.status = 'WAITING_USER'"
)


class Campaign:
    """Three replicas, their clients, and the faults of a seed.

    Attributes:
        folder: where agents lock their runs.
    """

    def __init__(
        self,
        server: ScratchPostgres,
        url: str,
        replicas: list[Replica],
        folder: Path,
        *,
        seed: int,
        ttl_s: float,
    ) -> None:
        self.url, self.replicas, self.folder = url, replicas, folder
        self.journal = Journal()
        self.faults: Counter[str] = Counter()
        self.settled = ""
        self._faults = Faults(server, replicas, self.rows, self.journal, seed=seed, ttl_s=ttl_s)
        self._clients = [Client(number, seed, self.journal, self.apis) for number in range(CLIENTS)]

    def apis(self) -> list[Api]:
        """Return channels to the replicas that listen."""
        return [api for replica in self.replicas if (api := replica.api) is not None]

    def run(self, seconds: float, *, mutant: Mutant | None, tell: Callable[[str], object]) -> None:
        """Play faults under load for some seconds, or until the mutant is detected."""
        until(self._all_serve, "every replica serves", timeout_s=self._patience_s())
        for client in self._clients:
            client.start()
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            name = self._faults.play(mutant.fault if mutant else None)
            self.faults[name] += 1
            tell(f"{end_s - time.monotonic():6.1f} s left after {name}")
            if mutant and any(found.kind == mutant.kind for found in self.violations_now()):
                break
        for client in self._clients:
            client.stop.set()
        for client in self._clients:
            client.join()
        self._faults.end()

    def _keep_up(self) -> None:
        for replica in self.replicas:
            replica.look()

    def _all_serve(self) -> bool:
        self._keep_up()
        return all(replica.is_serving for replica in self.replicas)

    @staticmethod
    def _patience_s(runs: int = 0) -> float:
        return (SETTLE_S + SETTLE_RUN_S * runs) * patience_s() / PATIENCE_S

    def settle(self) -> None:
        """Let every run end, with a reply where one waits."""
        begun_s, runs = time.monotonic(), len(self.rows(UNENDED))
        bound_s = self._patience_s(runs)
        finisher = Client(CLIENTS, 0, self.journal, self.apis, tries=1)

        def all_ended() -> bool:
            self._keep_up()
            for run_id, question in self.rows(QUESTIONS):
                finisher.reply_to(run_id, question)
                self._keep_up()
            return not self.rows(UNENDED)

        with suppress(AssertionError):  # the judge names the runs
            until(all_ended, "every run has ended", timeout_s=bound_s)
        took_s = time.monotonic() - begun_s
        self.settled = f"{runs} runs within {took_s:.0f} s of at most {bound_s:.0f} s"

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows of a query."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            return connection.execute(sql.encode()).fetchall()

    def violations_now(self) -> list[Violation]:
        """Return what must not be at any time."""
        return [*violations_now(self.rows, self.folder)]

    def violations(self) -> Iterator[Violation]:
        """Yield everything that must not be in the end."""
        yield from self.violations_now()
        yield from (Violation("answer", text) for text in self.journal.violations)
        for replica in self.replicas:
            yield from (Violation("service", text) for text in replica.problems)
        yield from (Violation("not ended", str(row)) for row in self.rows(UNENDED))
        yield from lost_writes(self.journal, self.rows)

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
        yield f"settled       {self.settled}"
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
        self._faults.close()


@contextmanager
def campaign(place: Path, *, seed: int, is_pooled: bool, mutant: str = "") -> Iterator[Campaign]:
    """Yield a campaign whose files are in `place`."""
    locks = place / "locks"
    locks.mkdir()
    ttl_s = MUTANTS[mutant].lease_ttl_s if mutant else TTL_S
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
                engines=engines(locks, long_s=2 * ttl_s),
                prefix=prefix if mutant else (),
                instance=name,
                lease_ttl_s=ttl_s,
                **(shared if shares else {}),
            )
            replicas.append(Replica(name, home, ways))
            stack.callback(home.clear)
        running = Campaign(server, url, replicas, locks, seed=seed, ttl_s=ttl_s)
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
    mutant = MUTANTS[mutate] if mutate else None
    click.echo(f"seed          {seed}{', pooled' if is_pooled else ''}")
    begun_s = time.monotonic()
    with (
        tempfile.TemporaryDirectory(prefix="runrecovery-replicas-") as folder,
        campaign(Path(folder), seed=seed, is_pooled=is_pooled, mutant=mutate or "") as running,
    ):
        try:
            tell = click.echo if verbose else lambda _: None
            running.run(seconds, mutant=mutant, tell=tell)
            if mutant is None:
                running.settle()
            found = running.violations_now() if mutant else [*running.violations()]
            for line in (*running.lines(), *found[:40]):
                click.echo(line)
        finally:
            if keep is not None:
                for log in Path(folder).glob("home-*/service-*.log"):
                    keep.mkdir(parents=True, exist_ok=True)
                    shutil.copy(log, keep / f"{log.parent.name}-{log.name}")
    click.echo(f"violations    {len(found)}")
    click.echo(f"took          {time.monotonic() - begun_s:.0f} s")
    if mutant:
        found = [one for one in found if one.kind == mutant.kind]
        verdict = "detected" if found else "NOT DETECTED"
        click.echo(f"mutant {mutate:<10} {verdict} by: {mutant.kind}")
    sys.exit(0 if bool(found) == bool(mutant) else 1)


if __name__ == "__main__":
    main()
